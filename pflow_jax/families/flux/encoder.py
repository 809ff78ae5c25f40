"""FLUX.1's text encoders: T5's states, padding too, and CLIP's pooled state.

T5 was given its `max_length` tokens without a mask, and the network attends to all of them.
"""

from __future__ import annotations

import numpy as np

from pflow_jax.data.prompts.records import Fields
from pflow_jax.families.encoders import TorchEncoder, to_numpy


class FluxEncoder(TorchEncoder):
  """FLUX.1: "text" (n, max_length, 4096) of T5-XXL, "pooled" (n, 768) of CLIP-L, at the published sizes.

  References:
    FluxPipeline.encode_prompt of diffusers.
  """

  model = "flux"
  networks = (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel"))
  tokenizers = (("tokenizer", "CLIPTokenizer"), ("tokenizer_2", "T5TokenizerFast"))
  length, limit = 512, 512
  text_width, pooled_width = 4096, 768

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
    return {"text": to_numpy(text), "pooled": to_numpy(pooled.float())}
