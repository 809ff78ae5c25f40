"""TPU chips and GPUs: their memory, rates and links, and the names of their slices and nodes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

MIB, GIB = 2**20, 2**30

# A TPU multiplies bfloat16 numbers alone: float32 is one of them rounded, or products of its two or three parts.
TPU_PASSES = {"DEFAULT": 1, "HIGH": 3, "HIGHEST": 6}
# TF32, which all but the highest precision take, has half of the bfloat16 rate (H100 and H200: 495 of 989 TFLOP/s);
# float32 itself has no tensor cores (67 TFLOP/s).
GPU_PASSES = {"DEFAULT": 2, "HIGH": 2, "HIGHEST": 15}


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, with both of its TensorCores where it has two; or one GPU.

  Attributes:
    name: the part of a topology before the colon; of a TPU it is the compiler's.
    hbm_bytes: main memory that a program may use, the number in the compiler's refusals ("exceeds available HBM"); it
      is less than the chip's memory.
    peak_flops: bfloat16 operations a second, a multiply-add counts 2.
    hbm_bandwidth: bytes a second to and from main memory.
    ici_bandwidth: bytes a second that the chip can send to its neighbours, one way, over all `ici_links` at once; it
      receives as many. A collective along one axis of a slice has the two links of that axis (one, where the axis does
      not close to a ring), two of `ici_links`.
    ici_links: links to neighbours: 4 in a 2-D torus, 6 in a 3-D one.
    dcn_bandwidth: bytes a second that the chip's share of its host's network can send to other slices.
    devices: JAX devices a chip. 2 where each TensorCore is a device of its own, with half of the memory, of the
      operations and of the bandwidths.
    cores: TensorCores, which the Cloud names of some generations count.
    dimensions: axes of a slice's torus; 1 for a node of GPUs, which a switch connects.
    max_chips: largest number of chips of a slice, or of GPUs of a node.
    vmem_bytes: on-chip memory of one TensorCore, which a kernel computes in; 0 of a GPU.
    platform: "tpu" or "gpu".
  """

  name: str
  hbm_bytes: int
  peak_flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  ici_links: int
  dcn_bandwidth: float
  devices: int
  cores: int
  dimensions: int
  max_chips: int
  vmem_bytes: int
  platform: str = "tpu"

  @property
  def float32_passes(self) -> Mapping[str, int]:
    """Bfloat16 operations whose time one of float32 takes, by the name of `jax.lax.Precision`."""
    return {"tpu": TPU_PASSES, "gpu": GPU_PASSES}[self.platform]

  @property
  def hbm_bytes_per_device(self) -> int:
    """Main memory of one JAX device that a program may use."""
    return self.hbm_bytes // self.devices


# Memory: refusals of libtpu 0.0.42, a device's times the devices of a chip. Operations, bandwidths and links: the
# generations' pages of cloud.google.com/tpu/docs (/v3, /v4, /v5e, /v5p, /v6e, /tpu7x). One-way ICI is half of what they
# call bidirectional; of v3 and v4 they give no such figure, and it is the all-reduce bandwidth of a pod (340 TB/s,
# 1.1 PB/s) over its chips, which for v5e and v6e comes to the same. DCN: /tpu7x for v5p, v6e and tpu7x; /v5e's pod
# (6.4 Tbit/s, 256 chips); jax-ml.github.io/scaling-book, "How to think about TPUs", for v4; v3's is a guess, one
# 100 Gbit/s adapter for the four chips of a host.
# GPUs: data sheets of H100 SXM and H200 SXM, dense operations; memory as nvidia-smi tells it; NVLink 4, one way; an
# adapter of 400 Gbit/s for each GPU, as in NVIDIA's DGX H100.
# On-chip memory: jax/_src/pallas/mosaic/tpu_info.py of JAX 0.10.
CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip("v3", int(2 * 15.48 * GIB), 123e12, 900e9, 3.3e11, 4, 3.125e9, 2, 2, 2, 1024, 16 * MIB),
    Chip("v4", int(30.75 * GIB), 275e12, 1200e9, 2.7e11, 6, 6.25e9, 1, 2, 3, 4096, 16 * MIB),
    Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 2.0e11, 4, 3.125e9, 1, 1, 2, 256, 128 * MIB),
    Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 6.0e11, 6, 6.25e9, 1, 2, 3, 8960, 64 * MIB),
    Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 4.0e11, 4, 12.5e9, 1, 1, 2, 256, 128 * MIB),
    Chip("tpu7x", int(2 * 94.75 * GIB), 2307e12, 7380e9, 6.0e11, 6, 12.5e9, 2, 2, 3, 9216, 64 * MIB),
    Chip("h100", 81559 * MIB, 989e12, 3350e9, 4.5e11, 1, 5e10, 1, 1, 1, 8, 0, "gpu"),
    Chip("h200", 143771 * MIB, 989e12, 4800e9, 4.5e11, 1, 5e10, 1, 1, 1, 8, 0, "gpu"),
  )
}

# Devices as JAX names them, and their chips.
TPUS = {
  **{"TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
  **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
}
# Dense bfloat16 operations a second (V100 and T4: float16) of NVIDIA's data sheets, by a pattern of JAX's name; the
# first row that fits wins. The sheets of H100 and later count sparse ones, twice as many.
GPUS = (
  *((r"\bV100\b", 125e12), (r"\bT4\b", 65e12), (r"\bA100\b", 312e12), (r"\bA10\b", 125e12), (r"\bL4\b", 121e12)),
  *((r"\bL40S\b", 362e12), (r"\bH[12]00 NVL\b", 835e12), (r"\bH100 PCIe\b", 756e12)),
  *((r"\bG?H[12]00\b", 989e12), (r"\bB200\b", 2250e12)),
)


def peak_flops(device_kind: str) -> float | None:
  """Peak rate of one JAX device, in bfloat16 operations a second, a multiply-add counts 2; None where it is unknown.

  Args:
    device_kind: JAX's name, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
  """
  if device_kind in TPUS:
    chip = CHIPS[TPUS[device_kind]]
    return chip.peak_flops / chip.devices
  return next((rate for pattern, rate in GPUS if re.search(pattern, device_kind)), None)


def vmem_bytes(device_kind: str) -> int:
  """On-chip memory of one TensorCore, in bytes; that of a TPU v5e where no TPU of that kind is known.

  Args:
    device_kind: JAX's name, such as "TPU v5 lite".
  """
  return CHIPS[TPUS.get(device_kind, "v5e")].vmem_bytes


def chip_of(topology: str) -> Chip:
  """The chip of a topology or Cloud name, see `parse_topology`: "v5e:16x16" -> CHIPS["v5e"]."""
  return CHIPS[parse_topology(topology)[0]]


def parse_topology(text: str) -> tuple[str, tuple[int, ...], int]:
  """Reads a slice's name: (name of the chip, shape in chips, number of chips).

  Args:
    text: a topology, "v5e:16x16" or "v5p:4x4x4"; or a Cloud name, "v5e-256" (also "v5litepod-256"), "v6e-64" or
      "v5p-128", which stands for the usual shape of that size. It counts TensorCores: one a chip of v5e and v6e,
      two of v3, v4, v5p and tpu7x. A node of GPUs is "h100-8" or "h200-8".

  Raises:
    ValueError: there is no such chip, shape or size.

  References:
    cloud.google.com/tpu/docs/system-architecture-tpu-vm and the generations' pages.
  """
  topology = re.fullmatch(r"(\w+):([0-9]{1,9}(?:x[0-9]{1,9})*)", text.strip())
  if topology:
    chip = _chip(topology[1], text)
    shape = tuple(int(side) for side in topology[2].split("x"))
    if len(shape) != chip.dimensions or min(shape) < 1:
      example = "x".join(["4"] * chip.dimensions)
      raise ValueError(
        f"topology {text!r}: expected {chip.dimensions} sides for {chip.name}, as in '{chip.name}:{example}', got "
        f"{len(shape)}: {topology[2]}"
      )
    return chip.name, shape, _checked(chip, math.prod(shape), text)
  cloud = re.fullmatch(r"(\w+)-([0-9]{1,9})", text.strip())
  if not cloud:
    raise ValueError(
      f"topology {text!r}: expected a chip and a shape, such as 'v5e:16x16', or a Cloud name, such as 'v5p-128'; "
      f"chips are {sorted(CHIPS)}"
    )
  chip, count = _chip(cloud[1], text), int(cloud[2])
  if count % chip.cores or count < 1:
    raise ValueError(
      f"topology {text!r}: the number counts TensorCores, {chip.cores} a chip of {chip.name}, got {count}"
    )
  number = _checked(chip, count // chip.cores, text)
  shape_of_size = {1: _line, 2: _square, 3: _cube}[chip.dimensions](number)
  if shape_of_size is None:
    raise ValueError(
      f"topology {text!r}: {number} chips have no usual shape; name the one you mean, such as '{chip.name}:"
      f"{'4x4' if chip.dimensions == 2 else '4x4x4'}'"
    )
  return chip.name, shape_of_size, number


def links_of_axis(text: str) -> int:
  """Links that a chip has along the longest axis of a slice: 2 where the axis closes to a ring, else 1.

  Axes close at 16 chips of v5e and v6e, 32 of v3, and at multiples of 4 in the 3-D generations.
  """
  name, shape, _ = parse_topology(text)
  side = max(shape)
  ring = {"v3": side == 32, "v5e": side == 16, "v6e": side == 16}.get(name, side % 4 == 0)
  return 2 if ring else 1


def compiler_topology(text: str) -> tuple[str, dict[str, Any]]:
  """Name and options of a slice for `jax.experimental.topologies.get_topology_desc(name, platform="tpu", **options)`.

  Args:
    text: as for `parse_topology`.
  """
  name, shape, number = parse_topology(text)
  options: dict[str, Any] = {}
  if name == "v4":
    options["chip_config_name"] = "megacore"  # without it each TensorCore is a device, unlike on any v4 of Cloud
  if number == 1:
    options["chips_per_host_bounds"] = [1, 1, 1]
  return f"{name}:{'x'.join(map(str, shape))}", options


def _chip(name: str, text: str) -> Chip:
  name = {"v5litepod": "v5e", "v5lite": "v5e"}.get(name, name)
  if name not in CHIPS:
    raise ValueError(f"topology {text!r}: expected one of the chips {sorted(CHIPS)}, got {name!r}")
  return CHIPS[name]


def _checked(chip: Chip, number: int, text: str) -> int:
  if number > chip.max_chips:
    raise ValueError(
      f"topology {text!r}: expected at most {chip.max_chips} chips of {chip.name} in a slice, got {number}; use "
      "several slices"
    )
  return number


def _line(number: int) -> tuple[int, ...] | None:
  """Shape of a node of `number` GPUs."""
  return (number,)


def _square(number: int) -> tuple[int, ...] | None:
  """Shape of the 2-D slice of `number` chips, a power of 2 except 2 itself: square, or twice as long as wide."""
  if number == 2 or number & (number - 1):
    return None
  side = 2 ** ((number.bit_length() - 1) // 2)
  return side, number // side


def _cube(number: int) -> tuple[int, ...] | None:
  """Shape of the 3-D slice of `number` chips: the nearest to a cube, of sides that are 1, 2 or multiples of 4."""
  if number == 4:
    return 2, 2, 1  # one host
  sides = [n for n in range(1, number + 1) if number % n == 0 and (n in (1, 2) or n % 4 == 0)]
  shapes = [s for s in itertools.combinations_with_replacement(sides, 3) if math.prod(s) == number]
  # Slices of several hosts are at least two chips wide everywhere.
  shapes = [s for s in shapes if min(s) > 1 or number == 1]
  return min(shapes, key=sum, default=None)
