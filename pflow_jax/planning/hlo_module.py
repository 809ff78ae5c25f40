"""The text of a compiled program as computations and instructions, with the lengths of loops.

It reads the text, `jax.stages.Compiled.as_text()`, of the CPU's and the TPU's compiler. `planning.hlo`
counts the program's traffic.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable

_MAX_TRIPS = 1_000_000  # a loop is followed no longer than this
_Known = dict[tuple[int, int | None], int]  # (parameter, element of its tuple or None) -> integer
_Values = dict[tuple[int, int | None], int | None]


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape. `size` is in bytes, padded to its tiles; `logical` is not."""

  elements: int
  logical: int
  size: int
  in_memory: bool  # the device's main one


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str  # text between the parentheses
  attributes: str  # text after them

  @property
  def arrays(self) -> list[Array]:
    """The arrays of the result, nested tuples flattened."""
    return [_array(*found) for found in re.findall(r"(\w+)\[([\d,<=?]*)\](\{[^}]*\})?", self.shape)]

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
    """Name of a custom call's target; "" for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  """A computation, its instructions by name."""

  name: str
  instructions: dict[str, Instruction]
  root: Instruction

  @property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

  def users(self, name: str) -> list[Instruction]:
    """Returns the instructions that have `name` as an operand."""
    return [i for i in self.instructions.values() if name in i.operands]

  def operand(self, ins: Instruction, index: int) -> Instruction:
    """Returns the instruction that makes operand `index` of `ins`."""
    return self.instructions[ins.operands[index]]


class Module:
  """Computations of an HLO text by name."""

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    entry = None
    devices = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])]
    self.num_devices = math.prod(devices)
    name, root = "", None
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
      header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
      if header and not line.startswith("HloModule"):
        name, instructions, root = header[2], {}, None
        entry = name if header[1] else entry
      elif line.startswith("}") and instructions:
        last = next(reversed(instructions.values()))
        self.computations[name] = Computation(name, instructions, root or last)
      elif ins := _instruction(line):
        instructions[ins.name] = ins
        if line.lstrip().startswith("ROOT "):
          root = ins
    if entry is None:
      raise ValueError("expected the text of a compiled program with an ENTRY computation, got none; use as_text()")
    self.entry = self.computations[entry]

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  return len(text)


def _instruction(line: str) -> Instruction | None:
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
  return Instruction(head[1], line[start:end], opcode[1], names, arguments, line[close:])


def _array(dtype: str, dims: str, layout: str) -> Array:
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
  return Array(math.prod(shape), logical, size, "S(" not in layout)


class Scope:
  """A computation with the known integers of its parameters: {(parameter, element of its tuple or None): value}."""

  def __init__(self, module: Module, computation: Computation, known: _Known):
    self.module, self.computation, self.known = module, computation, known
    self.values: dict[str, int | None] = {}

  def called(self, ins: Instruction, name: str) -> tuple[int | None, Scope]:
    """Returns the number of times that `ins` runs the computation `name`, None if unknown, and that one's scope."""
    inner = self.module[name]
    if ins.opcode != "while":
      values: _Values = {(i, None): self.integer(operand) for i, operand in enumerate(ins.operands)}
      return 1, Scope(self.module, inner, _found(values))
    state = self.elements(self.computation.operand(ins, 0))
    fixed = Scope(self.module, inner, {key: n for key, n in state.items() if _is_kept(inner, key[1])})
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', ins.attributes):
      return int(stated[1]), fixed
    # The TPU's compiler states no length, and may peel iterations off: the counter is followed from its start.
    condition = self.module[re.findall(r"condition=%?([\w.\-]+)", ins.attributes)[0]]
    for trips in range(_MAX_TRIPS):
      going = Scope(self.module, condition, state).integer(condition.root.name)
      if not going:
        return None if going is None else trips, fixed
      state = Scope(self.module, inner, state).elements(inner.root)
    return None, fixed

  def elements(self, ins: Instruction) -> _Known:
    """The known integers of a tuple, the state of a loop."""
    if ins.opcode != "tuple":
      return {}
    return _found({(0, i): self.integer(name) for i, name in enumerate(ins.operands)})

  def integer(self, name: str) -> int | None:
    """Value of a scalar integer (or truth value) that depends on constants and known integers, else None."""
    if name not in self.values:
      ins = self.computation.instructions[name]
      self.values[name] = self._evaluate(ins) if re.match(r"(pred|[su]\d+)\[\]", ins.shape) else None
    return self.values[name]

  def _evaluate(self, ins: Instruction) -> int | None:
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


def _is_kept(body: Computation, index: int | None) -> bool:
  """Returns whether the body of a loop passes element `index` of its state on unchanged."""
  if body.root.opcode != "tuple" or index is None:
    return False
  last = body.operand(body.root, index)
  if last.opcode != "get-tuple-element" or body.operand(last, 0).opcode != "parameter":
    return False
  return bool(re.search(rf"\bindex={index}\b", last.attributes))
