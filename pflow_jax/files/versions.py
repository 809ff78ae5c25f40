"""Versions of what is installed, without importing it."""

from __future__ import annotations

from importlib import metadata


def version_of(distribution: str) -> str:
  """Returns the version of a distribution, or "unknown" where it is not installed.

  Args:
    distribution: its name on the index of packages, such as "pflow-jax".
  """
  try:
    return metadata.version(distribution)
  except metadata.PackageNotFoundError:  # a checkout on the path
    return "unknown"
