"""All metrics against the numbers of the programs that papers report, see golden/README.md."""

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import (
  frechet_distance,
  inception_score,
  kernel_distance,
  prdc,
  precision_recall,
  whole_kernel_distance,
)

# As programs run: without float64 on the devices. A number that is cut to float32 is warned of.
pytestmark = [pytest.mark.usefixtures("float32"), pytest.mark.filterwarnings("error")]


@pytest.fixture(scope="module")
def features():
  """Real (300, 64), fake (250, 64) and logits (250, 10), drawn as those of the golden file were."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(64, 64)) / np.sqrt(64)
  real = (rng.normal(size=(300, 64)) @ mix + 0.4).astype(np.float32)
  fake = (0.9 * rng.normal(size=(250, 64)) @ mix + 0.45).astype(np.float32)
  return real, fake, (3 * rng.normal(size=(250, 10))).astype(np.float32)


def test_frechet_distance_is_pytorch_fids_and_adms(features, golden):
  real, fake, _ = features
  expected = golden("metrics")
  for name in ("pytorch_fid_fid", "adm_fid"):
    np.testing.assert_allclose(frechet_distance(fake, real), expected[name], rtol=1e-9)


def test_inception_score_is_torch_fidelitys_and_adms(features, golden):
  expected = golden("metrics")
  got = inception_score(features[2])
  np.testing.assert_allclose(got.mean, expected["fidelity_isc_mean"], rtol=1e-12)
  np.testing.assert_allclose(got.deviation, expected["fidelity_isc_deviation"], rtol=1e-12)
  np.testing.assert_allclose(got.mean, expected["adm_is_inception_score"], rtol=1e-12)


def test_kernel_distance_is_torch_fidelitys(features, golden):
  real, fake, _ = features
  expected = golden("metrics")
  got = kernel_distance(real, fake, num_subsets=100, subset_size=150)
  np.testing.assert_allclose(got.mean, expected["fidelity_kid64_mean"], rtol=1e-5)
  np.testing.assert_allclose(got.deviation, expected["fidelity_kid64_deviation"], rtol=1e-5)
  np.testing.assert_allclose(whole_kernel_distance(real[:250], fake), expected["fidelity_mmd64_whole"], rtol=1e-5)


def test_prdc_is_naeems_torch_fidelitys_adms_and_lakonlabs(features, golden):
  real, fake, _ = features
  expected = golden("metrics")
  for k in (3, 5):
    got = prdc(real, fake, k)
    for name, value in got._asdict().items():
      np.testing.assert_allclose(value, expected[f"prdc{k}_{name}"], rtol=1e-12)
  for program in ("adm64", "fidelity_prc", "lakonlab_pr"):
    both = [expected[f"{program}_{name}"] for name in ("precision", "recall")]
    np.testing.assert_allclose(precision_recall(real, fake, 3), both, rtol=1e-6)  # some are of float32
