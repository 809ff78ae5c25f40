"""Programs of torch.jit.save and old files of torch.save: their tensors to the bit, and nothing of theirs runs."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from pflow_jax.torch_io import pickled
from pflow_jax.torch_io.tensors import open_tensors
from tests.torch_io.test_tensors import TENSORS, Code, as_numpy, assert_holds

BASE = torch.arange(12.0).reshape(3, 4)
VIEWS = {"turned": BASE.T, "rows": BASE[1:], "one": BASE[1, 2], "none": torch.zeros(0, 3), "double": BASE.double()}
STORED = {name.replace(".", "_"): tensor for name, tensor in TENSORS.items() if tensor.dtype != torch.float8_e4m3fn}


class Part(torch.nn.Module):
  def __init__(self, tensors):
    super().__init__()
    for name, tensor in tensors.items():
      self.register_buffer(f"t_{name}", tensor)
    self.weight = torch.nn.Parameter(BASE.clone())
    self.sizes, self.name, self.scale = [1, 2], "x", 0.5

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x * self.weight * self.scale


class Whole(torch.nn.Module):
  def __init__(self, tensors):
    super().__init__()
    self.layers = torch.nn.Sequential(Part(tensors), torch.nn.Linear(4, 2))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.layers(x)


@pytest.fixture
def program(tmp_path):
  module = Whole(STORED | VIEWS)
  torch.jit.script(module).save(str(tmp_path / "program.pt"))
  return tmp_path / "program.pt", module.state_dict()


@pytest.fixture
def old(tmp_path):
  state = STORED | VIEWS | {"same": STORED["half"], "parameter": torch.nn.Parameter(BASE)}
  torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
  return tmp_path / "old.pth", state


def never(*_, **__):
  raise AssertionError("PyTorch loads it")


def assert_read(path, state, monkeypatch):
  monkeypatch.setattr(torch, "load", never)
  monkeypatch.setattr(torch.jit, "load", never)
  tensors = open_tensors(path)
  assert_holds(tensors, {name: tensor.detach() for name, tensor in state.items()})
  turned = next(name for name in state if name.endswith("turned"))
  np.testing.assert_array_equal(tensors.read(turned, slice(1, 3)), as_numpy(BASE.T)[1:3])


def test_tensors_of_a_program_are_read_exactly(program, monkeypatch):
  assert_read(*program, monkeypatch)


def test_old_files_are_read_exactly(old, monkeypatch):
  assert_read(*old, monkeypatch)


def test_a_state_dict_within_an_old_file_is_chosen_by_its_key(tmp_path):
  path = tmp_path / "two.pt"
  torch.save({"net": {"a": BASE}, "ema": {"a": BASE + 1}}, path, _use_new_zipfile_serialization=False)
  np.testing.assert_array_equal(open_tensors(path, "net").read("a"), BASE)
  np.testing.assert_array_equal(open_tensors(path).read("a"), BASE + 1)
  with pytest.raises(ValueError, match=r"--key for one of .*\['ema', 'net'\]"):
    open_tensors(path, "nets")


def test_code_in_an_old_file_is_refused_and_does_not_run(tmp_path):
  state = {"a": BASE, "b": Code(tmp_path / "ran")}
  torch.save(state, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
  with pytest.raises(ValueError, match=r"a call of posix\.mkdir.*was not loaded"):
    open_tensors(tmp_path / "bad.pth")
  assert not (tmp_path / "ran").exists()


def rewritten(path, change):
  """An archive whose entries {name without the folder: bytes} were changed."""
  with zipfile.ZipFile(path) as archive:
    entries = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
  change(entries)
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in entries.items():
      archive.writestr(f"program/{name}", content)


def test_a_programs_pickle_does_not_run_either(program, tmp_path):
  path, _ = program
  code = pickle.dumps(Code(tmp_path / "ran"), protocol=2)
  rewritten(path, lambda entries: entries.update({"data.pkl": code}))
  with pytest.raises(ValueError, match="expected tensors, as a program"):
    open_tensors(path)
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda e: e.update({"data/0": e["data/0"][:-4]}), "missing or cut short"),
    (lambda e: e.pop("data/0"), "missing or cut short"),
    (lambda e: e.update({"data.pkl": e["data.pkl"][:-9]}), "pickle"),
    (lambda e: e.update({"data.pkl": e["data.pkl"].replace(b"FloatStorage", b"FloatXtorage")}), "FloatXtorage"),
    (lambda e: e.update({"data.pkl": b"\x80\x02]."}), "expected tensors"),
    (lambda e: e.update({"byteorder": b"big"}), "lowest byte is first"),
    (lambda e: e.pop("data.pkl"), r"one data\.pkl"),
  ],
  ids=["short", "missing", "half a pickle", "dtype", "a list", "order", "no pickle"],
)
def test_damaged_programs_are_refused(program, change, message):
  rewritten(program[0], change)
  with pytest.raises(ValueError, match=message):
    open_tensors(program[0])


def test_a_program_with_compressed_tensors_is_refused(program):
  path = program[0]
  with zipfile.ZipFile(path) as archive:
    entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for entry in entries:
      archive.writestr(*entry)
  with pytest.raises(ValueError, match="without compression"):
    open_tensors(path)


def test_a_tensor_beyond_its_storage_is_refused(program, monkeypatch):
  """Though the file has as many bytes."""
  own = pickled.unloaded._view
  monkeypatch.setattr(pickled.unloaded, "_view", lambda storage, offset, *rest: own(storage, offset + 1, *rest))
  with pytest.raises(ValueError, match="cannot be in a file"):
    open_tensors(program[0])


@pytest.mark.parametrize("length", [0, 10, 15, 40, 200, -60, -4, -1])
def test_old_files_that_are_cut_short_are_refused(old, length):
  path, _ = old
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(ValueError, match=r"old\.pth"):
    open_tensors(path)


def test_old_files_whose_sizes_disagree_are_refused(old):
  path, _ = old
  content = path.read_bytes()
  path.write_bytes(content.replace(struct.pack("<q", 12) + BASE.numpy().tobytes(), struct.pack("<q", 11)))
  with pytest.raises(ValueError, match="another size than its tensors"):
    open_tensors(path)


@pytest.mark.parametrize("nested", [b"\x85" * 350_000, b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))])
def test_keys_of_storages_that_have_no_end_are_refused(tmp_path, nested):
  """The hash of such a key would end the process, or never end."""
  system = pickle.dumps({"little_endian": True}, 2)
  head = pickled.unloaded.MAGIC_PICKLE + pickle.dumps(1001, 2) + system + pickle.dumps({}, 2)
  path = tmp_path / "old.pth"
  path.write_bytes(head + b"\x80\x02]N" + nested + b"a." + bytes(8))
  with pytest.raises(ValueError, match=r"old\.pth.*has another size than its tensors"):
    open_tensors(path)
  path.write_bytes(head[: -len(pickle.dumps({}, 2))] + b"\x80\x02}N" + nested + b"Ns.")
  with pytest.raises(ValueError, match=r"old\.pth.*as a key of a dict, got a tuple"):
    open_tensors(path)


def test_long_names_are_refused_before_they_are_put_together(program):
  """Each of a program's modules is within the one before; names of all would take the square of its bytes."""
  name = b"X\x64\x00\x00\x00" + b"a" * 100
  deep = b"".join(b"c__torch__\nM\n)\x81}" + name for _ in range(1000)) + b"N" + b"sb" * 1000
  rewritten(program[0], lambda entries: entries.update({"data.pkl": b"\x80\x02" + deep + b"."}))
  with pytest.raises(ValueError, match=r"program\.pt.*expected names of tensors of at most 400 characters"):
    open_tensors(program[0])
