"""Features of pictures in published networks: batches on a mesh, pictures of samples, an evaluation in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pflow_jax as pf
from pflow_jax.data.dataset import Scaling
from pflow_jax.evaluation import feature_networks, measure, metrics
from pflow_jax.evaluation import pictures as pictures_of_samples
from pflow_jax.evaluation.feature_networks import Features, JittedNetwork
from pflow_jax.evaluation.pictures import to_pictures
from pflow_jax.families.autoencoder import Codec
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.settings.tree import Settings
from pflow_jax.training.workdir import pinned
from tests.programs import quick

pytestmark = pytest.mark.usefixtures("float32")


class Counted:
  """A small network of two jitted functions, which counts how often each is compiled, and how its inputs lie."""

  def __init__(self, batch_size, sizes=None):
    self.scaled, self.ran, self.shards = [], [], []

    def scale(x):
      self.scaled.append(x.shape)
      rows, columns = (jnp.arange(4) * n // 4 for n in x.shape[1:3])
      return x[:, rows][:, :, columns].astype(jnp.float32) / 255

    def run(params, x):
      self.ran.append(x.shape)
      jax.debug.inspect_array_sharding(x, callback=lambda sharding: self.shards.append(sharding.shard_shape(x.shape)))
      flat = x.reshape(len(x), -1)
      return Features(jnp.tanh(flat @ params), None, flat[:, :3])

    layout = make_layout(sizes or {"data": -1}, ())
    self.params = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
    params = layout.everywhere(self.params)
    self.network = JittedNetwork("small 1", 6, jax.jit(scale), jax.jit(run), params, layout, batch_size)


def pictures(count, height=8, width=12, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def expected(network, x):
  rows, columns = (np.arange(4) * n // 4 for n in x.shape[1:3])
  flat = (x[:, rows][:, :, columns].astype(np.float32) / 255).reshape(len(x), -1)
  return np.tanh(flat @ network.params), flat[:, :3]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_features_of_any_number_of_pictures_are_in_their_order(count):
  counted = Counted(16)
  x = pictures(count)
  features = counted.network(x)
  pool, logits = expected(counted, x)
  np.testing.assert_allclose(features.pool, pool, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(features.logits, logits, rtol=1e-6)
  assert features.spatial is None
  assert isinstance(features.pool, np.ndarray)


def test_a_batch_has_one_size_and_is_split_over_the_mesh():
  counted = Counted(16, {"data": 2, "fsdp": 4})
  for count, size in ((3, 8), (40, 8), (1, 20), (16, 20)):
    counted.network(pictures(count, size))
  assert counted.ran == [(16, 4, 4, 3)], "the network is compiled once"
  assert counted.scaled == [(16, 8, 12, 3), (16, 20, 12, 3)], "scaling once a size"
  assert set(counted.shards) == {(2, 4, 4, 3)}


@pytest.mark.parametrize(
  ("x", "message"),
  [
    (np.zeros((2, 8, 8, 3), np.float32), "expected bytes, uint8, got float32"),
    (np.zeros((2, 8, 8, 3), np.int64), "expected bytes, uint8, got int64"),
    (np.zeros((2, 8, 8, 1), np.uint8), r"expected \(n, H, W, 3\), n >= 1, got \(2, 8, 8, 1\)"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"got \(2, 8, 8, 4\)"),
    (np.zeros((8, 8, 3), np.uint8), r"got \(8, 8, 3\)"),
    (np.zeros((0, 8, 8, 3), np.uint8), r"got \(0, 8, 8, 3\)"),
    (np.zeros((2, 0, 8, 3), np.uint8), r"got \(2, 0, 8, 3\)"),
  ],
)
def test_what_are_no_pictures_is_refused(x, message):
  with pytest.raises(ValueError, match=message):
    Counted(8).network(x)


def dataset(channels=1, count=64, **changes):
  x0 = np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, channels)).astype(np.float32)
  return pf.data.from_arrays(x0, np.arange(count) % 2, **changes)


def test_samples_become_bytes():
  x = np.array([-1.2, -1, -1 + 1 / 255, 0.999, 1, 3], np.float32).reshape(1, 1, 6, 1)
  found = to_pictures(dataset(), make_layout({"data": -1}, ()))(x)
  assert (found.dtype, found.shape) == (np.uint8, (1, 1, 6, 3))
  np.testing.assert_array_equal(found, np.repeat(np.array([0, 0, 1, 255, 255, 255]).reshape(1, 1, 6, 1), 3, axis=-1))
  every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  np.testing.assert_array_equal(
    to_pictures(dataset(), make_layout({"data": -1}, ()))(every / np.float32(127.5) - 1)[..., :1], every
  )


def test_samples_that_are_no_pictures_are_refused():
  with pytest.raises(ValueError, match=r"1 or 3 channels.*\(8, 8, 4\); name the autoencoder of its latents"):
    to_pictures(dataset(channels=4), make_layout({"data": -1}, ()))
  points = pf.data.from_arrays(np.zeros((4, 2), np.float32))
  with pytest.raises(ValueError, match=r"config\.evaluate\.features: expected pictures"):
    to_pictures(points, make_layout({"data": -1}, ()))


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_of_few_channels_are_no_pixels(channels):
  latents = dataclasses.replace(dataset(channels), scaling=Scaling((0.0,), (1.0,), 1.0))
  with pytest.raises(ValueError, match=r"has latents of \(8, 8, .\); name the autoencoder of its latents"):
    to_pictures(latents, make_layout({"data": -1}, ()))


def test_samples_that_look_like_latents_are_told(caplog):
  see = to_pictures(dataset(name="mine"), make_layout({"data": -1}, ()))
  see(np.clip(np.random.default_rng(0).normal(size=(20, 8, 8, 1)), -1.5, 1.5).astype(np.float32))
  assert not caplog.records
  see(np.random.default_rng(0).normal(size=(20, 8, 8, 1)).astype(np.float32))
  assert "mine: more than 2% of the samples' numbers lie beyond 2" in caplog.text


def test_pictures_that_an_autoencoder_overflows_on_have_no_score(monkeypatch):
  class Overflows(nn.Module):
    def decode(self, x):
      return jnp.exp(100 * x) - jnp.exp(100 * x)

  monkeypatch.setattr(pictures_of_samples, "codec_of", lambda dataset: Codec(Overflows(), {}))
  see = to_pictures(dataset(3), make_layout({"data": -1}, ()))
  x = np.zeros((10, 8, 8, 3), np.float32)
  assert (see(x) == 128).all()
  x[[2, 7], 1] = 3.0
  with pytest.raises(ValueError, match=r"2 of 10 pictures are not finite, of samples that lie in \[0, 3\]"):
    see(x)


def test_the_widths_of_a_networks_features_are_known_before_any_are_made():
  network = Counted(16).network
  assert (network.num_features, network.num_spatial, network.num_logits) == (6, 0, 3)


@pytest.fixture(scope="module")
def run():
  network = pf.DiT(patch_size=4, width=16, depth=1, num_heads=2)
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return pf.train(pf.FlowMatching(), dataset(count=128), network, steps=1)


SETTINGS = dict(num_samples=32, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2, quiet=True)


def test_an_evaluation_is_in_the_networks_features_and_says_so(run, monkeypatch):
  counted = Counted(16)
  opened = []
  monkeypatch.setattr(
    measure, "open_feature_network", lambda path, layout, width: opened.append(path) or counted.network
  )
  report = run.evaluate(features="network.pt", **SETTINGS)
  assert opened == ["network.pt"]
  assert report.about["features"] == "small 1"
  assert "FD (small 1)" in report.table
  see = to_pictures(report.dataset, make_layout({"data": -1}, ()))
  real = counted.network(see(report.real)).pool
  for row in report.rows:
    own = counted.network(see(report.samples[row["name"]])).pool
    assert row["fd"] == pytest.approx(metrics.frechet_distance(own, real), rel=1e-4)
    assert (row["precision"], row["recall"]) == pytest.approx(metrics.precision_recall(real, own))
    assert "accuracy" in row


def test_too_few_samples_or_data_for_a_network_are_refused_before_any_are_drawn(run, monkeypatch):
  monkeypatch.setattr(measure, "open_feature_network", lambda *_: Counted(16).network)
  monkeypatch.setattr(measure, "_draw", lambda *_: pytest.fail("drawn"))
  with pytest.raises(ValueError, match=r"num_samples: a Fréchet distance in 6 features needs at least 12"):
    run.evaluate(features="network.pt", **SETTINGS | dict(num_samples=10))
  wide = dataclasses.replace(Counted(16).network, num_features=100)
  monkeypatch.setattr(measure, "open_feature_network", lambda *_: wide)
  with pytest.raises(ValueError, match=r"config\.data: .* in 100 features needs at least 200 samples, got 128"):
    run.evaluate(features="network.pt", **SETTINGS | dict(num_samples=256))


def test_a_file_that_is_no_network_is_refused_before_any_are_drawn(run, monkeypatch, tmp_path):
  monkeypatch.setattr(measure, "_draw", lambda *_: pytest.fail("drawn"))
  with pytest.raises(ValueError, match="no file or folder"):
    run.evaluate(features=str(tmp_path / "none.pt"), **SETTINGS)


def test_a_batch_is_of_a_size_that_devices_and_host_can_hold(monkeypatch):
  monkeypatch.setattr(feature_networks, "load_inception", lambda path: {"output": {"kernel": np.zeros((1, 1))}})
  layout = make_layout({"data": -1}, ())
  assert feature_networks.open_feature_network("x", layout).batch_size == 8 * 32
  monkeypatch.setattr(feature_networks, "PICTURES_A_DEVICE", 200)
  assert feature_networks.open_feature_network("x", layout).batch_size == 1024


def test_a_run_keeps_the_whole_path_of_its_network(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  settings = Settings.of(quick("digits", "teacher")).changed("evaluate", features="network.pt")
  assert pinned(None, settings).evaluate.features == str(tmp_path / "network.pt")
