"""Qwen-Image's text encoder: the last states of Qwen2.5-VL for a prompt in a template, which is dropped again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pflow_jax.data.prompts.records import Fields
from pflow_jax.families.encoder_checks import using
from pflow_jax.families.encoders import TorchEncoder, to_numpy


class QwenImageEncoder(TorchEncoder):
  """Qwen-Image: "text" (n, L, 3584) of Qwen2.5-VL at the published size, and "mask" (n, L).

  References:
    QwenImagePipeline.encode_prompt of diffusers; Qwen-Image, arXiv:2508.02324.
  """

  model = "qwen_image"
  networks = (("text_encoder", "Qwen2_5_VLForConditionalGeneration"),)
  tokenizers = (("tokenizer", "Qwen2Tokenizer"),)
  length, limit = 512, 1024
  text_width, masked = 3584, True
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
    states, mask = to_numpy(states.last_hidden_state), tokens.attention_mask.cpu().numpy().astype(bool)
    texts = [row[keep][self.drop :][: self.max_length] for row, keep in zip(states, mask, strict=True)]
    lengths = np.array([len(text) for text in texts])
    text = np.zeros((len(texts), lengths.max(), states.shape[-1]), states.dtype)
    for row, values in zip(text, texts, strict=True):
      row[: len(values)] = values
    return {"text": text, "mask": np.arange(text.shape[1]) < lengths[:, None]}
