"""CIELAB of sRGB colours, CIE 15:2004 with the white of D65."""

import numpy as np

_TO_XYZ = np.array(
  [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def srgb_to_linear(rgb):
  """Undoes the gamma of sRGB (n, 3) in [0, 1]."""
  return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(linear):
  """L*, a*, b* (n, 3) of linear RGB (n, 3)."""
  xyz = linear @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
  f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
  return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)
