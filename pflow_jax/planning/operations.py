"""The bytes that a step moves, by kind of work and by operation: where they could be saved."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from pflow_jax.mesh.sharding import Layout
from pflow_jax.planning.hlo_memory import Move

KINDS = ("attention", "MLP", "norms and gates", "kept", "copies", "weights", "collectives", "optimizer", "other")
"""Kinds of work. "kept" are values that blocks leave for the backward pass; "copies" changes of layout and prefetches,
which the compiler adds; "weights" the same of weights, and their conversion; "other" is what lies outside of the
blocks, such as first and last layers, policy and loss."""

LISTED = 40  # operations of a report

# Kind -> parts of a block's names of operations.
_PARTS = {
  "MLP": {"mlp_in", "mlp_out", "jit(gelu)"},
  "attention": {"attention", "qkv", "q", "k", "v", "q_norm", "k_norm", "proj", "out"},
}


@dataclasses.dataclass(frozen=True)
class Operation:
  """Bytes that the executions of like instructions move.

  Attributes:
    kind: one of KINDS.
    name: last parts of JAX's name, or XLA's opcode.
    shape: of the first result.
    bytes: of all executions.
    count: executions.
  """

  kind: str
  name: str
  shape: str
  bytes: int
  count: int


def operations(moves: Iterable[Move], params: Any, layout: Layout) -> list[Operation]:
  """Groups moves by operation and shape, the largest first.

  Args:
    moves: of a compiled step.
    params: tree of the parameters of its networks (arrays or shapes).
    layout: their layout, by which weights in parts are known.
  """
  weights = _shapes_of_weights(params, layout)
  size: collections.Counter[tuple[str, str, str]] = collections.Counter()
  count: collections.Counter[tuple[str, str, str]] = collections.Counter()
  for move in moves:
    key = _kind(move, weights), _short(move), _first_shape(move.shape)
    size[key] += move.bytes
    count[key] += move.count
  return [Operation(*key, bytes=number, count=count[key]) for key, number in size.most_common()]


def as_dict(found: Sequence[Operation]) -> dict[str, Any]:
  """For a report: bytes by kind, and the largest operations."""
  kinds = {kind: sum(one.bytes for one in found if one.kind == kind) for kind in KINDS}
  return {"kinds": kinds, "operations": [dataclasses.asdict(one) for one in found[:LISTED]]}


def _kind(move: Move, weights: set[tuple[int, ...]]) -> str:
  path = move.name
  if re.match(r"(all|reduce|collective|ragged)-", move.opcode):
    return "collectives"
  if path and "jvp(" not in path and "transpose(" not in path:
    return "optimizer"
  is_weight = _dims(move.shape)[-2:] in weights
  if not path or re.match(r"(copy|slice|reshape|transpose|broadcast|bitcast)", move.opcode):
    return "weights" if is_weight else "copies"
  if re.search(r"dynamic_(update_)?index_in_dim", path):  # of the arrays that a scan over blocks stacks
    return "weights" if is_weight else "kept"
  if "blocks/" not in path:
    return "other"
  inside = {re.sub(r"^(img|txt)_", "", part) for part in path.rsplit("blocks/", 1)[1].split("/")}
  return next((kind for kind, parts in _PARTS.items() if inside & parts), "norms and gates")


def _short(move: Move) -> str:
  """The last parts of a name, behind the direction in which the network runs."""
  if not move.name:
    return move.opcode
  again = "rematted_computation" in move.name
  backward = "transpose(" in move.name and not again
  prefix = "again: " if again else "backward: " if backward else ""
  parts = [part for part in move.name.split("/") if part not in ("while", "body", "closed_call", "checkpoint")]
  named = f"{prefix}{'/'.join(parts[-2:])}"
  return named if move.opcode.startswith(("fusion", "tpu_custom_call")) else f"{named} ({move.opcode})"


def _first_shape(shape: str) -> str:
  found = re.search(r"\w+\[[\d,]*\]", shape)
  return found[0] if found else shape


def _dims(shape: str) -> tuple[int, ...]:
  found = re.search(r"\w+\[([\d,]*)\]", shape)
  return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def _shapes_of_weights(params: Any, layout: Layout) -> set[tuple[int, ...]]:
  """Last two dimensions that a weight may have on a device: whole, or in parts."""
  sizes = [layout.mesh.shape[axis] for axis in ("fsdp", "tensor")]
  parts = {1, *sizes, math.prod(sizes)}
  shapes = {tuple(leaf.shape[-2:]) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
  return {
    (rows // a, columns // b)
    for rows, columns in shapes
    for a in parts
    for b in parts
    if rows % a == 0 and columns % b == 0
  }
