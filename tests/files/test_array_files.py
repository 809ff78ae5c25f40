"""NumPy's files: what is read, and that nothing is allocated or unpickled on a file's word."""

import io
import struct
import zipfile

import numpy as np
import pytest

from pflow_jax.files import array_files
from pflow_jax.files.array_files import Npz, read_npy, read_npz

X0 = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "a.npz"


def npy(array=X0, **header):
  """The bytes of an .npy file whose header says something else."""
  fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
  text = repr(fields).encode() + b"\n"
  return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + array.tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("array", [X0, np.asfortranarray(X0), X0.astype(">f8"), np.array(["a", "猫"]), np.array(3)])
def test_arrays_come_back(path, save, array):
  save(path, a=array, b=np.zeros(0))
  got = read_npz(path, ["a"], ["b", "c"])
  assert got.keys() == {"a", "b"}
  np.testing.assert_array_equal(got["a"], array)
  assert (got["a"].dtype, got["a"].flags.writeable) == (array.dtype, True)
  assert read_npz(path.read_bytes(), ["a"], ["b"])["a"].tobytes() == array.tobytes()
  np.save(path.with_suffix(".npy"), array)
  np.testing.assert_array_equal(read_npy(path.with_suffix(".npy")), array)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (npy(shape=(10**11,)), r"says it is int16 of shape \(100000000000,\), for which there are 48 bytes"),
    (npy(shape=(2**40, 2**40, 2**40)), "for which there are 48 bytes"),
    (npy(shape=(2, 3)), "for which there are 48 bytes"),
    (npy(shape=(-2, -12)), "for which there are 48 bytes"),
    (npy(shape=(-24,)), "says it is int16"),
    (npy(shape=24), "cannot be read: shape is not valid"),
    (npy(descr="|O"), "an array of 'object', expected numbers or strings"),
    (npy(descr="<U0", shape=(10**12,)), "expected numbers or strings"),
    (npy(descr="<f4,<f4"), "expected numbers or strings"),
    (npy(descr="<M8[s]", shape=(6,)), "expected numbers or strings"),
    (npy(descr="nonsense"), "cannot be read: descr is not a valid dtype"),
    (npy(descr=("<f4", (10**9,))), "cannot be read"),
    (npy()[:-1], "for which there are 47 bytes"),
    (npy() + b"\0", "for which there are 49 bytes"),
    (npy()[:6] + b"\3" + npy()[7:], r"of NumPy's format \(3, 0\), expected \(1, 0\)"),
    (npy()[:30], "cannot be read"),
    (b"", "cannot be read"),
    (b"(" * 5000, "cannot be read"),
  ],
)
def test_headers_that_say_something_else_are_refused(path, content, message):
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read_npy(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", content)
  with pytest.raises(ValueError, match=message):
    read_npz(path, ["a"])


def test_nothing_is_unpickled(path):
  class Hostile:
    def __reduce__(self):
      return exec, ("raise SystemError('unpickled')",)

  np.save(path.with_suffix(".npy"), np.array([Hostile()], dtype=object))
  np.savez(path, a=np.array([Hostile()], dtype=object))
  for read in (lambda: read_npy(path.with_suffix(".npy")), lambda: read_npz(path, ["a"])):
    with pytest.raises(ValueError, match="'object', expected numbers or strings"):
      read()


def forged(path, size):
  """A zip of one array that says it has `size` bytes, in the array's header and in both of the zip's."""
  header = npy(np.zeros(0, np.uint8), shape=(size,))
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a.npy", header + b"\0" * 1000)
    length = archive.infolist()[0].file_size
  content = path.read_bytes()
  path.write_bytes(content.replace(struct.pack("<I", length), struct.pack("<I", len(header) + size)))


def test_a_small_file_that_says_it_is_large_costs_no_memory(path, monkeypatch):
  forged(path, 2**31)
  assert path.stat().st_size < 400
  allocated = []
  monkeypatch.setattr(array_files, "bytearray", lambda n: allocated.append(n) or bytearray(n), raising=False)
  with pytest.raises(ValueError, match="a says it has 2 GiB, which [0-9]+ bytes cannot hold"):
    read_npz(path, ["a"])
  assert not allocated
  monkeypatch.setattr("pflow_jax.files.foreign.machine_memory", lambda: 2**20)
  np.savez_compressed(path, a=np.zeros(2**20, np.uint8))  # which is there, but for the memory
  with pytest.raises(ValueError, match="what it says it holds: takes 2 MiB of memory, this machine has 1 MiB"):
    read_npz(path, ["a"])
  assert not allocated


def test_zips_that_are_something_else_are_refused(path):
  def refused(message, required=("a",)):
    with pytest.raises(ValueError, match=message) as caught:
      read_npz(path, required)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)

  refused("there is no such file")
  path.write_bytes(b"PK no zip")
  refused("cannot be read: File is not a zip file")
  np.savez(path, a=X0)
  refused("expected the arrays b, got \\['a'\\]", required=["b"])
  content = bytearray(path.read_bytes())
  content[content.index(X0.tobytes()) + 5] ^= 1
  path.write_bytes(content)
  refused("Bad CRC-32")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", npy())
    archive.writestr("a", npy())
  refused("expected names of arrays that differ, got")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("../a.npy", npy())
  refused("expected the arrays a, got \\['../a'\\]")
  buffer = io.BytesIO()
  np.savez(buffer, a=X0)
  path.write_bytes(buffer.getvalue()[:-30])
  refused("cannot be read")
  with pytest.raises(ValueError, match="the samples of a teacher cannot be read: File is not a zip file"):
    read_npz(path.read_bytes(), ["a"], name="the samples of a teacher")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_one_by_one_and_in_parts(path, save):
  images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
  save(path, arr_0=images, mu=np.arange(3.0), none=np.zeros((0, 2)))
  with Npz(path) as file:
    assert file.members.keys() == {"arr_0", "mu", "none"}
    assert file.shape("arr_0") == images.shape
    np.testing.assert_array_equal(file.read(["mu"])["mu"], np.arange(3.0))
    parts = list(file.rows("arr_0", 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), images)
    assert list(file.rows("none", 4)) == []


def test_a_part_is_all_that_is_in_memory(path, monkeypatch):
  np.savez_compressed(path, arr_0=np.zeros((2**10, 2**10), np.uint8))
  monkeypatch.setattr("pflow_jax.files.foreign.machine_memory", lambda: 2**18)
  with Npz(path) as file:
    assert sum(len(part) for part in file.rows("arr_0", 16)) == 2**10
    with pytest.raises(ValueError, match="256 rows of arr_0: takes 512 KiB of memory, this machine has 256 KiB"):
      next(file.rows("arr_0", 256))


def test_parts_of_damaged_arrays_are_refused(path):
  np.savez(path, a=np.arange(100, dtype=np.uint8).reshape(10, 10), b=np.asfortranarray(X0), c=np.array(3))
  content = path.read_bytes()
  path.write_bytes(content.replace(bytes(range(90, 100)), bytes(10)))
  with Npz(path) as file:
    with pytest.raises(ValueError, match="a.npz cannot be read: Bad CRC-32"):
      list(file.rows("a", 3))
    for name in "bc":
      with pytest.raises(ValueError, match=f"expected {name} as rows one after another"):
        next(file.rows(name, 3))
  path.write_bytes(content)
  with Npz(path) as file:
    parts = file.rows("a", 3)
    next(parts)
    with pytest.raises(RuntimeError, match="the caller's"):  # which is not said to be the file's
      parts.throw(RuntimeError("the caller's"))


def test_a_file_may_be_its_bytes():
  np.testing.assert_array_equal(read_npy(npy()), X0)
  with pytest.raises(ValueError, match="a record cannot be read: it says it is int16"):
    read_npy(npy()[:-1], name="a record")
