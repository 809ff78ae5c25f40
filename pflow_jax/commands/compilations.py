"""Compiled programs that are kept between runs, of the command line and of notebooks."""

from __future__ import annotations

import os


def cache_compilations() -> None:
  """Keeps compiled programs on disk, in a folder of the user's, where JAX has been told of no other.

  JAX_COMPILATION_CACHE_DIR or jax.config name another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
  """
  import jax

  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  # A user without a home folder keeps none.
  if jax.config.jax_compilation_cache_dir is None and not base.startswith("~"):  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", os.path.join(base, "pflow_jax", "xla"))
