"""Folders of prompts as `pflow cache` writes them, of arrays that tell the prompt."""

import dataclasses

import numpy as np

from pflow_jax.data.prompts.records import INDEX, TABLE, Index, prompt_hashes, without_x0
from tests.encoders import StubEncoder

PROMPTS = ["a", "bb", "a cat", "the dog", "two red cats", "a photo of the dog"]
SHAPE = (4, 4, 2)


def write(folder, model="qwen_image", shape=SHAPE, prompts=PROMPTS, shard=4, null=True):
  """A folder of prompts as `pflow cache` writes it; x0 of record i is full of i."""
  from array_record.python.array_record_module import ArrayRecordWriter

  folder.mkdir()
  encoder = StubEncoder(model, max_length=16)
  fields = dataclasses.replace(encoder.fields, shape=shape or ())
  lengths = encoder.text_lengths(prompts)

  def pack(fields, prompt, row):
    text, pooled = encoder.one(prompt)
    return fields.pack(prompt, {"text": text, "pooled": pooled, "x0": np.full(shape or SHAPE, row, np.float32)})

  for start in range(0, len(prompts), shard):
    writer = ArrayRecordWriter(str(folder / f"{start:05d}.array_record"), "group_size:1")
    for row in range(start, min(start + shard, len(prompts))):
      writer.write(pack(fields, prompts[row], row))
    writer.close()
  np.savez(folder / TABLE, length=lengths, hash=prompt_hashes(prompts))
  if null:
    (folder / "null.record").write_bytes(pack(without_x0(fields), "", 0))
  index = Index(model, fields, 16, int(lengths.max(initial=1)), len(prompts), shard)
  (folder / INDEX).write_text(index.as_json())
  return str(folder)
