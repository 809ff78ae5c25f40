"""Test setting: eight CPU devices, float64 where a test asks for it, no silent broadcasting."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import pathlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def golden():
  """Returns a loader: golden("gm_policy") -> dict of NumPy arrays (see golden/README.md)."""

  def load(name):
    with np.load(GOLDEN / f"{name}.npz") as data:
      return dict(data)

  return load
