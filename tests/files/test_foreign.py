"""The entrance for foreign bytes: what is refused, and in which words."""

import dataclasses
import errno
import json
import os
import pathlib
import socket
import struct
import zlib
from typing import Annotated, Any

import pytest
from annotated_types import Ge
from ml_collections import ConfigDict
from PIL import Image

from pflow_jax.commands import command
from pflow_jax.files import checksums, foreign
from pflow_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class Info:
  shape: tuple[Annotated[int, Ge(1)], ...]
  num_classes: Annotated[int, Ge(0)] = 0


def test_json_of_the_right_types_is_read(tmp_path):
  path = tmp_path / "info.json"
  path.write_text('\ufeff{"shape": [4, 4, 3], "num_classes": 2, "more": null}', encoding="utf-8")
  assert foreign.read_json(path, Info) == Info((4, 4, 3), 2)
  assert foreign.read_json(path) == {"shape": [4, 4, 3], "num_classes": 2, "more": None}


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "cannot be read as JSON"),
    (b"{", "cannot be read as JSON"),
    (b"\xff\xfe{", "cannot be read as JSON"),
    (b"[" * 100_000, "cannot be read as JSON"),
    (b'{"shape": [1], "num_classes": 1' + b"0" * 5000 + b"}", "cannot be read as JSON"),
    (b'{"shape": [1], "scale": 1' + b"0" * 400 + b"}", "expected a finite number, got '1000"),
    (b'{"shape": [1], "num_classes": NaN}', "expected a finite number, got 'NaN'"),
    (b'{"shape": [1], "num_classes": 1e400}', "expected a finite number, got '1e400'"),
    (b'{"shape": [1], "num_classes": "\\ud800"}', "invalid JSON"),
    (b"null", "got None"),
    (b"[1, 2]", r"got \[1, 2\]"),
    (b"{}", "shape: field required"),
    (b'{"shape": 4}', "shape: input should be a valid .*, got 4"),
    (b'{"shape": [true]}', "shape.0: input should be a valid integer, got True"),
    (b'{"shape": [1], "num_classes": "2"}', "num_classes: input should be a valid integer, got '2'"),
    (b'{"shape": [1, 0], "num_classes": 2.5}', "shape.1: .* got 0; num_classes: .* got 2.5"),
  ],
)
def test_json_that_does_not_fit_is_told_in_one_sentence(data, message):
  with pytest.raises(ValueError, match=message) as caught:
    foreign.parse_json(data, Info, where="info.json")
  assert str(caught.value).startswith("info.json: ")
  assert len(str(caught.value)) < 600
  assert "\n" not in str(caught.value)


def test_what_was_raised_is_told_in_printable_letters():
  assert foreign._reason(ValueError("a\n b\x00\x1b[2J é")) == "a b\\x00\\x1b[2J é"


def test_values_read_otherwise_are_checked_alike():
  assert foreign.check_type({"a": [1]}, dict[str, list[int]], where="x") == {"a": [1]}
  with pytest.raises(ValueError, match=r"x: a\.0: .* got '1'"):
    foreign.check_type({"a": ["1"]}, dict[str, list[int]], where="x")
  deep: Any = []
  for _ in range(100_000):
    deep = [deep]
  with pytest.raises(ValueError, match="x: "):
    foreign.check_type(deep, int, where="x")


def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "link").symlink_to("file")
  with socket.socket(socket.AF_UNIX) as server:
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    server.bind("socket")
  cases = {
    "pipe": "pipe",
    "socket": "socket",
    "loop": "links",
    "missing": "no such file",
    "": "folder",
    "x" * 999: "long",
  }
  for name, message in (cases | {"/dev/zero": "device", "a\0b": "embedded null", "x" * 999: "long"}).items():
    with pytest.raises(ValueError, match=message):
      foreign.read_bytes(tmp_path / name, 10)
  (tmp_path / "file").write_bytes(b"12345")
  assert foreign.read_bytes(tmp_path / "link", 5) == b"12345"
  with pytest.raises(ValueError, match="expected at most 4 bytes, got 5 bytes"):
    foreign.read_bytes(tmp_path / "link", 4)
  (tmp_path / "file").write_bytes(b"\xff")
  with pytest.raises(ValueError, match="UTF-8"):
    foreign.read_text(tmp_path / "file", 10)


def test_images_are_told_by_their_bytes_and_only_known_formats_are_decoded(tmp_path):
  Image.new("RGB", (2, 3), "red").save(tmp_path / "x.dat", "PNG")
  with foreign.open_image(tmp_path / "x.dat") as image:
    assert image.convert("RGB").getpixel((1, 2)) == (255, 0, 0)
  broken = (tmp_path / "x.dat").read_bytes()[:40]
  hostile = {
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "broken.png": broken,
    "empty.png": b"",
    "huge.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
  }
  for name, data in hostile.items():
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name), foreign.open_image(tmp_path / name) as image:
      image.load()


def test_images_may_be_bytes_and_have_a_limit(tmp_path, monkeypatch):
  Image.new("RGB", (2, 3), "red").save(tmp_path / "x.png")
  data = (tmp_path / "x.png").read_bytes()
  with foreign.open_image(data, "record 3") as image:
    assert image.size == (2, 3)
  with pytest.raises(ValueError, match="cannot read the image record 3: "), foreign.open_image(b"%!PS", "record 3"):
    pass
  monkeypatch.setattr(foreign, "MAX_IMAGE_FILE", 10)
  with pytest.raises(ValueError, match="cannot read the image .*expected at most 10 bytes, got"):
    foreign.open_image(tmp_path / "x.png").__enter__()


@pytest.mark.parametrize("pixels", [100, 150])  # up to twice its limit Pillow only warns
def test_images_with_more_pixels_than_are_harmless_are_refused(tmp_path, monkeypatch, pixels):
  Image.new("L", (10, pixels // 10)).save(tmp_path / "x.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
  with pytest.raises(ValueError, match="cannot read the image .*expected at most 99 pixels"):
    foreign.open_image(tmp_path / "x.png").__enter__()


def test_what_is_no_folder_is_refused(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "link").symlink_to(".")
  (tmp_path / "loop").symlink_to("loop")
  assert foreign.real_folder(tmp_path / "link") == tmp_path / "link"
  assert foreign.is_there(tmp_path / "file")
  assert not foreign.is_there(tmp_path / "file" / "below")
  assert not foreign.is_there(tmp_path / "none")
  with pytest.raises(ValueError, match="none: there is no such folder"):
    foreign.real_folder(tmp_path / "none")
  with pytest.raises(ValueError, match="expected a folder, this is a file"):
    foreign.real_folder(tmp_path / "file")
  for name in ("loop", "x" * 999, "a\0b"):
    with pytest.raises(ValueError, match="cannot be looked at"):
      foreign.is_there(tmp_path / name)


def test_what_decoders_raise_is_a_sentence_and_what_disks_raise_is_not():
  for error in (
    KeyError("x"),
    EOFError(),
    zlib.error("bad"),
    OSError("cut"),
    OSError(errno.EINVAL, "seek"),
  ):
    with pytest.raises(ValueError, match="a.npz: "), foreign.decoding("a.npz"):
      raise error
  with pytest.raises(ValueError, match=r"^a.npz: two lines$"), foreign.decoding("a.npz"):
    raise RuntimeError("two\n lines")
  for error in PASSING:
    with pytest.raises(type(error)) as raised, foreign.decoding("a.npz"):
      raise error
    assert raised.value is error


PASSING = [
  *(OSError(number, "?") for number in (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)),
  *(ConnectionResetError("by peer"), TimeoutError(), MemoryError(), RuntimeError("can't start new thread")),
]


def test_what_a_disk_raises_while_it_is_read_is_worth_another_try(tmp_path, monkeypatch):
  """Of a run that is resumed: no mistake, no damage, and code 1."""
  (tmp_path / workdir.CONFIG).write_text("{}")
  (tmp_path / "checkpoint" / "state").mkdir(parents=True)
  (tmp_path / "checkpoint" / "state" / "file").write_text("x")
  (tmp_path / "checkpoint" / checksums.CHECKSUMS).write_text(json.dumps(checksums.checksums(tmp_path / "checkpoint")))
  assert checksums.damage(tmp_path / "checkpoint") is None

  def fail(*_, **__):
    raise OSError(errno.ESTALE, "Stale file handle")

  monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
  monkeypatch.setattr(checksums, "checksum", fail)
  reads = [
    lambda: foreign.read_bytes(tmp_path / workdir.CONFIG, 100),
    lambda: workdir.load_config(tmp_path),
    lambda: checksums.damage(tmp_path / "checkpoint"),
  ]
  for read in reads:
    with pytest.raises(OSError, match="Stale"):
      read()
  monkeypatch.setattr(pathlib.Path, "read_bytes", pathlib.Path.read_text)
  with pytest.raises(OSError, match="Stale"):  # where the checksums can be read, and a file cannot
    reads[2]()
  for error, code in [*((error, 1) for error in PASSING), (OSError(errno.EACCES, "?"), 2), (ValueError("x"), 2)]:
    with pytest.raises(SystemExit) as ended, command.one_sentence():
      raise error
    assert ended.value.code == code, repr(error)


def test_sizes_are_bounded_by_the_machine():
  assert 2**30 < foreign.machine_memory() < 2**50
  foreign.check_memory("--num 1", foreign.machine_memory())
  with pytest.raises(ValueError, match=r"--num 9: takes 8\.674e\+17 EiB of memory, .* has .*iB; ask for less"):
    foreign.check_memory("--num 9", 10**36, "ask for less")


def test_sizes_are_bounded_by_a_device_too():
  foreign.check_memory("a batch", 100, have=100)
  with pytest.raises(ValueError, match="a batch: takes 101 bytes of memory, a device has 100 bytes$"):
    foreign.check_memory("a batch", 101, have=100)


def test_arguments_have_the_types_of_their_annotations():
  def function(count: int, *, sizes: tuple[int, ...] = (), seed: int = 0, anything=None):
    pass

  values = {"count": 2, "sizes": [1, 2], "seed": 2**32 - 1, "anything": ["x"], "other": 1.5}
  checked = foreign.check_arguments(function, values, where="data")
  assert checked == values | {"sizes": (1, 2), "anything": ("x",)}
  for key, value, message in (
    ("count", 2.0, r"data\.count: input should be a valid integer, got 2\.0"),
    ("sizes", [1, [2]], r"data\.sizes: 1: input should be a valid integer"),
    ("sizes", [1, 2**31], r"data\.sizes: expected a whole number below 2\^31, got 2147483648"),
    ("anything", [[float("inf")]], r"data\.anything: expected a finite number, got inf"),
    ("sizes", "(1, 2", r"data\.sizes: .*; on the shell quote a tuple"),
  ):
    with pytest.raises(ValueError, match=message):
      foreign.check_arguments(function, values | {key: value}, where="data")


def test_foreign_values_are_shown_escaped_and_short():
  assert "\n" not in foreign.shown(ConfigDict({"kind": "dit", "width": 3}))
  assert foreign.shown("\x1b[2J\n\u202e") == r"'\x1b[2J\n\u202e'"
  assert len(foreign.shown("x" * 10**6)) == 60
  assert len(foreign.shown(10**5000)) < 60
