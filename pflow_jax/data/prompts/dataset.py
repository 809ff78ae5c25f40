"""Sets whose condition is a prompt: folders of embeddings, those joined to a set in memory, and random ones."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pflow_jax.data.dataset import TEXT_DTYPE, Dataset, Embedding
from pflow_jax.data.prompts.buckets import BucketRecords
from pflow_jax.data.prompts.records import INDEX, MAX_LENGTHS, MODELS, Fields, PromptSource, read_index, read_null
from pflow_jax.data.records import ArrayRecords, Record
from pflow_jax.files.foreign import check_memory, shown


def prompts(
  path: str,
  *,
  split: str = "train",
  model: str | None = None,
  shape: tuple[int, ...] | None = None,
  buckets: tuple[int, ...] | None = None,
  max_length: int | None = None,
) -> Dataset:
  """Prompts of a folder that `pflow cache` wrote, and the latents beside them if there are any.

  Args:
    path: of the folder; split "test" reads the one beside it that is named <path>_test.
    split: "train" or "test".
    model: the model that they must be encoded for, by default the folder's. With `shape` given too, a run can be
      planned on a machine that does not have the data, which is then assumed to have latents.
    shape: (*space, C) of x0, by default that of the latents.
    buckets: lengths of text, see `buckets`; by default one, the longest text's. A model that attends to padding has
      texts of one length alone.
    max_length: tokens that texts were cut to, see `pinned`; it has to be the folder's.

  Raises:
    ValueError: for a folder that does not fit these arguments, or is needed and not there.
  """
  name = f"prompts:{path}"
  if split not in ("train", "test"):
    raise ValueError(f"{name}: split must be 'train' or 'test', got {split!r}.")
  if "://" in path:
    raise ValueError(f"{name}: shards are read from a file system; mount the bucket, and give where it is.")
  if model is not None and model not in MODELS:
    raise ValueError(f"{name}: model must be one of {sorted(MODELS)}, got {model!r}.")
  folder = _folder(path, split)
  shape = None if shape is None else tuple(shape)
  index = read_index(folder)
  if index is None:
    if model is None or shape is None:
      raise ValueError(
        f"prompts:{folder}: there is no {INDEX}; write the prompts with `pflow cache`, or give model= and shape= to "
        "plan a run."
      )
    fields, longest = dataclasses.replace(MODELS[model], shape=shape), max_length or MAX_LENGTHS[model]
    null: Record | None = None
  else:
    fields, longest = index.fields, index.longest
    if model not in (None, index.model):
      raise ValueError(f"prompts:{folder} is of prompts for {index.model}, got model={model!r}.")
    if shape is None and not fields.shape:
      raise ValueError(f"prompts:{folder} has no latents; give shape=, (*space, C) of what is to be sampled.")
    if fields.shape and shape not in (None, fields.shape):
      raise ValueError(f"prompts:{folder} has latents of shape {fields.shape}, got shape={shape}.")
    if max_length not in (None, index.max_length):
      raise ValueError(f"prompts:{folder} has texts of up to {index.max_length} tokens, got max_length={max_length}.")
    null = read_null(folder, fields)
  lengths = _lengths(folder, fields, longest, buckets)
  embedding = Embedding(lengths, fields.text_width, fields.masked, fields.pooled_width)
  check_memory(f"{name}: an embedding with texts of {shown(lengths)} tokens", embedding.nbytes)
  # Without data there are zeros: a plan needs the shapes alone.
  zeros = {leaf: np.zeros(size, dtype) for leaf, (size, dtype) in embedding.leaves().items()}
  null = zeros if index is None else _padded(null, zeros)
  return Dataset(
    name=name,
    shape=shape or fields.shape,
    num_classes=0,
    class_names=(),
    records=BucketRecords(PromptSource(folder, index), lengths, fields.masked),
    embedding=dataclasses.replace(embedding, null=null),
    has_x0=bool(fields.shape),
  )


def _folder(path: str, split: str) -> str:
  return f"{path}_test" if split == "test" else path


def pinned(options: Mapping[str, Any]) -> dict[str, Any]:
  """Options of a data set, see `load`, with those that embedding a prompt needs where the set is not at hand."""
  kind, _, path = str(options.get("name")).partition(":")
  index = read_index(_folder(path, options.get("split", "train"))) if kind == "prompts" else None
  return {**options} if index is None else {**options, "max_length": index.max_length}


def with_embeddings(dataset: Dataset, folder: str) -> Dataset:
  """A set in memory with the "pooled" embeddings of its texts, from a folder of prompts, in place of its classes.

  Raises:
    ValueError: for a folder without such embeddings, or one that lacks a text.
  """
  name = f"{dataset.name}: embeddings={folder}"
  index = read_index(folder)
  if index is None or not index.fields.pooled_width:
    got = f"those for {index.model}" if index else "no prompts"
    raise ValueError(f'{name}: expected prompts with "pooled" embeddings, got {got}; write them with `pflow cache`.')
  source = PromptSource(folder, index)
  rows = source.find(dataset.texts)
  pooled = np.zeros((len(rows), index.fields.pooled_width), np.float32)
  missing: dict[str, None] = {}
  for number, (text, row) in enumerate(zip(dataset.texts, rows, strict=True)):
    prompt, record = source.read(int(row)) if row >= 0 else (None, {})
    if prompt == text:
      pooled[number] = record["pooled"]
    else:
      missing[text] = None
  if missing:
    shown = ", ".join(map(repr, list(missing)[:3]))
    raise ValueError(
      f"{name}: {len(missing)} texts are not there: {shown}; write them with `pflow cache "
      f"--prompts=data:{dataset.name}`."
    )
  assert isinstance(dataset.records, ArrayRecords)
  null = read_null(folder, index.fields)
  embedding = Embedding(pooled_width=index.fields.pooled_width, null=null and {"pooled": null["pooled"]})
  records = dataclasses.replace(dataset.records, embeddings={"pooled": pooled})
  return dataclasses.replace(dataset, num_classes=0, class_names=(), records=records, embedding=embedding)


def synthetic_prompts(
  *,
  split: str = "train",
  model: str = "flux",
  shape: tuple[int, ...] = (32, 32, 4),
  text: tuple[int, int] | None = None,
  pooled: int | None = None,
  num_records: int = 64,
) -> Dataset:
  """Random arrays of any shape as x0 and as the embeddings of a model, for benchmarks and tests; the same in every run.

  Args:
    split: "train" or "test", which differ.
    model: one of `MODELS`.
    shape: (*space, C) of x0.
    text: (tokens, width) of the text's embedding, by default the model's.
    pooled: width of the pooled embedding, by default the model's.
    num_records: records to keep in memory.

  Raises:
    ValueError: for another split or model, an embedding that the model lacks, or sizes below 1.
  """
  if split not in ("train", "test"):
    raise ValueError(f"synthetic_prompts: split must be 'train' or 'test', got {split!r}.")
  if model not in MODELS:
    raise ValueError(f"synthetic_prompts: model must be one of {sorted(MODELS)}, got {model!r}.")
  fields = MODELS[model]
  if (text and not fields.text_width) or (pooled and not fields.pooled_width):
    raise ValueError(f"synthetic_prompts: got text={text} and pooled={pooled}, of which {model} lacks one.")
  length, width = text or (MAX_LENGTHS[model], fields.text_width)
  pooled, shape = pooled or fields.pooled_width, tuple(shape)
  if min((num_records, *shape, *(text or ()))) < 1:
    raise ValueError(f"synthetic_prompts: expected sizes >= 1, got {num_records}, {shape} and {text}.")
  rng = np.random.default_rng(("train", "test").index(split))
  embedding = Embedding((length,) if width else (), width, fields.masked, pooled)
  nbytes = num_records * (embedding.nbytes + 4 * math.prod(shape))
  check_memory(f"synthetic_prompts: num_records={shown(num_records)}", nbytes, "ask for fewer")
  draw = lambda size, dtype: np.asarray(rng.standard_normal(size, np.float32), dtype)
  arrays = {leaf: draw((num_records, *size), dtype) for leaf, (size, dtype) in embedding.leaves().items()}
  null = {leaf: np.zeros(size, dtype) for leaf, (size, dtype) in embedding.leaves().items()}
  if fields.masked:
    tokens = rng.integers(1, length + 1, num_records)
    arrays["mask"] = np.arange(length) < tokens[:, None]
    arrays["text"] *= arrays["mask"][..., None].astype(TEXT_DTYPE)
    null["mask"][0] = True
  x0 = draw((num_records, *shape), np.float32)
  records = ArrayRecords(x0, np.zeros(num_records, np.int32), arrays)
  embedding = dataclasses.replace(embedding, null=null)
  return Dataset("synthetic_prompts", shape, 0, (), records, embedding=embedding)


def _padded(null: Record | None, zeros: Record) -> Record | None:
  """The empty prompt's arrays as of a batch's example, in the shapes of `zeros`."""
  if null is None:
    return None
  result = dict(zeros)
  if "text" in zeros:
    length = min(len(null["text"]), len(zeros["text"]))
    result["text"][:length] = null["text"][:length]
    if "mask" in zeros:
      result["mask"][:length] = True
  if "pooled" in zeros:
    result["pooled"] = null["pooled"]
  return result


def _lengths(folder: str, fields: Fields, longest: int, buckets: Iterable[int] | None) -> tuple[int, ...]:
  """The lengths of text of batches, ascending."""
  if not fields.text_width:
    if buckets:
      raise ValueError(f"prompts:{folder}: there are no texts to put in buckets; leave out buckets=.")
    return ()
  lengths = tuple(sorted({int(bucket) for bucket in buckets or (longest,)}))
  # A program is compiled for each length. Lengths beyond the longest text are left out.
  lengths = lengths[: bisect.bisect_left(lengths, longest) + 1]
  if lengths[0] < 1:
    raise ValueError(f"prompts:{folder}: buckets must be lengths of text, at least 1, got {lengths}.")
  if not fields.masked and lengths != (longest,):
    raise ValueError(
      f"prompts:{folder}: its model attends to padding, so all texts have {longest} tokens; leave out buckets=, got "
      f"{lengths}. (Another length is chosen by `pflow cache --max_length`.)"
    )
  return lengths
