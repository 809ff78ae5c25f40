"""What a compiled program moves, read from XLA's own text (`compiled.as_text()`): between devices, and to memory.

XLA's cost analysis counts the body of a loop once and says nothing of communication; here loops count their length.
Written for the text of the CPU and the TPU compiler, whose forms differ: see `_groups`, `_collective`, `_is_running`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator

import numpy as np

KINDS = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
  *("ragged-all-to-all", "collective-broadcast", "send"),
)

# Instructions that move no bytes.
_FREE = frozenset(
  (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain"),
    *("opt-barrier", "partition-id", "replica-id", "recv"),
  )
)
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
_MAX_TRIPS = 1_000_000  # a loop that is followed for longer is given up


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the collectives of one kind move in one execution of the program.

  Attributes:
    count: executions.
    payload: bytes of one device's share, summed over the executions: what an all-gather gives out, what the others
      take in.
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
    ici: within a slice; everything, where slices are not told apart.
    dcn: of groups that reach across slices, and what the TPU compiler hands to the hosts for another slice.
    unknown_loops: while loops whose length could not be read off and counts as 1, in bodies too.
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
    text: of `compiled.as_text()`.
    devices_per_slice: splits the traffic of a program over several slices, if the devices of the mesh are listed slice
      by slice. The TPU compiler needs no such hint: its program is one slice's, and says what leaves it.
  Raises: ValueError for a text without an entry computation, or collectives of an unknown form.
  """
  module = _Module(text)
  totals, unknown = _walk(_Scope(module, module.entry, {}), devices_per_slice)
  split: dict[bool, dict[str, Traffic]] = {False: {}, True: {}}
  for (kind, across), traffic in totals.items():
    split[across][kind] = traffic
  return Collectives(split[False], split[True], unknown)


def within(text: str, scope: str) -> list[str]:
  """Names of the operations, as JAX wrote them, that became collectives and hold `scope`, in order, without repeats.

  `within(text, "shard_map")` lists the collectives of what ran under `jax.shard_map`. A collective without a name of
  its own has that of the fusion or call around it; one without any is not listed. A program from JAX's persistent cache
  may carry the names of an equal one that was compiled before.
  """
  module = _Module(text)
  names: dict[str, None] = {}

  def visit(computation: _Computation, outer: str) -> None:
    for ins in computation.instructions.values():
      name = ins.op_name or outer
      if scope in name and _collective(module, computation, ins, None):
        names[name] = None
      for called in ins.calls:
        visit(module[called], name)

  visit(module.entry, "")
  return list(names)


def memory_traffic(text: str) -> int:
  """Estimate of the bytes that one execution of a compiled program moves to and from a device's main memory.

  Every instruction that is not inside a fusion reads its operands and writes its result; loops multiply. Of an operand
  that a fusion only slices the slice counts, of a dynamic-update-slice, which XLA does in place, the update. Arrays in
  a TPU's on-chip memory (S(1) and the like in the layout) are free, and others have the size that their tiling pads
  them to.

  Limits: reads that hit a cache (CPU, GPU) and the tiles that a fused product reads again are not seen, nor what a
  kernel (custom call) moves beyond its operands and results. Gathers count their results, scatters whole operands; a
  loop of unknown length counts once, a conditional its largest branch. It agrees with XLA's "bytes accessed" where
  there is no loop or on-chip memory, but for the ends of copies, which XLA counts again; no profile was compared.
  """
  module = _Module(text)
  return _memory(_Scope(module, module.entry, {}))


# The text as instructions.


@dataclasses.dataclass(frozen=True)
class _Array:
  """One array of a shape. `size` is in bytes, padded to its tiles; `logical` is not."""

  elements: int
  logical: int
  size: int
  in_memory: bool  # the device's main one


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str  # text between the parentheses
  attributes: str  # text after them

  @property
  def arrays(self) -> list[_Array]:
    """The arrays of the result, nested tuples flattened."""
    return [_array(*found) for found in re.findall(r"(\w+)\[([\d,<=?]*)\](\{[^}]*\})?", self.shape)]

  @property
  def op_name(self) -> str:
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def calls(self) -> list[str]:
    """Computations that run when this does; not the scalar functions of reductions and sorts."""
    if self.opcode.endswith(("-done", "-update")):
      return []
    names = re.findall(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)", self.attributes)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
      names += re.findall(r"[\w.\-]+", group)
    if self.opcode in ("call", "call-start"):
      names += re.findall(r"to_apply=%?([\w.\-]+)", self.attributes)
    return names

  @property
  def target(self) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class _Computation:
  name: str
  instructions: dict[str, _Instruction]
  root: _Instruction

  @property
  def parameters(self) -> dict[int, _Instruction]:
    return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

  def users(self, name: str) -> list[_Instruction]:
    return [i for i in self.instructions.values() if name in i.operands]

  def operand(self, ins: _Instruction, index: int) -> _Instruction:
    return self.instructions[ins.operands[index]]


class _Module:
  """Computations of an HLO text by name."""

  def __init__(self, text: str):
    self.computations: dict[str, _Computation] = {}
    entry = None
    devices = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])]
    self.num_devices = math.prod(devices)
    name, root = "", None
    instructions: dict[str, _Instruction] = {}
    for line in text.splitlines():
      header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
      if header and not line.startswith("HloModule"):
        name, instructions, root = header[2], {}, None
        entry = name if header[1] else entry
      elif line.startswith("}") and instructions:
        last = next(reversed(instructions.values()))
        self.computations[name] = _Computation(name, instructions, root or last)
      elif ins := _instruction(line):
        instructions[ins.name] = ins
        if line.lstrip().startswith("ROOT "):
          root = ins
    if entry is None:
      raise ValueError("expected the text of a compiled program with an ENTRY computation, got none; use as_text()")
    self.entry = self.computations[entry]

  def __getitem__(self, name: str) -> _Computation:
    return self.computations[name]


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  return len(text)


def _instruction(line: str) -> _Instruction | None:
  head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  start = head.end()
  if line[start] == "(":
    end = _closing(line, start)
  else:  # no blank in an array's shape, `f32[8,128]{1,0:T(8,128)S(1)}`
    end = line.index(" ", start)
  opcode = re.compile(r"\s*([\w\-]+)\(").match(line, end)
  if not opcode:
    return None
  close = _closing(line, opcode.end() - 1)
  arguments = re.sub(r"/\*.*?\*/", "", line[opcode.end() : close - 1])
  names = () if opcode[1] in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", arguments))
  return _Instruction(head[1], line[start:end], opcode[1], names, arguments, line[close:])


def _array(dtype: str, dims: str, layout: str) -> _Array:
  bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
  shape = [int(d.lstrip("<=")) for d in dims.split(",") if d.lstrip("<=").isdigit()]
  order = [int(i) for i in re.findall(r"\d+", layout.split(":")[0])]
  tile = re.search(r"T\(([\d,]+)\)", layout)
  padded = list(shape)
  if tile and shape and len(order) == len(shape):
    sides = [int(side) for side in tile[1].split(",")]
    for axis, side in zip(order, reversed(sides), strict=False):  # order lists the axes from the innermost
      padded[axis] = -(-shape[axis] // side) * side
  logical, size = (math.ceil(math.prod(s) * bits / 8) for s in (shape, padded))
  return _Array(math.prod(shape), logical, size, "S(" not in layout)


# Collectives.

_Totals = dict[tuple[str, bool], Traffic]  # (kind, whether it leaves the slice) -> traffic
_Known = dict[tuple[int, int | None], int]  # (parameter, element of its tuple or None) -> integer
_Values = dict[tuple[int, int | None], int | None]


def _walk(scope: _Scope, devices_per_slice: int | None) -> tuple[_Totals, int]:
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
  module: _Module, computation: _Computation, ins: _Instruction, devices_per_slice: int | None
) -> tuple[str, bool, Traffic] | None:
  """(kind, whether it leaves the slice, traffic) of an instruction that starts a collective, else None."""
  kind = ins.opcode.removesuffix("-start")
  if kind not in KINDS or _is_running(computation, ins):
    return None
  taken = sum(a.logical for name in ins.operands for a in computation.instructions[name].arrays)
  if kind == "send":
    # The TPU's compiler has the hosts carry collectives between slices: it writes one slice's program.
    if name := re.search(r'_xla_megascale_transfer_type="(\w+)"', ins.attributes):
      kind = name[1].lower().replace("_", "-")
      return kind, True, _ring(kind, taken, _num_slices(ins.attributes))
    return None if "is_host_transfer=true" in ins.attributes else (kind, False, Traffic(1, taken, taken))
  if kind == "all-reduce" and _is_scattered(computation, ins):
    kind = "reduce-scatter"
  groups = _groups(ins.attributes, module.num_devices)
  across = bool(devices_per_slice) and bool(np.any(np.ptp(groups // (devices_per_slice or 1), axis=1)))
  if kind == "collective-permute":  # the groups are pairs, of which each device is the source of one
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


def _is_running(computation: _Computation, ins: _Instruction) -> bool:
  """Whether a collective in a fusion was started in another one.

  The TPU's compiler spreads one asynchronous collective over fusions that compute meanwhile: each repeats it, with a
  "chain_id", and the first holds the custom call "AsyncCollectiveStart".
  """
  if "chain_id=" not in ins.attributes:
    return False
  return all(i.target != "AsyncCollectiveStart" for i in computation.instructions.values())


def _is_scattered(computation: _Computation, ins: _Instruction) -> bool:
  """Whether an all-reduce is the TPU compiler's fusion "all-reduce-scatter", which sends what a reduce-scatter does."""
  return computation.name.startswith("all-reduce-scatter") and all(
    user.opcode in ("dynamic-slice", "bitcast") for user in computation.users(ins.name)
  )


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """Groups of devices (groups, size) of a collective, from any of the forms in which they are written.

  {{0,1},{2,3}}, or {} for all; [2,4]<=[8] or [4,2]<=[2,4]T(1,0), a reshaped (and transposed) count; and
  mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, or {'a':(2)2} for a part of an axis: all that differ there.
  References: openxla/xla, hlo/ir/replica_group.cc and mesh_and_axis.cc.
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
  # Split every axis where a part of it begins or ends, then move the parts that are named to the back.
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


# Loops.


class _Scope:
  """A computation, and the integers known of its parameters: {(parameter, element of its tuple or None): value}."""

  def __init__(self, module: _Module, computation: _Computation, known: _Known):
    self.module, self.computation, self.known = module, computation, known
    self.values: dict[str, int | None] = {}

  def called(self, ins: _Instruction, name: str) -> tuple[int | None, _Scope]:
    """How often `ins` runs the computation `name`, None if that is unknown, and that computation's scope."""
    inner = self.module[name]
    if ins.opcode != "while":
      values: _Values = {(i, None): self.integer(operand) for i, operand in enumerate(ins.operands)}
      return 1, _Scope(self.module, inner, _found(values))
    state = self.elements(self.computation.operand(ins, 0))
    fixed = _Scope(self.module, inner, {key: n for key, n in state.items() if _is_kept(inner, key[1])})
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', ins.attributes):
      return int(stated[1]), fixed
    # The TPU's compiler states no length, and may peel iterations off: the counter is followed from where it starts.
    condition = self.module[re.findall(r"condition=%?([\w.\-]+)", ins.attributes)[0]]
    for trips in range(_MAX_TRIPS):
      going = _Scope(self.module, condition, state).integer(condition.root.name)
      if not going:
        return None if going is None else trips, fixed
      state = _Scope(self.module, inner, state).elements(inner.root)
    return None, fixed

  def elements(self, ins: _Instruction) -> _Known:
    """The known integers of a tuple, the state of a loop."""
    if ins.opcode != "tuple":
      return {}
    return _found({(0, i): self.integer(name) for i, name in enumerate(ins.operands)})

  def integer(self, name: str) -> int | None:
    """Value of a scalar integer (or truth value) that depends on constants and what is known, else None."""
    if name not in self.values:
      ins = self.computation.instructions[name]
      self.values[name] = self._evaluate(ins) if re.match(r"(pred|[su]\d+)\[\]", ins.shape) else None
    return self.values[name]

  def _evaluate(self, ins: _Instruction) -> int | None:
    if ins.opcode == "constant":
      literal = {"true": "1", "false": "0"}.get(ins.arguments, ins.arguments)
      return int(literal) if re.fullmatch(r"-?\d+", literal) else None
    if ins.opcode == "parameter":
      return self.known.get((int(ins.arguments), None))
    if ins.opcode == "get-tuple-element":
      source, index = self.computation.operand(ins, 0), int(re.findall(r"index=(\d+)", ins.attributes)[0])
      if source.opcode == "parameter":
        return self.known.get((int(source.arguments), index))
      return self.integer(source.operands[index]) if source.opcode == "tuple" else None
    if ins.opcode in ("copy", "bitcast", "convert", "reshape"):
      return self.integer(ins.operands[0])
    if ins.opcode in ("fusion", "call"):
      scope = self.called(ins, ins.calls[0])[1]
      return scope.integer(scope.computation.root.name)
    if ins.opcode not in ("compare", *_ARITHMETIC):
      return None
    first, second = (self.integer(operand) for operand in ins.operands)
    if first is None or second is None:
      return None
    if ins.opcode == "compare":
      return int(getattr(operator, re.findall(r"direction=(\w+)", ins.attributes)[0].lower())(first, second))
    return _ARITHMETIC[ins.opcode](first, second)


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
  "add": operator.add,
  "subtract": operator.sub,
  "multiply": operator.mul,
  "and": operator.and_,
  "or": operator.or_,
  "minimum": min,
  "maximum": max,
}


def _found(values: _Values) -> _Known:
  return {key: value for key, value in values.items() if value is not None}


def _is_kept(body: _Computation, index: int | None) -> bool:
  """Whether the body of a loop hands on element `index` of its state as it got it."""
  if body.root.opcode != "tuple" or index is None:
    return False
  last = body.operand(body.root, index)
  if last.opcode != "get-tuple-element" or body.operand(last, 0).opcode != "parameter":
    return False
  return bool(re.search(rf"\bindex={index}\b", last.attributes))


# Memory.


def _memory(scope: _Scope) -> int:
  """Bytes that one execution of a computation moves."""
  total = 0
  for ins in scope.computation.instructions.values():
    if ins.opcode in ("fusion", "fusion-start"):
      total += _fusion_memory(scope.module, scope.computation, ins)
    elif ins.calls:
      parts = []
      for name in ins.calls:
        trips, below = scope.called(ins, name)
        parts.append((1 if trips is None else trips) * _memory(below))
      total += max(parts, default=0) if ins.opcode == "conditional" else sum(parts)
    elif ins.opcode not in _FREE and not ins.opcode.endswith(("-done", "-update")) and ins.target not in _FREE_TARGETS:
      total += sum(_moved(scope.computation, ins))
  return total


def _moved(computation: _Computation, ins: _Instruction) -> Iterator[int]:
  """Bytes of one instruction on its own: its reads, then its writes."""
  operands = [computation.instructions[name] for name in ins.operands]
  kind, results = ins.opcode.removesuffix("-start"), ins.arrays
  if kind != ins.opcode and kind not in ("all-reduce", "send"):
    # A start returns its operands again, the result, and flags; copy-start has the result in front.
    place = 0 if kind == "copy" else sum(len(operand.arrays) for operand in operands)
    results = results[place : place + max(1, place)] if kind in KINDS else results[place : place + 1]
  if kind in ("dynamic-slice", "slice", "gather"):
    if any(a.in_memory for a in operands[0].arrays):
      yield from (result.size for result in results)
  elif kind == "dynamic-update-slice":
    update = operands[1].arrays
    yield from (a.size for a in update if a.in_memory)
    yield from (a.size for a in update if results[0].in_memory)
    return
  else:
    yield from (a.size for operand in operands for a in operand.arrays if a.in_memory)
  yield from (a.size for a in results if a.in_memory)


# In a fusion these hand their operand on, element by element: what is not asked of their result is not read.
_VIEWS = frozenset(("bitcast", "copy", "convert", "reshape", "transpose"))


def _fusion_memory(module: _Module, computation: _Computation, ins: _Instruction) -> int:
  """Bytes of a fusion, of which nothing inside is ever in memory."""
  fused = module[ins.calls[0]]
  total = 0
  for i, name in enumerate(ins.operands):
    size = sum(a.size for a in computation.instructions[name].arrays if a.in_memory)
    total += math.ceil(size * _share(module, fused, fused.parameters[i])) if size else 0
  root = fused.root
  if root.opcode == "custom-call":  # an asynchronous collective; its start returns operand, result and flags
    return total + sum(a.size for a in ins.arrays[1:2] if a.in_memory and root.target == "AsyncCollectiveStart")
  roots = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
  spaces = ins.arrays if len(ins.arrays) == len(roots) else [r.arrays[0] for r in roots]
  return total + sum(
    _written(module, fused, part) for space, part in zip(spaces, roots, strict=True) if space.in_memory
  )


def _share(module: _Module, fused: _Computation, source: _Instruction, of_result: float = 1.0) -> float:
  """Share of the elements of `source` that a fusion reads, if `of_result` of its own result is read."""
  elements, total = sum(a.elements for a in source.arrays), 0.0
  if source is fused.root:
    return of_result
  for user in fused.users(source.name):
    first = user.operands[0] == source.name
    if first and user.opcode in ("dynamic-slice", "slice", "gather"):
      total += sum(a.elements for a in user.arrays) / max(elements, 1)
    elif user.opcode in _VIEWS:
      total += _share(module, fused, user, of_result)
    elif user.opcode == "fusion":
      inner, below = module[user.calls[0]], _share(module, fused, user, of_result)
      places = [i for i, name in enumerate(user.operands) if name == source.name]
      total += sum(_share(module, inner, inner.parameters[i], below) for i in places)
    elif first and user.opcode == "dynamic-update-slice":
      continue  # written in place
    elif source.opcode == "parameter" and user.opcode in ("tuple", "custom-call"):
      continue  # passed on
    elif not _is_running(fused, user):
      return 1.0
  return min(total, 1.0)


def _written(module: _Module, fused: _Computation, root: _Instruction) -> int:
  """Bytes that a fusion writes of the result that `root` makes."""
  if root.opcode == "parameter" or _is_running(fused, root):
    return 0
  inner = root
  while inner.opcode in _VIEWS:
    inner = fused.operand(inner, 0)
  if inner.opcode == "dynamic-update-slice":
    return sum(a.size for a in fused.operand(inner, 1).arrays)
  if inner.opcode == "fusion" and module[inner.calls[0]].root.opcode != "tuple":
    return _written(module, module[inner.calls[0]], module[inner.calls[0]].root)
  return sum(a.size for a in root.arrays)
