"""Images in tar archives: WebDataset's records, read where they lie."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data
from tests.data.adm_pictures import encoded, pixels


def write_tar(path, members):
  """Writes an archive of {name: bytes}."""
  with tarfile.open(path, "w") as tar:
    for name, content in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return str(path)


def picture(number, size=(9, 12)):
  return encoded(Image.new("RGB", size, (number, 100, 200)))


@pytest.fixture
def tars(tmp_path):
  """Two archives of three records, class i % 3, with other files beside."""
  for shard in (0, 1):
    records = range(3 * shard, 3 * shard + 3)
    members = {f"{i:06d}.png": picture(i) for i in records}
    members |= {f"{i:06d}.cls": str(i % 3).encode() for i in records}
    members |= {f"{i:06d}.json": b"{}" for i in records} | {f"._{i}.png": b"left by another system" for i in records}
    write_tar(tmp_path / f"train-{shard:04d}.tar", dict(sorted(members.items())))
  return tmp_path


@pytest.mark.parametrize("pattern", ["", "/train-*.tar", "/train-{0000..0001}.tar"])
def test_records_are_pictures_with_the_class_beside_them(tars, pattern):
  dataset = data.load(f"webdataset:{tars}{pattern}", image_size=4)
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((4, 4, 3), 3, 6)
  source = pickle.loads(pickle.dumps(dataset.records.source))
  for row in range(6):
    got, label = source.read(row)
    assert (got[0, 0].tolist(), label) == ([row, 100, 200], row % 3)
    assert source.key(row) == f"train-{row // 3:04d}.tar/{row:06d}"
  assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
  assert next(data.batches(dataset, 4, seed=0))["x0"].dtype == "float32"
  one = data.load(f"webdataset:{tars}/train-0001.tar", image_size=4, num_classes=10)
  assert (one.num_records, one.num_classes) == (3, 10)


def test_the_crop_of_adm(tmp_path, golden):
  write_tar(tmp_path / "a.tar", {"a.png": encoded(Image.fromarray(pixels(53, 37)))})
  dataset = data.load(f"webdataset:{tmp_path}", image_size=16, crop="adm")
  np.testing.assert_array_equal(dataset.records.source.read(0)[0], golden("adm_center_crop")["wide"])


def test_folders_in_an_archive_are_classes(tmp_path):
  write_tar(tmp_path / "a.tar", {f"{name}/{i}.jpg": picture(i) for i in (0, 1) for name in ("./dog", "./cat")})
  dataset = data.load(f"webdataset:{tmp_path}", image_size=4)
  assert dataset.class_names == ("cat", "dog")
  assert [dataset.records.source.label(row) for row in range(4)] == [1, 0, 1, 0]
  write_tar(tmp_path / "a.tar", {"1.png": picture(1)})
  assert data.load(f"webdataset:{tmp_path}", image_size=4).num_classes == 0


def test_images_of_one_name_have_keys_of_their_own_and_copies_have_a_name_in_common(tmp_path):
  for name, content in dict(a=picture(1), b=encoded(Image.fromarray(pixels(20, 20))), c=picture(1)).items():
    (tmp_path / name).mkdir()
    write_tar(tmp_path / name / "0.tar", {"0.png": content})
  source = data.load(f"webdataset:{tmp_path}/*/0.tar", image_size=4).records.source
  assert [source.key(row) for row in range(3)] == ["a/0.tar/0", "b/0.tar/0", "c/0.tar/0"]
  assert source.common_name(0) == source.common_name(2) != source.common_name(1)
  assert source.content(0) == source.content(2) != source.content(1)


def test_a_name_with_several_dots_is_an_image_of_its_own_unless_its_record_has_one(tmp_path):
  """WebDataset's name of a record ends at the first dot, and its other files have any ending."""
  members = {"p0.v2.png": picture(1), "p1.png": picture(2), "a.b/x.1.PNG": picture(3), "._p.v.png": b"no image"}
  source = data.load(f"webdataset:{write_tar(tmp_path / 'a.tar', members)}", image_size=4).records.source
  assert source.records == ["p0.v2", "p1", "a.b/x.1"]
  members |= {"p0.v2.cls": b"4", "p1.cls": b"2", "a.b/x.1.cls": b"0"}
  members |= {"p1.mask.png": picture(4), "p2.cls": b"1", "p2.depth.png": picture(5)}
  with pytest.warns(
    UserWarning, match=r"2 images, such as 'p1\.mask of .*a\.tar', belong to the record before their first"
  ):
    source = data.load(f"webdataset:{write_tar(tmp_path / 'a.tar', members)}", image_size=4).records.source
  assert (source.records, source.labels.tolist()) == (["p0.v2", "p1", "a.b/x.1"], [4, 2, 0])


def test_members_that_are_no_files_are_not_followed(tmp_path):
  path = tmp_path / "a.tar"
  with tarfile.open(path, "w") as tar:
    for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.FIFOTYPE, "pipe.png")):
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, "/etc/passwd"
      tar.addfile(member)
    member = tarfile.TarInfo("../../outside.png")
    member.size = len(picture(1))
    tar.addfile(member, io.BytesIO(picture(1)))
  source = data.load(f"webdataset:{path}", image_size=4).records.source
  assert source.records == ["../../outside"]
  assert sorted(os.listdir(tmp_path)) == ["a.tar"], "nothing is unpacked"


def refused(path, message, **options):
  with pytest.raises(ValueError, match=message) as caught:
    data.load(f"webdataset:{path}", image_size=4, **options)
  assert "\n" not in str(caught.value)


def test_damaged_archives_are_named(tars):
  path = tars / "train-0000.tar"
  whole = path.read_bytes()
  for cut in (100, 700, 3 * 512, len(whole) - 9 * 1024):
    path.write_bytes(whole[:cut])
    refused(path, r"train-0000\.tar cannot be read as a tar archive: .*(cut short|unexpected end|truncated|empty)")
  path.write_bytes(whole[:2048] + b"\xff" * 512 + whole[2560:])  # a header in the middle
  refused(path, "it is damaged or cut short after")
  path.write_bytes(b"")
  refused(path, "cannot be read as a tar archive: empty file")
  long = tarfile.TarInfo("a" * 300)
  blocks = bytearray(long.tobuf(tarfile.GNU_FORMAT))
  blocks[124:136] = b"%011o\0" % 2**32  # says that its name has 4 GiB
  blocks[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(blocks[:512]))[0]
  path.write_bytes(bytes(blocks) + bytes(2**16))
  refused(path, "expected a header of at most 1 MiB, it says 4 GiB")


@pytest.mark.parametrize(
  ("members", "message"),
  [
    ({"a.txt": b"hello"}, "there are no images"),
    ({"a.png": b"", "a.cls": b"cat"}, "expected a number in 'a'.cls, got 'cat'"),
    ({"a.png": b"", "a.cls": b"1", "b.png": b""}, r"expected a \.cls file beside each of 2 images, got 1"),
    ({"a.png": b"", "a.jpg": b""}, "'a' has several images"),
    ({"a.png": b"", "a.cls": b"999999999"}, "expected 0 to 1,048,576 classes"),
  ],
)
def test_records_without_their_class_or_with_several_images_are_refused(tmp_path, members, message):
  refused(write_tar(tmp_path / "a.tar", members), message)


def test_other_refusals(tars):
  refused(tars, r"expected classes in \[0, 2\), got 0 to 2", num_classes=2)
  refused(tars, "expected split='train', got 'test'", split="test")
  one = write_tar(tars / "one.tar", {"dog/1.png": picture(1), "cat/1.png": picture(1)})
  none = "num_classes: expected 1000, got {} folders of images and no .cls files; leave it out, or give archives"
  refused(one, none.format(2), num_classes=1000)
  refused(write_tar(tars / "one.tar", {"1.png": picture(1)}), none.format(0), num_classes=1000)
  assert (
    data.load(f"webdataset:{write_tar(one, {'dog/1.png': picture(1)})}", image_size=4, num_classes=1).num_classes == 1
  )
  os.remove(one)
  refused(tars / "none-*.tar", "there are no files")
  refused(f"{tars}/train-{{0000..0002}}.tar", r"train-0002\.tar: there is no such file")
  refused(f"{tars}/train-{{0000..9999999}}.tar", "at most 1,000,000 files")
  with pytest.raises(ValueError, match="give image_size="):
    data.load(f"webdataset:{tars}")
  source = data.load(f"webdataset:{tars}", image_size=4).records.source
  path = tars / "train-0001.tar"
  path.write_bytes(path.read_bytes()[:600])
  with pytest.raises(ValueError, match=r"cannot read the image 000003 of .*train-0001\.tar"):
    source.read(3)
