"""Damage to valid files: to their bytes, to the structures within, and to what they are in the file system."""

from __future__ import annotations

import copy
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import zipfile
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (
  *(None, True, False, -1, 0, 1, 2, 3, 17, 10**8, 10**9, 2**31, 2**63, 10**40),
  *(-0.5, -0.0, 0.5, 1.5, 1e-300, 1e308, 1e400, float("nan")),
  *("", " ", "x", "3", "é", "\x00", "\ud800", "\x1b[2J", "x" * 5000, "nan"),
  *("..", "../x", "/etc/passwd", "/dev/null", "gs://b/c", "dit", "flux", "float32", "DX", "velocity"),
  *([], {}, [1], [0], [-1], [10**9] * 3, [10**30], [1e400, 1], [[]], [None], ["a"], [True], [2, 2, 3], [1.5], [1, "a"]),
  *([["a", 1]], [["(", 1]], [[1, "a"]], {"a": 1}, {"a": {"b": [1]}}, {"kind": None}, {"kind": "dit"}, {"kind": []}),
)
KEYS = ("", "a.b", "kind", "items", "_fields", "__class__", "__metadata__", "new", "x" * 300, "é")
ARRAYS: tuple[Any, ...] = (
  np.array(3.0),
  np.zeros((0, 2)),
  np.zeros((3, 0, 2), np.uint8),
  np.arange(5),
  np.arange(6) - 1,
  np.array([2**31]),
  np.array([0] * 5 + [2**31]),
  np.array([0] * 5 + [2**63], np.uint64),
  np.arange(6).reshape(2, 3),
  np.array(["a", "b", "c"]),
  np.array(["a", "a", "b", "c", "d", "e"]),
  np.array([b"a", b"b"]),
  np.array([""] * 6),
  np.array(["\x1b[2J", "\ud800", "x" * 10_000]),
  np.ones(6, bool),
  np.linspace(0, 5, 6),
  np.full((6, 2, 2, 3), np.nan),
  np.full((6, 2, 2, 3), 255.0),
  np.full((6, 2), 1e300),
  np.zeros((6, 2, 2, 3), complex),
  np.zeros((6, 2, 2, 3), ">f8"),
  np.zeros((6, 2, 2, 3), np.float16),
  np.zeros((6, 2, 2, 3), np.int64),
  np.zeros(6, [("a", int), ("b", float)]),
  np.zeros(6, "datetime64[s]"),
  np.zeros(6, "timedelta64[s]"),
  np.zeros(6, "V7"),
  np.array([{"pickled": print}] * 6, object),
)
HEADERS = (
  *("(10**12,)", "(1000000000000,)", "(-1,)", "(6, -2)", "(True, 2)", "(1.5,)", "()", "(6", "6", "None", "[6]", "'x'"),
  *("((((((((((((((", "(" * 9000, "(0, 1000000000000)", "(4294967296, 4294967296, 4294967296)", "(6, 2, 2, 3, 1)"),
)
DESCRIPTIONS = (
  *("'<f4'", "'|O'", "'<U0'", "'<U1000000000'", "'V0'", "'<f4,<i8'", "'zz'", "1"),
  *("('<f4', (1000000000,))", "[('a', '<f4')]"),
)
CONTENTS = (
  *(
    b"",
    b"\0",
    b"\0" * 70_000,
    b"\n" * 9,
    b"{",
    b"[" * 100_000,
    b"null",
    b"{}",
    b"[]",
    b"1" * 5000,
    b"\xff\xfea\0 \0c\0",
  ),
  *(b'{"a": NaN}', b'{"a": 1e999}', b'{"_class_name": "Flux"}', b"\xff\xfe{\0}\0"),
  *(b"PK\x05\x06" + b"\0" * 18, b"PK\x05\x06" + b"\xff" * 18, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
  *(b"BM" + b"\xff" * 60, b"GIF89a" + b"\xff" * 90, b"II*\0" + b"\xff" * 90, b"RIFF\xff\xff\xff\xffWEBPVP8X\xff\xff"),
  *(b'"' * 99, b"a," * 200_000 + b"\n", b'prompt\n"' + b"x" * 200_000, b"x" * (2**20 + 2), b"\x1f\x8b" + b"\0" * 50),
)
LINKS = {"loop": None, "device": "/dev/zero", "dangling": "nowhere", "up": "..", "outside": "/etc/passwd"}


def damage(rng: random.Random, path: pathlib.Path, **of_files: Any) -> str:
  """Damages the file, or one or two of those in the folder; returns how.

  Args:
    of_files: more ways for files of an ending (without its dot), each a function (rng, file) -> how.
  """
  files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
  told = []
  for file in rng.sample(files, min(len(files), rng.choice([1, 1, 1, 2]))):
    ending = file.suffix[1:]
    inner = list(OF_FILES.get(ending, ())) + list(of_files.get(ending, ()))
    kind = rng.choice(inner if inner and rng.random() < 0.7 else [_bytes, _bytes, _bytes, _whole, place])
    told.append(f"{file.name}: {kind(rng, file)}")
  return ", ".join(told)


def _bytes(rng: random.Random, file: pathlib.Path) -> str:
  content = bytearray(file.read_bytes())
  for _ in range(rng.choice([1, 1, 2, 8])):
    if not content:
      break
    # Files begin with what matters, archives end with it, and many are mostly zeros.
    ends = [*range(min(len(content), 400)), *range(max(len(content) - 600, 0), len(content), 3)]
    places = ends + [i for i in range(0, len(content), max(len(content) // 1000, 7)) if content[i]]
    at, size = rng.choice(places), rng.choice([1, 1, 2, 4, 8, 30])
    match rng.randrange(7):
      case 0 | 1:
        content[at : at + size] = rng.randbytes(size)
      case 2:
        content[at : at + size] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * size
      case 3:
        del content[at : None if rng.random() < 0.5 else at + size]
      case 4:
        content[at:at] = rng.randbytes(size)
      case 5:
        other = rng.choice(places)
        content[at : at + size] = content[other : other + size]
      case 6:
        content[at : at + 1] = rng.choice([b"-", b"1", b'"', b"[", b"{", b",", b"e9", b"null", b"1e999", b"NaN"])
  file.write_bytes(content)
  return "bytes"


def _whole(rng: random.Random, file: pathlib.Path) -> str:
  content = rng.choice(CONTENTS)
  file.write_bytes(content)
  return f"content {content[:20]!r}"


def place(rng: random.Random, path: pathlib.Path) -> str:
  """The file or folder is missing, or something else than it should be; returns what."""
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  kind = rng.choice(["missing", "pipe", "folder", "file", "sparse", *LINKS])
  match kind:
    case "pipe":
      os.mkfifo(path)
    case "folder":
      path.mkdir()
    case "file":
      path.write_bytes(b"x")
    case "sparse":
      with path.open("wb") as stream:
        stream.truncate(2**40)
    case _ if kind in LINKS:
      path.symlink_to(LINKS[kind] or path.name)
  return kind


def change(rng: random.Random, value: Any) -> Any:
  """The value with one of those within it replaced, dropped, added or renamed."""
  if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    draw = rng.random()
    if draw < 0.1:
      del value[key]
    elif draw < 0.2 and isinstance(value, dict):
      value[rng.choice([f"{key}x", *KEYS])] = copy.deepcopy(rng.choice(VALUES))
    elif draw < 0.25 and isinstance(value, dict):
      value[key] = copy.deepcopy(value[rng.choice(list(value))])
    else:
      value[key] = change(rng, value[key])
    return value
  return copy.deepcopy(rng.choice(VALUES))


def _json(rng: random.Random, file: pathlib.Path) -> str:
  value = json.loads(file.read_text())
  for _ in range(rng.choice([1, 1, 1, 3])):
    value = change(rng, value)
  text = json.dumps(value)
  file.write_text(text)
  return f"JSON {text[:1500]}"


def _json_lines(rng: random.Random, file: pathlib.Path) -> str:
  lines = file.read_text().split("\n")
  row = rng.randrange(len(lines))
  lines[row] = json.dumps(change(rng, json.loads(lines[row])))
  file.write_text("\n".join(lines))
  return f"line {lines[row][:300]}"


def _array(rng: random.Random, file: pathlib.Path) -> str:
  with np.load(file) as arrays:
    arrays = dict(arrays)
  name, value = rng.choice([*arrays, "other"]), rng.choice(ARRAYS)
  if rng.random() < 0.1:
    arrays.pop(name, None)
  else:
    arrays[name] = value
  rng.choice([np.savez, np.savez_compressed])(file, **arrays)
  return f"array {name} {value.dtype} {value.shape}"


def _member(rng: random.Random, file: pathlib.Path) -> str:
  """Other members, or the same twice, or with a sum that is wrong."""
  with zipfile.ZipFile(file) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
  name = rng.choice(list(members))
  whole = members[name]
  members[name] = rng.choice([b"", whole[:-1], whole + b"\0", b"\x93NUMPY\x03\0" + whole[8:], b"x"])
  with zipfile.ZipFile(file, "w", method) as archive:
    for other, content in members.items():
      archive.writestr(other, content)
    if rng.random() < 0.2:
      archive.writestr(rng.choice([name, "../x.npy", "x0", "/"]), members[name])
  return f"member {name}"


def _array_header(rng: random.Random, file: pathlib.Path) -> str:
  """An array's header that says something else."""
  if zipped := file.suffix == ".npz":
    with zipfile.ZipFile(file) as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
  else:
    members = {"": file.read_bytes()}
  name = rng.choice(list(members))
  with io.BytesIO(members[name]) as stream:
    np.lib.format.read_magic(stream)
    shape, order, dtype = np.lib.format.read_array_header_1_0(stream)
    values = stream.read()
  fields = {"descr": repr(dtype.str), "fortran_order": repr(order), "shape": repr(shape)}
  key = rng.choice(list(fields))
  fields[key] = rng.choice(
    {"descr": DESCRIPTIONS, "fortran_order": ("True", "1", "None", "'x'"), "shape": HEADERS}[key]
  )
  header = ("{" + ", ".join(f"{k!r}: {v}" for k, v in fields.items()) + "}").encode()
  header += b" " * (-(len(header) + 11) % 64) + b"\n"
  members[name] = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + values
  if zipped:
    with zipfile.ZipFile(file, "w") as archive:
      for other, content in members.items():
        archive.writestr(other, content)
  else:
    file.write_bytes(members[name])
  return f"header {fields[key][:60]}"


def _pickled(rng: random.Random, file: pathlib.Path) -> str:
  """A pickle of other values, in another protocol."""
  if b"torch_utils.persistence" in (content := file.read_bytes()):  # it has classes that are not here
    return _bytes(rng, file)
  value = pickle.loads(content)
  key = rng.choice(list(value))
  new = copy.deepcopy(rng.choice([*ARRAYS, *VALUES, os.getcwd, {key: value[key]}, [value[key]]]))
  place = value if rng.random() < 0.8 or not isinstance(value[key], dict) else value[key]
  place[rng.choice([key, *place])] = new
  if rng.random() < 0.2:
    value["loop"] = value
  protocol = rng.choice([0, 2, 3, 4, 5])
  file.write_bytes(pickle.dumps(value, protocol))
  return f"pickle {protocol}, {key!r} {str(new)[:60]!r}"


def _tensors_header(rng: random.Random, file: pathlib.Path) -> str:
  """The header of a file of safetensors that says something else."""
  content = file.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  values = content[8 + length :]
  text = json.dumps(change(rng, json.loads(content[8 : 8 + length]))).encode()
  if rng.random() < 0.1:  # a name twice
    text = text[:-1] + b', "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' * 2 + b"}"
  length = rng.choice([len(text)] * 9 + [0, 2**63, 2**40, len(text) + 1, 10**8])
  file.write_bytes(struct.pack("<Q", length) + text + values)
  return f"header of {length}: {text[:1500]!r}"


OF_FILES = {
  "json": [_json],
  "jsonl": [_json_lines],
  "npz": [_array, _member, _array_header],
  "npy": [_array_header],
  "pkl": [_pickled],
  "safetensors": [_tensors_header],
}
