"""Traffic of a compiled program between devices, read from XLA's own text; `hlo_memory` has that to memory.

That is `jax.stages.Compiled.as_text()`. XLA's cost analysis counts the body of a loop once and says nothing of
communication; here loops count their length. The CPU's and the TPU's compiler write the text in different forms: see
`_groups`, `_collective`, `is_running`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np

from pflow_jax.planning.hlo_module import Computation, Instruction, Module, Scope

KINDS = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
  *("ragged-all-to-all", "collective-broadcast", "send"),
)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Traffic of the collectives of one kind in one execution of the program.

  Attributes:
    count: executions.
    payload: bytes of one device's share, summed over the executions: the result of an all-gather, the operands of the
      others.
    sent: bytes that each device sends if groups of n are rings: all-gather and reduce-scatter (n - 1) / n of the
      payload, all-reduce twice that (a reduce-scatter, then an all-gather), all-to-all (n - 1) / n, the others all
      of it.
  """

  count: int = 0
  payload: int = 0
  sent: int = 0

  def __add__(self, other: Traffic) -> Traffic:
    return Traffic(self.count + other.count, self.payload + other.payload, self.sent + other.sent)


@dataclasses.dataclass(frozen=True)
class Collectives:
  """Traffic between devices in one execution of a program, by kind.

  Attributes:
    ici: within a slice; all traffic, if slices are not distinguished.
    dcn: of groups that reach across slices, and of transfers that the TPU compiler leaves to the hosts.
    unknown_loops: number of while loops, nested ones too, of unknown length, which counts as 1.
  """

  ici: dict[str, Traffic]
  dcn: dict[str, Traffic]
  unknown_loops: int


def collectives(text: str, devices_per_slice: int | None = None) -> Collectives:
  """Traffic between devices that one execution of a compiled program causes.

  A loop multiplies its body by its length, nested loops multiply; of a conditional the branch that sends most counts.
  Asynchronous pairs, and the TPU's collectives that run inside several fusions, count once. An all-reduce that the TPU
  compiler fuses with the slice of its result is the reduce-scatter that it stands for.

  Args:
    text: of `jax.stages.Compiled.as_text()`.
    devices_per_slice: splits the traffic of a program over several slices, if the devices of the mesh are listed slice
      by slice. The TPU compiler needs no such hint: its program is one slice's, and marks the traffic that leaves it.

  Raises:
    ValueError: the text has no entry computation, or collectives of an unknown form.
  """
  module = Module(text)
  totals, unknown = _walk(Scope(module, module.entry, {}), devices_per_slice)
  split: dict[bool, dict[str, Traffic]] = {False: {}, True: {}}
  for (kind, across), traffic in totals.items():
    split[across][kind] = traffic
  return Collectives(split[False], split[True], unknown)


# Collectives.

_Totals = dict[tuple[str, bool], Traffic]  # (kind, whether it leaves the slice) -> traffic


def _walk(scope: Scope, devices_per_slice: int | None) -> tuple[_Totals, int]:
  """Traffic of one execution of a computation, and its loops of unknown length."""
  totals: _Totals = {}
  unknown = 0

  def add(more: _Totals, times: int = 1) -> None:
    for key, t in more.items():
      totals[key] = totals.get(key, Traffic()) + Traffic(t.count * times, t.payload * times, t.sent * times)

  for ins in scope.computation.instructions.values():
    if found := _collective(scope.module, scope.computation, ins, devices_per_slice):
      add({found[:2]: found[2]})
      continue
    inner = []
    for name in ins.calls:
      trips, below = scope.called(ins, name)
      part, missing = _walk(below, devices_per_slice)
      inner.append((part, 1 if trips is None else trips))
      unknown += missing + (trips is None)
    if ins.opcode == "conditional" and inner:
      inner = [max(inner, key=lambda branch: sum(t.sent for t in branch[0].values()))]
    for part, times in inner:
      add(part, times)
  return totals, unknown


def _collective(
  module: Module, computation: Computation, ins: Instruction, devices_per_slice: int | None
) -> tuple[str, bool, Traffic] | None:
  """(kind, whether it leaves the slice, traffic) of an instruction that starts a collective, else None."""
  kind = ins.opcode.removesuffix("-start")
  if kind not in KINDS or is_running(computation, ins):
    return None
  taken = sum(a.logical for name in ins.operands for a in computation.instructions[name].arrays)
  if kind == "send":
    # The TPU's compiler writes one slice's program, in which the hosts carry collectives between slices.
    if name := re.search(r'_xla_megascale_transfer_type="(\w+)"', ins.attributes):
      kind = name[1].lower().replace("_", "-")
      return kind, True, _ring(kind, taken, _num_slices(ins.attributes))
    return None if "is_host_transfer=true" in ins.attributes else (kind, False, Traffic(1, taken, taken))
  if kind == "all-reduce" and _is_scattered(computation, ins):
    kind = "reduce-scatter"
  groups = _groups(ins.attributes, module.num_devices)
  across = bool(devices_per_slice) and bool(np.any(np.ptp(groups // (devices_per_slice or 1), axis=1)))
  if kind == "collective-permute":  # the groups are pairs; each device is the source of one
    moves = bool(np.any(np.ptp(groups, axis=1)))
    return kind, across, Traffic(1, taken, taken if moves else 0)
  return kind, across, _ring(kind, taken, groups.shape[1])


def _ring(kind: str, taken: int, size: int) -> Traffic:
  payload = taken * size if kind == "all-gather" else taken
  factor = 2 if kind == "all-reduce" else 1
  ringed = kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
  return Traffic(1, payload, factor * payload * (size - 1) // size if ringed else payload)


def _num_slices(attributes: str) -> int:
  """Slices that a transfer over the hosts joins: "{1,2}x{0:15}", or groups of devices 100000 * slice + index."""
  if among := re.search(r'_xla_megascale_target="\{([^}]*)\}', attributes):
    bounds = [_integers(part) for part in among[1].split(",")]
    return sum(part[-1] - part[0] + 1 for part in bounds)
  groups = re.findall(r"_xla_megascale_target=\{\{([\d,]+)\}", attributes)
  if not groups:
    raise ValueError("transfer between slices: expected a list of slices or groups of devices as its target, got none")
  return len({device // 100_000 for device in _integers(groups[0])})


def is_running(computation: Computation, ins: Instruction) -> bool:
  """Returns whether a collective in a fusion was started in another one.

  The TPU's compiler spreads one asynchronous collective over fusions that compute at the same time: each repeats it,
  with a "chain_id", and the first holds the custom call "AsyncCollectiveStart".
  """
  if "chain_id=" not in ins.attributes:
    return False
  return all(i.target != "AsyncCollectiveStart" for i in computation.instructions.values())


def _is_scattered(computation: Computation, ins: Instruction) -> bool:
  """Returns whether an all-reduce is the TPU compiler's "all-reduce-scatter", whose traffic is a reduce-scatter's."""
  return computation.name.startswith("all-reduce-scatter") and all(
    user.opcode in ("dynamic-slice", "bitcast") for user in computation.users(ins.name)
  )


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """Reads the groups of devices (groups, size) of a collective, in any of their forms.

  {{0,1},{2,3}}, or {} for all; [2,4]<=[8] or [4,2]<=[2,4]T(1,0), a reshaped (and transposed) count; and
  mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, or {'a':(2)2} for a part of an axis: all that differ there.

  References:
    openxla/xla, hlo/ir/replica_group.cc and mesh_and_axis.cc.
  """
  if pairs := re.search(r"source_target_pairs=(\{[{}\d,\s]*\})", attributes):
    return _lists(pairs[1], num_devices)
  if "replica_groups=" not in attributes:
    return np.arange(num_devices)[None]
  found = re.search(r"replica_groups=(\{\}|\{[{}\d,\s]*\}\}|\[\S*|mesh\[.*?\{[^}]*\})", attributes)
  form = found[1].rstrip(",") if found else attributes.partition("replica_groups=")[2][:80]
  if form.startswith("{"):
    return _lists(form, num_devices)
  if form.startswith("["):
    shape, rest = form.split("<=")
    return _iota(rest).reshape(_integers(shape))
  mesh = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", re.sub(r"['\"]", "", form))
  if not mesh:
    raise ValueError(f"replica groups: expected lists, a reshaped count or axes of a mesh, got {form}")
  sizes = {name: int(size) for name, size in (axis.split("=") for axis in mesh[1].split(","))}
  ids = np.arange(math.prod(sizes.values()))
  if mesh[2]:
    ids = _iota(mesh[2]) if mesh[2].startswith("[") else np.array(_integers(mesh[2]))
  # Every axis is split where a named part of it begins or ends; the named parts then move to the back.
  named: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
  for axis in filter(None, mesh[3].split(",")):
    name, _, part = axis.partition(":")
    before, size = _integers(part) if part else (1, sizes[name])
    named[name].append((before, before * size))
  shape, chosen = [], []
  for name, size in sizes.items():
    cuts = sorted({1, size, *(cut for part in named[name] for cut in part)})
    for start, end in itertools.pairwise(cuts):
      chosen.append(any(low <= start and end <= high for low, high in named[name]))
      shape.append(end // start)
  back = [i for i, is_chosen in enumerate(chosen) if is_chosen]
  order = [i for i, is_chosen in enumerate(chosen) if not is_chosen] + back
  return ids.reshape(shape).transpose(order).reshape(-1, math.prod(shape[i] for i in back))


def _lists(form: str, num_devices: int) -> np.ndarray:
  groups = [_integers(group) for group in re.findall(r"\{([\d,\s]+)\}", form)]
  if not groups:
    return np.arange(num_devices)[None]
  size = max(map(len, groups))  # groups of unequal size wait for the largest
  return np.array([group + group[-1:] * (size - len(group)) for group in groups])


def _iota(form: str) -> np.ndarray:
  """[2,4]T(1,0) -> the numbers 0 to 7 in shape (2, 4), transposed, in one row."""
  shape, _, order = form.partition("T")
  ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
  return (ids.transpose(_integers(order)) if order else ids).reshape(-1)


def _integers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", text)]
