"""Text encoders whose settings ask for more than their weights are."""

import json

import pytest

from pflow_jax.families import text
from pflow_jax.families.encoder_checks import using
from tests import encoders

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
  return encoders.write_minilm(tmp_path_factory.mktemp("minilm"))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_hidden_layers": 10**8}, r"num_hidden_layers: expected up to 1024 layers, got 100000000"),
    ({"inner": {"num_heads": 10**9}}, r"num_heads: expected up to 1024 layers"),
    ({"vocab_size": 10**6}, r"a BertModel of 120\d+ parameters, which weights of .* cannot be"),
    ({"hidden_size": 2**14, "num_attention_heads": 1}, r"a BertModel of \d+ parameters"),
    ({"hidden_size": "12"}, r"cannot be read|hidden_size|do not work together"),
  ],
)
def test_a_network_larger_than_its_weights_is_not_built(minilm, tmp_path, fields, message):
  """A config of none of its sizes describes one of the published sizes."""
  for file in minilm.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  config = json.loads((minilm / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | fields))
  encoder = text.load_encoder("minilm", minilm)
  encoder.folder = tmp_path
  with pytest.raises(ValueError, match=message) as error:
    encoder.encode(["a cat"])
  assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_told_in_a_sentence(minilm, tmp_path):
  encoder = text.load_encoder("minilm", minilm)
  encoder._tokenizers[0].add_tokens(["elephant"])
  with pytest.raises(ValueError, match="do not work together: 'index out of range") as error:
    encoder.encode(["elephant"])
  assert "\n" not in str(error.value)


def test_a_lack_of_memory_is_no_mistake(tmp_path):
  class OutOfMemoryError(RuntimeError):
    """As PyTorch has one."""

  for error in (OutOfMemoryError(), MemoryError(), OSError(5, "input/output error")):
    with pytest.raises(type(error)), using(tmp_path):
      raise error
  with pytest.raises(ValueError, match="no such model"), using(tmp_path):
    raise OSError("no such model")
