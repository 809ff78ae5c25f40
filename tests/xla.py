"""Flags of XLA with which tests compile: fast, for programs that run for moments."""

import importlib.metadata

FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other emitter, and refuse the flag
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # half of the time that a network's gradient takes to compile


def flags(devices: int | None = None) -> str:
  """Returns the flags, with that of so many fake devices, by default none."""
  return " ".join([*FLAGS, *([] if devices is None else [f"--xla_force_host_platform_device_count={devices}"])])
