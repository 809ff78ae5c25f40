"""References: files as others publish them, and those that are made of pictures."""

import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.evaluation import references
from pflow_jax.evaluation.metrics import Moments, frechet_distance, precision_recall
from pflow_jax.evaluation.references import Reference, load_reference, make_reference
from tests.evaluation.stub_network import StubNetwork

RNG = np.random.default_rng(0)
FEATURES = (RNG.normal(size=(40, 6)) @ RNG.normal(size=(6, 6)) + 2).astype(np.float32)
SPATIAL = RNG.normal(size=(40, 4))
MEAN, COV = FEATURES.astype(np.float64).mean(axis=0), np.cov(FEATURES.astype(np.float64), rowvar=False)
MEAN_S, COV_S = SPATIAL.mean(axis=0), np.cov(SPATIAL, rowvar=False)
IMAGES = RNG.integers(0, 256, (10, 8, 8, 3), np.uint8)


def check(moments, mean=MEAN, cov=COV, count=None, rtol=1e-12):
  np.testing.assert_allclose(moments.mean, mean, rtol=rtol)
  np.testing.assert_allclose(moments.cov, cov, rtol=0, atol=rtol * 100)
  assert moments.count == count
  assert moments.cov.dtype == np.float64


@pytest.fixture
def path(tmp_path):
  return tmp_path / "reference"


def test_adms_file_has_features_once_there_is_a_network(path, monkeypatch):
  monkeypatch.setattr(references, "PICTURES_AT_ONCE", 4)
  path = path.with_suffix(".npz")
  np.savez(path, mu=MEAN, sigma=COV, mu_s=MEAN_S, sigma_s=COV_S, arr_0=IMAGES, arr_1=np.arange(10))
  alone = load_reference(path)
  check(alone.pool)
  check(alone.spatial, MEAN_S, COV_S)
  assert (alone.features, alone.num_images, alone.network) == (None, None, "")
  network = StubNetwork()
  reference = load_reference(path, network)
  check(reference.pool)
  np.testing.assert_allclose(reference.features, StubNetwork()(IMAGES).pool, rtol=1e-5)
  assert network.most == 4, "a part at a time"
  # Moments of a whole training set are taken with few samples, unlike features of few.
  assert frechet_distance(FEATURES, reference.pool) < 1e-9
  assert precision_recall(reference.features, reference.features, 3) == (1, 1)


def test_a_file_of_images_alone_is_a_reference_by_its_network(path):
  path = path.with_suffix(".npz")
  np.savez_compressed(path, IMAGES)
  with pytest.raises(ValueError, match="holds images and no moments; give the feature network"):
    load_reference(path)
  made = load_reference(path, StubNetwork())
  features = StubNetwork()(IMAGES)
  check(made.pool, features.pool.mean(axis=0), np.cov(features.pool, rowvar=False), 10, rtol=1e-5)
  check(made.spatial, features.spatial.mean(axis=0), np.cov(features.spatial, rowvar=False), 10, rtol=1e-5)
  assert made.features.shape == (10, 6)
  np.savez(path, IMAGES.astype(np.float32))
  with pytest.raises(ValueError, match="expected images of uint8 as arr_0, got float32"):
    load_reference(path, StubNetwork())
  np.savez(path, IMAGES[0])
  with pytest.raises(ValueError, match=r"expected images \(N, H, W, 3\) as arr_0, got \(8, 8, 3\)"):
    load_reference(path, StubNetwork())


def test_files_of_pytorch_fid_and_of_programs_in_jax(path):
  np.savez(path.with_suffix(".npz"), mu=MEAN.astype(np.float32), sigma=COV.astype(np.float32))
  check(load_reference(path.with_suffix(".npz"), StubNetwork()).pool, rtol=1e-6)
  np.savez(path.with_suffix(".npz"), ref_mu=MEAN, ref_sigma=COV)
  check(load_reference(path.with_suffix(".npz")).pool)


def test_lakonlabs_pickle(path):
  path.write_bytes(pickle.dumps(dict(mean=MEAN, cov=COV, real_feats_np=FEATURES, num_real_feeded=40)))
  reference = load_reference(path, StubNetwork())
  check(reference.pool, count=40)
  np.testing.assert_array_equal(reference.features, FEATURES)
  assert reference.num_images == 40


def test_edm2s_pickle_has_several_metrics(path, monkeypatch):
  util = types.ModuleType("dnnlib.util")
  util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
  monkeypatch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
  monkeypatch.setitem(sys.modules, "dnnlib.util", util)
  content = dict(num_images=40, fid=dict(mu=MEAN, sigma=COV), fd_dinov2=util.EasyDict(mean=MEAN_S, cov=COV_S))
  path.write_bytes(pickle.dumps(content))
  monkeypatch.delitem(sys.modules, "dnnlib.util")
  check(load_reference(path).pool, count=40)
  check(load_reference(path, metric="fd_dinov2").pool, MEAN_S, COV_S, 40)
  with pytest.raises(ValueError, match=r"expected a metric of \['fd_dinov2', 'fid'\], got 'kid'"):
    load_reference(path, metric="kid")


def test_stylegans_sums(path):
  wide = FEATURES.astype(np.float64)
  content = dict(capture_all=True, capture_mean_cov=True, max_items=None, num_items=40, num_features=6)
  content |= dict(all_features=[FEATURES[:30], FEATURES[30:]], raw_mean=wide.sum(axis=0), raw_cov=wide.T @ wide)
  path.write_bytes(pickle.dumps(content))
  reference = load_reference(path)
  check(reference.pool, count=40)
  np.testing.assert_array_equal(reference.features, FEATURES)
  path.write_bytes(pickle.dumps(content | {"all_features": []}))
  assert load_reference(path).features is None
  for change, message in {
    "raw_mean": (None, r"expected raw_mean \(F,\) and raw_cov \(F, F\) of float64, got object"),
    "num_items": (1, "expected num_items, at least 2, got 1"),
    "all_features": ([FEATURES[:, :5]], r"expected features \(M, 6\) of floating numbers, got float32 \(40, 5\)"),
  }.items():
    path.write_bytes(pickle.dumps(content | {change: message[0]}))
    with pytest.raises(ValueError, match=message[1]):
      load_reference(path)


GOOD = dict(mu=MEAN, sigma=COV, mu_s=MEAN_S, sigma_s=COV_S)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (GOOD | {"mu": MEAN[:5]}, r"mu and sigma: expected a mean \(F,\) and a covariance \(F, F\)"),
    (GOOD | {"sigma": COV + np.eye(6, k=1)}, "mu and sigma: the covariance is not symmetric"),
    (GOOD | {"sigma": np.full((6, 6), np.nan)}, "mu and sigma: some of the moments are not finite"),
    (GOOD | {"sigma_s": -COV_S}, "mu_s and sigma_s: the covariance has a variance below 0"),
    (GOOD | {"num_images": np.array([3, 4])}, "expected a number of images, got"),
    (GOOD | {"network": np.array(["a", "b"])}, "expected the name of a feature network, got <U1"),
    (GOOD | {"features": FEATURES[:, :3]}, r"expected features \(M, 6\) of floating numbers, got float32 \(40, 3\)"),
    (GOOD | {"features": FEATURES * np.inf}, "some of the features are not finite"),
    (dict(x0=MEAN), r"expected moments of features .* or images \(arr_0\), got \['x0'\]"),
    (dict(mu=MEAN), r"expected moments of features .*, got \['mu'\]"),
  ],
)
def test_files_that_are_no_references_are_refused(path, content, message):
  path = path.with_suffix(".npz")
  np.savez(path, **content)
  with pytest.raises(ValueError, match=message) as caught:
    load_reference(path)
  assert "\n" not in str(caught.value)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize(
  "content", [[1, 2], {1: 2}, {"mean": MEAN}, {"a": {"mu": MEAN}}, {"fid": {"mu": MEAN}}, "text"]
)
def test_pickles_that_are_no_references_are_refused(path, content):
  path.write_bytes(pickle.dumps(content))
  with pytest.raises(ValueError, match="expected moments of features|expected a metric of"):
    load_reference(path)


def test_another_feature_network_is_told_by_width_and_by_name(path):
  path = path.with_suffix(".npz")
  Reference(Moments(MEAN, COV, 40), network="stub 1").save(path)
  load_reference(path, StubNetwork())
  with pytest.raises(ValueError, match="expected moments of 8 features, which stub 1 has, got 6: they are of another"):
    load_reference(path, StubNetwork(8))
  with pytest.raises(ValueError, match="expected features of stub 2, got those of 'stub 1'; make it again"):
    load_reference(path, StubNetwork(name="stub 2"))


def test_a_reference_comes_back_from_its_file(path):
  path = path.with_suffix(".npz")
  made = Reference(Moments(MEAN, COV, 40), Moments(MEAN_S, COV_S, 40), FEATURES, "stub 1")
  made.save(path)
  again = load_reference(path)
  check(again.pool, count=40)
  check(again.spatial, MEAN_S, COV_S, 40)
  np.testing.assert_array_equal(again.features, FEATURES)
  assert (again.num_images, again.network) == (40, "stub 1")
  Reference(Moments(MEAN, COV, None)).save(path)
  again = load_reference(path)
  assert (again.num_images, again.spatial, again.features, again.network) == (None, None, None, "")
  with np.load(path) as theirs:  # as pytorch-fid reads it
    np.testing.assert_array_equal(theirs["sigma"], COV)


def pictures(count=20, channels=3):
  x0 = np.random.default_rng(1).integers(0, 256, (count, 8, 8, channels), np.uint8)
  return x0, data.from_arrays(x0, np.zeros(count, int))


def test_references_are_made_of_pictures_in_parts(monkeypatch):
  monkeypatch.setattr(references, "PICTURES_AT_ONCE", 7)
  x0, dataset = pictures()
  network = StubNetwork()
  made = make_reference(dataset, network, keep=5, quiet=True)
  expected = StubNetwork()(x0)
  check(made.pool, expected.pool.mean(axis=0), np.cov(expected.pool, rowvar=False), 20, rtol=1e-5)
  check(made.spatial, expected.spatial.mean(axis=0), np.cov(expected.spatial, rowvar=False), 20, rtol=1e-5)
  assert network.most == 7
  rows = np.sort(np.random.default_rng(0).choice(20, 5, replace=False))
  np.testing.assert_allclose(made.features, expected.pool[rows], rtol=1e-5)
  assert made.network == "stub 1"
  again, other = (make_reference(dataset, StubNetwork(), keep=5, seed=seed, quiet=True) for seed in (0, 1))
  np.testing.assert_array_equal(again.features, made.features)
  assert not np.array_equal(other.features, made.features)
  assert make_reference(dataset, StubNetwork(spatial=0), quiet=True).spatial is None


def test_pixels_are_the_bytes_of_the_files(tmp_path, monkeypatch):
  monkeypatch.setattr(references, "PICTURES_AT_ONCE", 3)
  x0, dataset = pictures(16)
  for i, image in enumerate(x0):
    Image.fromarray(image).save(tmp_path / f"{i:02}.png")
  of_files = make_reference(data.load(f"folder:{tmp_path}", image_size=8), StubNetwork(), keep=16, quiet=True)
  np.testing.assert_array_equal(of_files.features, make_reference(dataset, StubNetwork(), keep=16, quiet=True).features)
  grey, one_channel = pictures(16, channels=1)
  made = make_reference(one_channel, StubNetwork(), keep=16, quiet=True)
  np.testing.assert_allclose(made.features, StubNetwork()(grey.repeat(3, axis=-1)).pool, rtol=1e-5)


def test_what_cannot_be_a_reference_is_refused_before_work(monkeypatch):
  network = StubNetwork()
  monkeypatch.setattr(StubNetwork, "__call__", None)
  with pytest.raises(ValueError, match="in 6 features needs at least 12 pictures, got 11; take more, or keep features"):
    make_reference(pictures(11)[1], network)
  with pytest.raises(ValueError, match="keep: expected 0 <= keep <= 20, the number of pictures, got 21"):
    make_reference(pictures()[1], network, keep=21)
  with pytest.raises(ValueError, match=r"expected a set of pictures \(H, W, 3\) or \(H, W, 1\), got \(2,\)"):
    make_reference(data.load("checkerboard"), network)
  mirrored = data.augment(pictures()[1], lambda x, rng: x)
  with pytest.raises(ValueError, match="its pictures have no order"):
    make_reference(mirrored, network)
  latents = data.from_arrays(3 * np.ones((20, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match=r"expected pixels in \[-1, 1\], got 3.0; latents are no pictures"):
    make_reference(latents, network, quiet=True)


def test_few_pictures_are_enough_for_kept_features():
  made = make_reference(pictures(11)[1], StubNetwork(), keep=11, quiet=True)
  assert made.num_images == 11
  with pytest.raises(ValueError, match="at least 12 samples"):
    frechet_distance(made.pool, made.pool)


@pytest.fixture
def command(tmp_path, monkeypatch):
  """`pflow reference` with a stub in place of the network's file."""
  monkeypatch.setattr(references, "open_feature_network", lambda path, *_: StubNetwork(name=f"stub of {path}"))
  (tmp_path / "photos").mkdir()
  for i, image in enumerate(pictures()[0]):
    Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
  monkeypatch.chdir(tmp_path)
  return lambda *flags: main(["reference", "--features=net.pt", *flags])


def test_the_command_makes_one_of_a_folder(command, tmp_path, capsys):
  command("--images=photos", "--size=8", "--out=r.npz", "--keep=4")
  assert "wrote r.npz: moments of 20 pictures and features of 4, stub of net.pt" in capsys.readouterr().out
  made = load_reference("r.npz")
  assert (made.num_images, made.network, made.features.shape) == (20, "stub of net.pt", (4, 6))
  command("--images=digits", "--split=test", "--option=held_out=100", "--out=d.npz")
  assert load_reference("d.npz").num_images == 100


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--images=photos", "--out=r.npz"], "give image_size=<pixels>"),
    (["--images=photos", "--size=8", "--out=r.pkl"], "--out: expected a file that ends with .npz"),
    (["--images=photos", "--size=8", "--out=no/r.npz"], "--out: there is no folder for no/r.npz"),
    (["--images=photo", "--out=r.npz"], "there is no data set 'photo'"),
    (["--images=photos", "--size=8", "--out=r.npz", "--keep=21"], "--keep: expected 0 <= keep <= 20"),
    (["--images=photos", "--size=8", "--out=r.npz", "--option=split=test"], "--option: name and split have flags"),
  ],
)
def test_mistakes_of_the_command_end_in_a_sentence(command, tmp_path, capsys, flags, message):
  with pytest.raises(SystemExit) as end:
    command(*flags)
  assert end.value.code == 2
  assert message in capsys.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} == {"photos"}


def test_a_network_that_fails_leaves_no_file(command, monkeypatch, tmp_path):
  def fails(self, pictures):
    raise RuntimeError("no more memory")

  monkeypatch.setattr(StubNetwork, "__call__", fails)
  with pytest.raises(SystemExit):
    command("--images=photos", "--size=8", "--out=r.npz")
  assert {p.name for p in tmp_path.iterdir()} == {"photos"}


def test_an_image_that_is_cut_short_is_named(command, tmp_path, capsys):
  file = tmp_path / "photos" / "7.png"
  file.write_bytes(file.read_bytes()[:60])
  with pytest.raises(SystemExit):
    command("--images=photos", "--size=8", "--out=r.npz")
  assert "1 of 20 images are unreadable: cannot read the image 7.png" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    command("--images=photos", "--size=8", "--out=r.npz", "--option=check=false")
  assert "7.png" in capsys.readouterr().err


def test_a_damaged_archive_is_refused(path):
  path = path.with_suffix(".npz")
  np.savez(path, **GOOD)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match="reference.npz cannot be read"):
    load_reference(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("mu.npy", b"x")
    archive.writestr("sigma.npy", b"x")
  with pytest.raises(ValueError, match="reference.npz cannot be read"):
    load_reference(path)
