"""Versions of what is installed, without importing it."""

from __future__ import annotations

import re
import sys
from importlib import metadata

JAX = (0, 10), (0, 12)  # first and last release; setup.py says the same


def version_of(distribution: str) -> str:
  """Returns the version of a distribution, or "unknown" where it is not installed.

  Args:
    distribution: its name on the index of packages, such as "pflow-jax".
  """
  return _installed(distribution) or "unknown"  # such as a checkout on the path


def check_jax() -> None:
  """Refuses a JAX that this package does not run on, in one sentence, and imports nothing for that.

  Raises:
    ImportError: jax is too old or too new; jaxlib or a plugin is of another release; or another release of jax or
      NumPy was imported than the one that is installed now.
  """
  fix = (
    "`pip install -U 'pflow-jax[tpu]'`, or [cuda], [cuda13] or none of them for a CPU, brings releases that fit; then "
    "restart the runtime"
  )
  jax = _installed("jax")
  if jax is None:  # `import jax` tells more
    return
  first, last = JAX
  if not first <= _release(jax) <= last:
    known = " to ".join(".".join(map(str, bound)) for bound in JAX)
    raise ImportError(f"pflow_jax runs on jax {known}, and {jax} is installed: {fix}")
  for name in ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"):
    found = _installed(name)
    if found is not None and _release(found) != _release(jax):
      raise ImportError(f"{name} {found} is installed beside jax {jax}, which it does not fit: {fix}")
  if libtpu := _installed("libtpu"):
    needed = re.search(r"libtpu==([\d.]+)\.\*", " ".join(metadata.requires("jax") or ()))
    if needed and _release(libtpu, 3) < _release(needed[1], 3):
      raise ImportError(f"libtpu {libtpu} is installed beside jax {jax}, which needs {needed[1]}: {fix}")
  for name in ("jax", "numpy"):
    loaded, found = getattr(sys.modules.get(name), "__version__", None), _installed(name)
    if loaded and found and _release(loaded) != _release(found):
      raise ImportError(
        f"{name} {loaded} was imported before {found} was installed: restart the runtime (Colab: Runtime > Restart "
        "session), then run this again"
      )


def _installed(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None


def _release(version: str, numbers: int = 2) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split(".")[:numbers] if part.isdigit())
