"""Teachers that the tests of conversion share."""

import jax
import pytest

from pflow_jax.conversion.program import convert
from tests.conversion.folders import ADAPTERS, write_torch


@pytest.fixture(scope="package")
def teachers(tmp_path_factory):
  """Folders torch/<kind>, of diffusers, and run/<kind>, converted."""
  folder = tmp_path_factory.mktemp("teachers")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    for kind in ADAPTERS:
      write_torch(folder / "torch" / kind, kind)
      convert(folder / "torch" / kind, folder / "run" / kind)
  return folder
