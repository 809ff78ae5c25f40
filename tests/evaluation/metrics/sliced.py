"""Features that are neither an array nor a file."""

import numpy as np


class Sliced:
  """Rows that are given by slices alone, as of an HDF5 or Zarr file.

  Attributes:
    most: the most rows that were asked for at once.
  """

  def __init__(self, x):
    self._x, self.shape, self.most = np.asarray(x), x.shape, 0

  def __getitem__(self, rows):
    assert isinstance(rows, slice)
    part = self._x[rows]
    self.most = max(self.most, len(part))
    return part.tolist() if len(part) == 1 else part
