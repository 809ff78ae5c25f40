"""Damage to valid files: to their bytes, to the structures within, and to what they are in the file system."""

from __future__ import annotations

import io
import json
import os
import pathlib
import random
import shutil
import zipfile
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (
  *(None, True, -1, 0, 1, 2, 3, 1.5, 10**9, 2**31, 2**63, 10**40, 1e308, "", "x", "3", "\x00", "\ud800", "x" * 5000),
  *([], {}, [1], [0], [-1], [10**9] * 3, [[]], ["a"], [True], {"a": 1}, [2, 2, 3], [1.5], [None], "gs://b/c"),
)
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
  *(b"", b"\0", b"\0" * 70_000, b"\n" * 9, b"{", b"[" * 100_000, b"null", b"{}", b"1" * 5000, b"\xff\xfea\0 \0c\0"),
  *(b"PK\x05\x06" + b"\0" * 18, b"PK\x05\x06" + b"\xff" * 18, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
  *(b"BM" + b"\xff" * 60, b"GIF89a" + b"\xff" * 90, b"II*\0" + b"\xff" * 90, b"RIFF\xff\xff\xff\xffWEBPVP8X\xff\xff"),
  *(b'"' * 99, b"a," * 200_000 + b"\n", b'prompt\n"' + b"x" * 200_000, b"x" * (2**20 + 2), b"\x1f\x8b" + b"\0" * 50),
)


def damage(rng: random.Random, path: pathlib.Path) -> str:
  """Damages the file, or one or two of those in the folder; returns how."""
  files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
  told = []
  for file in rng.sample(files, min(len(files), rng.choice([1, 1, 1, 2]))):
    kinds = [_bytes, _bytes, _bytes, _whole, _place]
    inner = {".json": [_json], ".jsonl": [_json_lines], ".npz": [_array, _member, _header], ".npy": [_header]}
    kinds += 5 * inner.get(file.suffix, [])
    kind = rng.choice(kinds)
    told.append(f"{file.name}: {kind(rng, file)}")
  return ", ".join(told)


def _bytes(rng: random.Random, file: pathlib.Path) -> str:
  content = bytearray(file.read_bytes())
  for _ in range(rng.choice([1, 1, 2, 8])):
    if not content:
      break
    # Files begin with what matters, and many are mostly zeros.
    places = [i for i in range(min(len(content), 400))] + [i for i in range(0, len(content), 7) if content[i]]
    at, size = rng.choice(places), rng.choice([1, 1, 2, 4, 8, 30])
    match rng.randrange(6):
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
  file.write_bytes(content)
  return "bytes"


def _whole(rng: random.Random, file: pathlib.Path) -> str:
  content = rng.choice(CONTENTS)
  file.write_bytes(content)
  return f"content {content[:20]!r}"


def _place(rng: random.Random, file: pathlib.Path) -> str:
  file.unlink()
  kind = rng.choice(["missing", "pipe", "loop", "device", "folder", "dangling", "sparse", "up"])
  if kind == "pipe":
    os.mkfifo(file)
  elif kind == "folder":
    file.mkdir()
  elif kind == "sparse":
    with file.open("wb") as stream:
      stream.truncate(2**40)
  elif kind != "missing":
    file.symlink_to({"loop": file.name, "device": "/dev/zero", "dangling": "nowhere", "up": ".."}[kind])
  return kind


def _change(rng: random.Random, value: Any) -> Any:
  """The value with one of those within it replaced, dropped or doubled."""
  if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.15:
      del value[key]
    else:
      value[key] = _change(rng, value[key])
    return value
  return rng.choice(VALUES)


def _json(rng: random.Random, file: pathlib.Path) -> str:
  value = _change(rng, json.loads(file.read_text()))
  file.write_text(json.dumps(value))
  return f"JSON {json.dumps(value)[:300]}"


def _json_lines(rng: random.Random, file: pathlib.Path) -> str:
  lines = file.read_text().split("\n")
  row = rng.randrange(len(lines))
  lines[row] = json.dumps(_change(rng, json.loads(lines[row])))
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


def _header(rng: random.Random, file: pathlib.Path) -> str:
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


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes `target` a copy of the folder `source`, whatever was there."""
  shutil.rmtree(target, ignore_errors=True)
  shutil.copytree(source, target)
