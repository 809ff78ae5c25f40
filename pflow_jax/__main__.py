"""`python -m pflow_jax` is `pflow`."""

from pflow_jax.commands.cli import main

if __name__ == "__main__":
  main()
