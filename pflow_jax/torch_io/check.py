"""Names and shapes of tensors against what is expected: every problem in one message."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

Shape = tuple[int, ...]
_SHOWN = 8  # names of one kind of problem, those of all layers counted as one
_NEAR = 200  # names that are compared with another, which takes time,
_LENGTH = 120  # and their length; models have fewer and shorter ones


def check_tensors(
  expected: Mapping[str, Shape], got: Mapping[str, Shape], where: str, owner: str = "that its config describes"
) -> None:
  """Refuses tensors of other names or shapes.

  Args:
    expected: shapes by name.
    got: shapes by name.
    where: file, for errors.
    owner: words for whose tensors are expected.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape. All are listed, with the nearest names.
  """
  missing = [name for name in expected if name not in got]
  unexpected = [name for name in got if name not in expected]
  shapes = [name for name in expected if name in got and tuple(expected[name]) != tuple(got[name])]
  problems = []
  if missing:
    problems.append(f"{len(missing)} missing: {listing(missing, unexpected or list(got))}")
  if unexpected:
    problems.append(f"{len(unexpected)} unexpected: {listing(unexpected, missing or list(expected))}")
  if shapes:
    notes = {name: f" (expected {tuple(expected[name])}, got {tuple(got[name])})" for name in shapes}
    problems.append(f"{len(shapes)} of another shape: {listing(shapes, (), notes)}")
  if problems:
    raise ValueError(f"{where} does not hold the tensors {owner}: {'; '.join(problems)}")


def listing(names: Iterable[str], near: Sequence[str], notes: Mapping[str, str] | None = None) -> str:
  """Lists names, each with its note, or with the nearest of `near`; no more than _SHOWN of them.

  Names that differ in one number alone, with the same note, are one: "blocks.{0-18}.q.weight".

  Args:
    names: to be listed.
    near: names of the other kind.
    notes: by name.
  """
  notes = notes or {}
  numbers: dict[tuple[str, str], list[int]] = {}
  for name in names:
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    folded = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
    numbers.setdefault((folded, notes.get(name, "")), []).append(-1 if number is None else int(number[0]))
  close = _Nearest(near)
  found = []
  for (folded, note), layers in itertools.islice(numbers.items(), _SHOWN):
    name = folded.replace("{}", str(layers[0]) if len(layers) == 1 else f"{{{_ranges(layers)}}}")
    found.append(_cut(name) + (note or close.to(folded.replace("{}", str(layers[0])))))
  more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
  return ", ".join(found) + more


def _cut(name: str) -> str:
  return name if len(name) <= _LENGTH else f"{name[:_LENGTH]}..."


class _Nearest:
  """Finds near names fast enough for thousands: names of other layers are looked at once."""

  def __init__(self, names: Sequence[str]):
    self._by_shape: dict[str, list[str]] = {}
    for name in names:
      if len(name) <= _LENGTH:
        self._by_shape.setdefault(re.sub(r"\d+", "0", name), []).append(name)

  def to(self, name: str) -> str:
    shapes = list(itertools.islice(self._by_shape, _NEAR)) if len(name) <= _LENGTH else []
    found = difflib.get_close_matches(re.sub(r"\d+", "0", name), shapes, n=1, cutoff=0.6)
    if not found:
      return ""
    return f" (near: {max(self._by_shape[found[0]][:_NEAR], key=lambda other: _common(name, other))})"


def _common(a: str, b: str) -> float:
  return difflib.SequenceMatcher(None, a, b).ratio()


def _ranges(numbers: Sequence[int]) -> str:
  """[0, 1, 2, 5] -> "0-2,5"."""
  runs: list[list[int]] = []
  for number in sorted(numbers):
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
