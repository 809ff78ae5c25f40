"""Folders of tiny text encoders with random weights, laid out as published ones."""

import hashlib
import itertools
import json
import pathlib
import string

import ml_dtypes
import numpy as np

from pflow_jax.data.prompts.records import MODELS, Fields

WORDS = ["a", "cat", "dog", "red", "blue", "photo", "of", "the", "two", "cats"]
CLIP_WIDTH, T5_WIDTH, QWEN_WIDTH, BERT_WIDTH = 16, 24, 32, 12
CLIP_TOKENS = 12


def write_flux(folder):
  """FLUX.1's: text_encoder and tokenizer (CLIP), text_encoder_2 and tokenizer_2 (T5)."""
  import torch
  import transformers

  torch.manual_seed(0)
  letters = _byte_letters()
  start, end = "<|startoftext|>", "<|endoftext|>"
  vocab = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", start, end]
  marks = dict(bos_token=start, eos_token=end, pad_token=end, unk_token=end)
  config = dict(tokenizer_class="CLIPTokenizer", model_max_length=CLIP_TOKENS, **marks)
  _write_bpe(folder / "tokenizer", vocab, ["c a", "ca t</w>"], config)
  config = transformers.CLIPTextConfig(
    vocab_size=len(vocab),
    hidden_size=CLIP_WIDTH,
    intermediate_size=32,
    projection_dim=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=CLIP_TOKENS,
    bos_token_id=vocab.index(start),
    eos_token_id=vocab.index(end),
    pad_token_id=vocab.index(end),
  )
  transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")

  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
  pieces += [(piece, -2.0) for piece in itertools.chain("▁" + string.ascii_letters, ("▁" + word for word in WORDS))]
  transformers.T5TokenizerFast(pieces, extra_ids=0).save_pretrained(folder / "tokenizer_2")
  sizes = dict(d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
  config = transformers.T5Config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **sizes)
  transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
  return folder


def write_qwen_image(folder):
  """Qwen-Image's: text_encoder and tokenizer, which has a token for every word of the template, as the real one."""
  import tokenizers
  import torch
  import transformers

  from pflow_jax.families.qwen_image.encoder import QwenImageEncoder

  torch.manual_seed(0)
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = transformers.Qwen2Tokenizer({"<|endoftext|>": 0}, []).backend_tokenizer.pre_tokenizer
  trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=_byte_letters(), show_progress=False)
  bpe.train_from_iterator([QwenImageEncoder.template], trainer)
  model = json.loads(bpe.to_str())["model"]
  marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  first = len(model["vocab"])
  added = {str(first + n): dict(content=mark, special=True) for n, mark in enumerate(marks)}
  config = dict(tokenizer_class="Qwen2Tokenizer", model_max_length=4096, padding_side="right")
  config |= dict(added_tokens_decoder=added, pad_token=marks[0], eos_token=marks[2], unk_token=None)
  _write_bpe(folder / "tokenizer", model["vocab"], [" ".join(pair) for pair in model["merges"]], config)
  text = dict(
    vocab_size=first + len(marks),
    hidden_size=QWEN_WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    bos_token_id=None,
    eos_token_id=first,
  )
  vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=QWEN_WIDTH)
  config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
  transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
  return folder


def write_minilm(folder):
  """A BERT of MiniLM's kind, of 16 tokens."""
  import torch
  import transformers

  torch.manual_seed(0)
  vocab = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
  transformers.BertTokenizer(vocab, model_max_length=16).save_pretrained(folder)
  sizes = dict(hidden_size=BERT_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
  config = transformers.BertConfig(vocab_size=len(vocab), max_position_embeddings=16, **sizes)
  transformers.BertModel(config).save_pretrained(folder)
  return folder


def _byte_letters():
  from tokenizers.pre_tokenizers import ByteLevel

  return sorted(ByteLevel.alphabet())


def _write_bpe(folder, vocab, merges, config):
  """A tokenizer of byte pairs in the files of its authors."""
  folder.mkdir(parents=True)
  vocab = vocab if isinstance(vocab, dict) else {piece: number for number, piece in enumerate(vocab)}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  (folder / "tokenizer_config.json").write_text(json.dumps(config))


class StubEncoder:
  """Stands in for `text.Encoder` without PyTorch: arrays that tell the prompt, text of a token a letter and one more.

  Args:
    fail_at: number of the call of `encode` that calls `fail`.
  """

  folder, template, dtype = pathlib.Path("stub"), None, "float32"

  def __init__(self, model="qwen_image", max_length=12, fail_at=None, fail=None):
    self.max_length, self.calls, self.fail_at, self.fail = max_length, 0, fail_at, fail
    real = MODELS[model]
    self.fields = Fields(6 if real.text_width else 0, real.masked, 4 if real.pooled_width else 0)

  def digest(self):
    return "stub"

  def text_lengths(self, prompts):
    lengths = [min(len(prompt) + 1, self.max_length) for prompt in prompts]
    return np.array(lengths if self.fields.masked else [self.max_length] * len(prompts), np.int32)

  def encode(self, prompts):
    self.calls += 1
    if self.calls == self.fail_at:
      self.fail()
    rows = [self.one(prompt) for prompt in prompts]
    length = max(len(text) for text, _ in rows)
    arrays = {"text": np.stack([np.pad(text, [(0, length - len(text)), (0, 0)]) for text, _ in rows])}
    arrays["mask"] = np.arange(length) < self.text_lengths(prompts)[:, None]
    arrays["pooled"] = np.stack([pooled for _, pooled in rows])
    names = dict(text=self.fields.text_width, mask=self.fields.masked, pooled=self.fields.pooled_width)
    return {name: arrays[name] for name, has in names.items() if has}

  def one(self, prompt):
    """Text (l, 6) bfloat16 and pooled (4,) float32 of a prompt."""
    seed = int.from_bytes(hashlib.md5(prompt.encode()).digest()[:4], "little")
    rng = np.random.default_rng(seed)
    pooled = rng.normal(size=4).astype(np.float32)
    (length,) = self.text_lengths([prompt])
    return rng.normal(size=(length, 6)).astype(ml_dtypes.bfloat16), pooled
