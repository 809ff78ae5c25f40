"""Hostile files of `torch.save`."""

from __future__ import annotations

import os
import pathlib
import pickle
import pickletools
import random
import tarfile
import zipfile
from typing import Any

import torch


class _Call:
  """Something that is called when it is unpickled."""

  def __init__(self, function: Any, *args: Any):
    self.call = function, args

  def __reduce__(self):
    return self.call


def hostile_states(state: dict[Any, Any]) -> dict[str, Any]:
  """State dicts with something in them that no model has."""
  name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.ndim == 2)
  loop: dict[Any, Any] = dict(state)
  loop["loop"] = loop
  many: Any = {"a": state}
  for _ in range(60):
    many = {"left": many, "right": many}
  deep: Any = {}
  for _ in range(300):
    deep = {"d": deep}
  with_one = lambda value: state | {name: value}
  return {
    "loop": loop,
    "many": many,
    "deep": deep,
    "numbers": dict(enumerate(state.values())),
    "mixed": state | {3: tensor},
    "newline": state | {"a\nb": tensor},
    "escape": state | {"\x1b[2J": tensor},
    "long": state | {"x" * 10**5: tensor},
    "list": list(state.values()),
    "none": None,
    "empty": {},
    "tensor": tensor,
    "strides": with_one(torch.zeros(1).expand(tensor.shape)),
    "huge": with_one(torch.zeros(1).expand(2**20, 2**20)),
    "rank": with_one(torch.zeros((1,) * 60)),
    "scalar": with_one(torch.tensor(1.0)),
    "nothing": with_one(torch.zeros(0, 2**40)),
    "complex": with_one(tensor.to(torch.complex64)),
    "sparse": with_one(tensor.to_sparse()),
    "quantised": with_one(torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "meta": with_one(tensor.to("meta")),
    "double": with_one(tensor.double()),
    "half": with_one(tensor.bfloat16()),
    "code": state | {"code": _Call(os.mkdir, "ran")},
    "memory": state | {"memory": _Call(bytearray, 2**40)},
    "some_memory": state | {"memory": _Call(bytearray, 2**34)},
    "tensors": state | {"memory": _Call(torch.Tensor, 2**20, 2**20)},
    "text": state | {"text": "x" * 10**6},
  }


def _pickle(rng: random.Random, file: pathlib.Path) -> str:
  state = torch.load(file, weights_only=True)["state_dict"]
  states = hostile_states(state)
  name = rng.choice([*states, "legacy", "tar", "pickle", "protocol 4", "no torch"])
  if name == "legacy":
    torch.save(state, file, _use_new_zipfile_serialization=False)
  elif name == "tar":
    with tarfile.open(file, "w") as archive:
      archive.add(__file__, "storages")
  elif name == "pickle":
    file.write_bytes(pickle.dumps(list(state)))
  elif name == "protocol 4":
    torch.save({"state_dict": state, "meta": {"step": 3}}, file, pickle_protocol=4)
  elif name == "no torch":
    file.write_bytes(b"\x80\x02c" + b"posix\nmkdir\n" + b"." * 50)
  else:
    torch.save(states[name] if rng.random() < 0.5 else {"state_dict": states[name]}, file)
  return name


def _zip(rng: random.Random, file: pathlib.Path) -> str:
  """The archive with an entry changed, dropped, doubled or compressed, or the pickle's bytes damaged."""
  with zipfile.ZipFile(file) as archive:
    entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
  row = [name.endswith("data.pkl") for name, _ in entries].index(True)
  row = rng.choice([row, rng.randrange(len(entries))])
  name, content = entries[row]
  kinds = ["drop", "twice", "pickle", "pickle", "pickle", "compressed", "absolute", "order", "empty", "comment"]
  kind = rng.choice(kinds)
  if kind == "drop":
    del entries[row]
  elif kind == "twice":
    entries.append((name, content))
  elif kind == "pickle" and content:
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 3])):
      at = rng.randrange(len(damaged))
      damaged[at : at + rng.choice([0, 1, 1, 4])] = rng.randbytes(rng.choice([0, 1, 1, 4]))
    entries[row] = name, bytes(damaged)
  elif kind == "absolute":
    entries[row] = rng.choice(["/etc/x", "../../x", "\\x", "data.pkl"]), content
  elif kind == "order":
    entries = [(n, b"big" if n.endswith("byteorder") else c) for n, c in entries]
  elif kind == "empty":
    entries[row] = name, b""
  method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
  with zipfile.ZipFile(file, "w", method) as archive:
    archive.comment = b"x" * 100 if kind == "comment" else b""
    for entry in entries:
      archive.writestr(*entry)
  return f"zip {kind} {name}"


def _operations(rng: random.Random, file: pathlib.Path) -> str:
  """A pickle with operations put in, dropped or doubled, calls of something among them."""
  content = file.read_bytes()
  places = [at for _, _, at in pickletools.genops(content)]
  at, end = sorted(rng.sample(places, 2))
  end = min(end, places[min(places.index(at) + rng.choice([1, 1, 2, 5]), len(places) - 1)])
  code = pickle.dumps(_Call(os.mkdir, "ran"), 4)[2:-1]  # without the protocol, and without the end
  kind = rng.choice(["put", "put", "dropped", "doubled", "swapped"])
  if kind == "put":
    parts = [code, b"cposix\nmkdir\n", b"N", b"0", b"(", b"t", b"u", b"b", b"R", b"}", b"\x8f", b"h\x07", b"2", b"Q"]
    added = b"".join(rng.choices(parts, k=rng.choice([1, 1, 3])))
    content = content[:at] + added + content[rng.choice([at, end]) :]
  elif kind == "swapped":
    other = rng.choice(places)
    content = content[:at] + content[other : other + end - at] + content[end:]
  else:
    content = content[:at] + (content[at:end] * 2 if kind == "doubled" else b"") + content[end:]
  file.write_bytes(content)
  return f"operations {kind} at {at}"


OF_PICKLES = {"pth": [_pickle, _zip], "pt": [_zip], "pkl": [_operations, _operations]}
