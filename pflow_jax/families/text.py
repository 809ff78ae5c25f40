"""Texts as the families' encoders embed them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from pflow_jax.families.encoders import Encoder
from pflow_jax.families.registry import FAMILIES

ROUND = 64  # lengths of texts that are sampled: a program is compiled for each


def load_encoder(
  model: str,
  folder: str | os.PathLike | None = None,
  *,
  max_length: int | None = None,
  dtype: str | None = None,
  device: str | None = None,
) -> Encoder:
  """Returns the text encoders of a model.

  Args:
    model: name of a family that has text encoders, "flux", "qwen_image" or "minilm".
    folder: of the model's pipeline, as published; not needed for minilm.
    max_length: tokens of a text, default 512, as those pipelines.
    dtype: that it is computed in, "bfloat16" or "float32"; default bfloat16, and float32 for minilm.
    device: of PyTorch; default "cuda" if there is one, else "cpu".

  Raises:
    ValueError: no family has encoders for the model, the folder has none, or the length is out of range.
    ImportError: PyTorch or transformers is not there.
  """
  known = {name: family.encoder for name, family in FAMILIES.items() if family.encoder is not None}
  if model not in known:
    raise ValueError(f"model: expected one of {sorted(known)}, got {model!r}.")
  encoder = known[model]
  folder = encoder.find() if folder is None else folder
  max_length = encoder.length if max_length is None else max_length
  return encoder(folder, max_length, dtype or encoder.default_dtype, device)


def encode_prompts(
  model: str,
  folder: str | os.PathLike | None,
  prompts: Sequence[str],
  max_length: int | None = None,
  *,
  dtype: str | None = None,
  batch_size: int = 16,
) -> dict[str, np.ndarray]:
  """Returns the condition that a network samples prompts with; errors are those of `load_encoder`.

  Args:
    model: name of its family.
    folder: of the model's pipeline.
    prompts: texts.
    max_length: tokens of a text.
    dtype: that it is computed in.
    batch_size: prompts at a time.

  Returns:
    "text" (n, L, D) of `dtype`, of FLUX.1 L = max_length, else the longest rounded up to a multiple of 64; "mask" (n,
    L) bool; "pooled" (n, P) float32; as far as the model has them.
  """
  if not prompts:
    raise ValueError("there are no prompts to encode.")
  return encode_with(load_encoder(model, folder, max_length=max_length, dtype=dtype), prompts, batch_size)


def encode_with(encoder: Encoder, prompts: Sequence[str], batch_size: int = 16) -> dict[str, np.ndarray]:
  """Returns what `encode_prompts` does, of an encoder that is there.

  Args:
    encoder: result of `load_encoder`.
    prompts: texts, at least one.
    batch_size: prompts at a time.
  """
  parts = [encoder.encode(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
  if encoder.fields.masked:
    length = -(-max(part["text"].shape[1] for part in parts) // ROUND) * ROUND
    for part in parts:
      for name in ("text", "mask"):
        values = part[name]
        part[name] = np.pad(values, [(0, 0), (0, length - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
