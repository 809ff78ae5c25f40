"""Traffic of a compiled program to and from a device's main memory, instruction by instruction.

Read from XLA's own text, `jax.stages.Compiled.as_text()`, as `planning.hlo` reads the traffic between devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from pflow_jax.planning.hlo import KINDS, is_running
from pflow_jax.planning.hlo_module import Computation, Instruction, Module, Scope

# Instructions that move no bytes.
_FREE = frozenset(
  (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain"),
    *("opt-barrier", "partition-id", "replica-id", "recv"),
  )
)
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")


@dataclasses.dataclass(frozen=True)
class Move:
  """Bytes that the executions of one instruction move.

  Attributes:
    name: JAX's name of the operation, "jit(step)/.../blocks/qkv/dot_general"; "" if the compiler made it.
    opcode: XLA's, "fusion", "copy-start"; of a custom call its target.
    shape: of the result, in XLA's words.
    bytes: of all executions.
    count: executions.
  """

  name: str
  opcode: str
  shape: str
  bytes: int
  count: int


def memory_moves(text: str) -> list[Move]:
  """Estimate of the bytes that one execution of a compiled program moves to and from a device's main memory.

  Every instruction that is not inside a fusion reads its operands and writes its result; loops multiply. If a fusion
  only slices an operand, the slice counts; of a dynamic-update-slice, which XLA does in place, the update counts.
  Arrays in a TPU's on-chip memory (S(1) and the like in the layout) are free, and others have the size that their
  tiling pads them to.

  Limits: the estimate misses reads that hit a cache (CPU, GPU), the tiles that a fused product reads again, and the
  traffic of a kernel (custom call) beyond its operands and results. Gathers count their results, scatters whole
  operands; a loop of unknown length counts once, a conditional its largest branch. Without loops and on-chip memory it
  agrees with XLA's "bytes accessed", except for the ends of copies, which XLA counts again; no profile was compared.
  """
  module = Module(text)
  return _moves(Scope(module, module.entry, {}))


def memory_traffic(text: str) -> int:
  """Returns the sum of `memory_moves` in bytes."""
  return sum(move.bytes for move in memory_moves(text))


def _moves(scope: Scope) -> list[Move]:
  """Moves of one execution of a computation."""
  found: list[Move] = []
  for ins in scope.computation.instructions.values():
    if ins.opcode in ("fusion", "fusion-start"):
      found.append(_move(ins, _fusion_memory(scope.module, scope.computation, ins)))
    elif ins.calls:
      parts = []
      for name in ins.calls:
        trips, below = scope.called(ins, name)
        times = 1 if trips is None else trips
        inner = _moves(below) if times else []
        parts.append([dataclasses.replace(m, bytes=m.bytes * times, count=m.count * times) for m in inner])
      if ins.opcode == "conditional" and parts:
        parts = [max(parts, key=lambda moves: sum(move.bytes for move in moves))]
      found += itertools.chain.from_iterable(parts)
    elif ins.opcode not in _FREE and not ins.opcode.endswith(("-done", "-update")) and ins.target not in _FREE_TARGETS:
      found.append(_move(ins, sum(_moved(scope.computation, ins))))
  return [move for move in found if move.bytes]


def _move(ins: Instruction, size: int) -> Move:
  name = re.search(r'op_name="([^"]*)"', ins.attributes)
  return Move(name[1] if name else "", ins.target or ins.opcode, ins.shape, size, 1)


def _moved(computation: Computation, ins: Instruction) -> Iterator[int]:
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


# In a fusion these pass their operand on element by element: an element that nobody needs is not read.
_VIEWS = frozenset(("bitcast", "copy", "convert", "reshape", "transpose"))


def _fusion_memory(module: Module, computation: Computation, ins: Instruction) -> int:
  """Bytes that a fusion moves; the results inside of it are never in memory."""
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


def _share(module: Module, fused: Computation, source: Instruction, of_result: float = 1.0) -> float:
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
    elif not is_running(fused, user):
      return 1.0
  return min(total, 1.0)


def _written(module: Module, fused: Computation, root: Instruction) -> int:
  """Bytes that a fusion writes of the result that `root` makes."""
  if root.opcode == "parameter" or is_running(fused, root):
    return 0
  inner = root
  while inner.opcode in _VIEWS:
    inner = fused.operand(inner, 0)
  if inner.opcode == "dynamic-update-slice":
    return sum(a.size for a in fused.operand(inner, 1).arrays)
  if inner.opcode == "fusion" and module[inner.calls[0]].root.opcode != "tuple":
    return _written(module, module[inner.calls[0]], module[inner.calls[0]].root)
  return sum(a.size for a in root.arrays)
