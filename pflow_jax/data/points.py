"""2-D points whose density is known exactly."""

from __future__ import annotations

import numpy as np

from pflow_jax.data.dataset import Dataset
from pflow_jax.data.records import GeneratedRecords

# Lower left corners of the 8 black unit squares of the 4 x 4 board on [-2, 2]^2.
_CORNERS = np.array([(x, y) for x in range(-2, 2) for y in range(-2, 2) if (x + y) % 2 == 0], np.float32)


def checkerboard(*, split: str = "train") -> Dataset:
  """Points uniform over the black squares of a 4 x 4 board on [-2, 2]^2, without end.

  The one data set outside [-1, 1]: standard deviation 1.15 an axis, near that of the noise.

  Args:
    split: "train" only; `examples` are independent of every batch.
  """
  if split != "train":
    raise ValueError(f"checkerboard: the points never end; its only split is 'train', got {split}.")
  return Dataset("checkerboard", (2,), 0, (), GeneratedRecords(_checkerboard_points))


def _checkerboard_points(n: int, rng: np.random.Generator) -> np.ndarray:
  corners = _CORNERS[rng.integers(0, len(_CORNERS), n)]
  # Odd multiples of 2^-22: exact in float32 after the corner is added, and never on an edge.
  odd = 2 * rng.integers(0, 2**21, (n, 2), dtype=np.int32) + 1
  offsets = odd.astype(np.float32) * np.float32(2.0**-22)
  return corners + offsets
