"""Use of the devices by a training: the share of their peak rate, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import psutil

from pflow_jax.mesh.chips import peak_flops

GIB = 2**30


class Usage:
  """Numbers of a training's devices for its metrics.

  Args:
    devices: of the mesh, all processes' together.
  """

  def __init__(self, devices: Sequence[Any]):
    peaks = [peak_flops(device.device_kind) for device in devices]
    self._peak = None if None in peaks else sum(peak for peak in peaks if peak)
    self._local = [device for device in devices if device.process_index == jax.process_index()]
    self._process = psutil.Process()

  def share(self, flops_per_second: float) -> dict[str, float]:
    """Share of the devices' bfloat16 peak rate, as "peak_share"; {} where the rate of a device is not known."""
    return {"peak_share": flops_per_second / self._peak} if self._peak else {}

  def memory(self) -> dict[str, float]:
    """Memory in GiB: of this process, and of the fullest of its devices, now and at most so far, if they tell."""
    told = [stats for device in self._local if (stats := device.memory_stats())]
    names = {"device_gib": "bytes_in_use", "device_peak_gib": "peak_bytes_in_use"}
    found = {name: max((stats.get(key, 0) for stats in told), default=0) / GIB for name, key in names.items()}
    return {name: value for name, value in found.items() if value} | {"host_gib": self._process.memory_info().rss / GIB}
