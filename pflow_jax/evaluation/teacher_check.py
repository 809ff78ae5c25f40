"""Looks for what is wrong with a teacher before a student is trained: its arrays, its conventions, its condition.

On x = (1 - t) x0 + t eps the best velocity minimises E|v - (eps - x0)|^2. A teacher of another convention misses it by
far, and the same numbers read in that convention come close: so the convention is found from examples alone.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import data as datasets
from pflow_jax.core.checks import described
from pflow_jax.data.dataset import Dataset
from pflow_jax.evaluation.conventions import Reading, code_of, gaussian, noised, readings
from pflow_jax.files.progress import SHOWN, Progress, progress
from pflow_jax.mesh.distributed import is_first
from pflow_jax.training.teachers import Teacher

Array = np.ndarray
Field = Callable[[Array, Array, Any], Array]

LOW, HIGH = 0.2, 0.8  # flow times at which conventions are compared: at the ends some of them divide by zero
BETTER = 0.9  # a convention is taken for the teacher's if it has less than this share of the error as it is
MARGIN = 4.0  # standard errors that a difference of errors must be above
SAME = 0.03  # relative difference of two results that rounding to bfloat16 explains
FAINT = 0.02  # share of the squared error that labels must change to tell their order
MAX_CLASSES = 24  # whose order is looked for
PASSES = 16  # over the examples, about


@dataclasses.dataclass(frozen=True)
class Problem:
  """Something that is wrong with a teacher.

  Attributes:
    kind: "call", "traced", "shape", "dtype", "finite", "random", "batch", "time direction", "time scale", "sign",
      "prediction", "data scale", "velocity scale", "fit", "condition" or "labels"; several of them joined by " and ".
    text: what was found.
    fix: what to do, in code where code does it: `velocity` is the teacher's function there.
  """

  kind: str
  text: str
  fix: str

  def __str__(self) -> str:
    return f"{self.kind}: {self.text}"


@dataclasses.dataclass(frozen=True, repr=False)
class TeacherReport:
  """Result of `check_teacher`; a notebook shows it as a list.

  Attributes:
    problems: all that were found; none for a right teacher.
    errors: mean squared error of its velocity relative to that of a Gaussian fit to the data, by flow time; empty where
      it could not be measured.
    about: what was checked.
  """

  problems: list[Problem]
  errors: dict[float, float]
  about: str

  @property
  def ok(self) -> bool:
    """Returns whether no problem was found."""
    return not self.problems

  def __repr__(self) -> str:
    lines = [f"{self.about}: {self._verdict}", *([self._measured] if self.errors else [])]
    for problem in self.problems:
      lines += [f"* {problem}", *(f"    {line}" for line in problem.fix.splitlines())]
    return "\n".join(lines)

  def _repr_html_(self) -> str:
    items = (
      f"<li><b>{html.escape(one.kind)}</b>: {html.escape(one.text)}<pre>{html.escape(one.fix)}</pre></li>"
      for one in self.problems
    )
    measured = f"<br>{html.escape(self._measured)}" if self.errors else ""
    return f"<div>{html.escape(self.about)}: <b>{self._verdict}</b>{measured}<ul>{''.join(items)}</ul></div>"

  @property
  def _verdict(self) -> str:
    count = len(self.problems)
    return "ok" if self.ok else f"{count} problem{'s' * (count > 1)}"

  @property
  def _measured(self) -> str:
    errors = ", ".join(f"{error:.2f} at t = {t:.2f}" for t, error in self.errors.items())
    return f"error relative to a Gaussian fit's: {errors}"


def check(teacher: Teacher, dataset: Dataset, *, num: int, batch_size: int, seed: int) -> TeacherReport:
  """Checks a teacher on examples of a data set, see `commands.library.check_teacher`."""
  problems: list[Problem] = []
  with progress(PASSES, 0, "check_teacher", not is_first(), unit="passes", delay=SHOWN) as report:
    size = min(num, dataset.num_records or num)
    errors = _check(teacher, dataset, size, min(batch_size, size), seed, problems, report)
    report.update(report.total)
  note = "" if teacher.settings.guidance == 1 else ", errors without guidance"
  return TeacherReport(problems, errors, f"{teacher} on {dataset.name}{note}")


def _check(
  teacher: Teacher, dataset: Dataset, num: int, size: int, seed: int, problems: list[Problem], report: Progress
) -> dict[float, float]:
  """Appends what is wrong, and returns the errors by flow time."""
  rng = np.random.default_rng(seed)
  x0, cond = datasets.examples(dataset, num, seed)
  eps = rng.standard_normal((num, *dataset.shape), np.float32)
  t = (LOW + (HIGH - LOW) * (rng.permutation(num) + 0.5) / num).astype(np.float32)
  clean = np.zeros_like(eps) if x0 is None else np.asarray(x0, np.float32)
  x, params = noised(clean, eps, t), teacher.load()
  field = lambda params, *given: teacher.velocity(params, 1.0)(*given)  # guidance moves it away from the least error
  call = _callable(field, params, (x[:size], t[:size], _rows(cond, np.arange(size))), problems)
  if call is None:
    return {}
  run = _in_batches(call, size, report)
  v = run(x, t, cond)
  if wrong := _of_numbers(run, size, x, t, cond, v):
    problems.append(wrong)
  if not np.isfinite(v).all() or (wrong and wrong.kind == "random"):
    return {}
  if teacher.settings.guidance != 1:
    whole = functools.partial(jax.jit(lambda params, *given: teacher.velocity(params)(*given)), params)
    low, high = teacher.settings.interval
    acts = bool(np.any((low <= t) & (t <= high)))
    problems += _of_guidance(run, _in_batches(whole, size, report), dataset, acts, x, t, cond)
  if x0 is None:
    problems += _of_ends(run, x, eps, cond)
    return {}
  target, gauss = eps - clean, gaussian(clean, x, t)
  of = lambda value: np.mean(np.square(np.float64(value) - target).reshape(num, -1), axis=1)
  own, base = of(v), of(gauss)
  found, least = _best_reading(run, dataset, clean, x, t, cond, own, base, of)
  if found is not None:
    told = f"{found.text}; its error is then {least / base.sum():.2f} of a Gaussian fit's"
    problems.append(Problem(found.kind, f"{told}, and as it is {own.sum() / base.sum():.2f}", found.fix))
  edges = np.linspace(LOW, HIGH, 4)
  bins = [(t >= low) & (t < high) for low, high in itertools.pairwise(edges)]
  errors = {round(float(t[b].mean()), 2): float(own[b].sum() / base[b].sum()) for b in bins if b.any()}
  read = run if found is None else lambda x, t, cond: found.meant(run(*found.asked(x, t), cond), x, t)
  if found is None or "prediction" not in found.kind:  # the code of a prediction's fix keeps away from the ends
    problems += _of_ends(read, x, eps, cond)
  if dataset.num_classes > 1 or dataset.embedding is not None:
    problems += _of_condition(read, dataset, clean, eps, cond, rng)
  if found is None and not any(one.kind == "labels" for one in problems):
    problems += _of_size(v, target, of, own, base, errors)
  return errors


def _rows(cond: Any, rows: Array) -> Any:
  return jax.tree.map(lambda a: np.asarray(a)[rows], cond)


def _callable(
  field: Callable[..., Any], params: Any, example: tuple[Array, Array, Any], problems: list[Problem]
) -> Field | None:
  """Returns the field compiled, or as it is where JAX cannot trace it; None, with a problem, where it fails."""
  given = jax.tree.map(jnp.asarray, example)
  call: Field = functools.partial(jax.jit(field), params)
  try:
    value = jax.eval_shape(field, params, *given)
  except Exception as error:  # the function is the user's, and may fail in any way
    call = lambda *given: np.asarray(field(params, *given), np.float32)
    try:
      value = call(*given)
    except Exception:
      asked = f"velocity(x {described(example[0])}, t {described(example[1])}, cond)"
      text = f"{asked} raises {type(error).__name__}: {_first_line(error)}"
      problems.append(Problem("call", text, "It is called with a batch: states x, a flow time for each, conditions."))
      return None
    text = f"JAX cannot trace it ({type(error).__name__}: {_first_line(error)})"
    problems.append(Problem("traced", text, _CALLBACK))
  x = example[0]
  if getattr(value, "shape", None) != x.shape:
    text = f"expected one array {described(x)}, the shape of x, got {described(value)}"
    problems.append(Problem("shape", text, "Return one array of the shape of x: (B, *space, C), channels last."))
    return None
  if not jnp.issubdtype(value.dtype, jnp.floating) or jnp.promote_types(value.dtype, x.dtype) != x.dtype:
    text = f"expected {x.dtype} or a narrower floating type, got {value.dtype}"
    problems.append(Problem("dtype", text, code_of("velocity(x, t, cond).astype(x.dtype)")))
    return None
  return call


def _in_batches(call: Field, size: int, report: Progress) -> Field:
  """Returns the field for any number of examples, which are given in batches of one size."""

  def run(x: Array, t: Array, cond: Any) -> Array:
    parts, count = [], len(x)
    for start in range(0, count, size):
      rows = np.arange(start, start + size) % count
      given = jax.tree.map(jnp.asarray, (x[rows], t[rows].astype(np.float32), _rows(cond, rows)))
      parts.append(np.asarray(call(*given), np.float32))
    report.total = max(report.total, report.done + 2)
    report.update(report.done + 1)
    return np.concatenate(parts)[:count]

  return run


def _of_numbers(run: Field, size: int, x: Array, t: Array, cond: Any, v: Array) -> Problem | None:
  """Returns what is wrong with numbers v, whatever they mean."""
  count = len(x)
  if bad := np.sum(~np.isfinite(v).reshape(count, -1).all(1)):
    text = f"the velocity of {bad} of {count} examples at t from {LOW} to {HIGH} is not finite"
    return Problem("finite", text, "Look for a division by zero, or for parameters that are not finite.")
  scale = np.abs(v).max() * SAME
  if np.abs(run(x, t, cond) - v).max() > scale:
    text = "the same arguments give other values: it draws random numbers"
    return Problem("random", text, "Switch dropout off (deterministic=True, train=False, eval()).")
  order = np.random.default_rng(0).permutation(count)  # the same examples, each among others with other times
  if size > 1 and np.abs(run(x[order], t[order], _rows(cond, order)) - v[order]).max() > scale:
    text = "the velocity of an example depends on the others in its batch, or on their flow times"
    fix = "Use a time for each example, t[:, None, None, None]; take norms and means over an example alone."
    return Problem("batch", text, fix)
  return None


def _of_ends(run: Field, x: Array, eps: Array, cond: Any) -> Iterator[Problem]:
  """Yields a problem if velocities near t = 0 and 1 are not finite; a student starts at t = 1."""
  ends = {1.0: eps, 0.99: eps, 0.01: x}
  with np.errstate(all="ignore"):
    bad = [at for at, y in ends.items() if not np.isfinite(run(y, np.full(len(y), at), cond)).all()]
  if bad:
    text = f"the velocity is not finite at t = {', '.join(map(str, bad))}; a student starts at t = 1"
    yield Problem("finite", text, code_of("velocity(x, t.clip(1e-3, 1 - 1e-3), cond)"))


def _of_guidance(
  run: Field, guided: Field, dataset: Dataset, acts: bool, x: Array, t: Array, cond: Any
) -> Iterator[Problem]:
  """Yields problems of guidance, which `acts` at some of the times: its numbers, and the empty condition of classes."""
  v = guided(x, t, cond)
  if not np.isfinite(v).all():
    yield Problem("finite", "the guided velocity is not finite", "Give a lower strength, or an interval.")
  elif acts and np.abs(v - run(x, t, cond)).max() <= 1e-5 * np.abs(v).max():
    text = "guidance changes nothing: the empty condition gives the velocity of every other"
    yield Problem("condition", text, "Give null_cond=, the condition that the teacher was trained to know as none.")
  if dataset.num_classes > 1 and dataset.embedding is None:
    none, last = (
      run(x, t, np.full(len(x), label, np.int32)) for label in (dataset.num_classes, dataset.num_classes - 1)
    )
    if np.array_equal(none, last):
      text = f"the empty condition, label {dataset.num_classes}, gives the velocity of the last class"
      yield Problem(
        "condition", text, "An index past the end of a table is its last row: give null_cond=, or a row more."
      )


def _best_reading(
  run: Field,
  dataset: Dataset,
  x0: Array,
  x: Array,
  t: Array,
  cond: Any,
  own: Array,
  base: Array,
  of: Callable[[Array], Array],
) -> tuple[Reading | None, float]:
  """Returns the convention that fits better than this package's, or None, and the sum of its errors."""
  outputs: dict[bytes, Array] = {}
  # It has to know more than the Gaussian fit; guidance inside the function may cost that, but not the difference.
  best, least = None, min(BETTER * own.sum(), max(base.sum(), min(0.2 * own.sum(), 1.5 * base.sum())))
  for reading in readings(x0):
    given = reading.asked(x, t)
    key = given[0].tobytes() + given[1].tobytes()  # several conventions ask the same
    if key not in outputs:
      outputs[key] = run(*given, cond)
    with np.errstate(all="ignore"):
      error = of(reading.meant(outputs[key], x, t))
    if np.isfinite(error).all() and error.sum() < least and _is_clear(own - error):
      best, least = reading, error.sum()
  return best, float(least)


def _is_clear(difference: Array) -> bool:
  """Returns whether the mean of differences (n,) is above 0 by MARGIN standard errors."""
  return bool(difference.mean() > MARGIN * difference.std() / len(difference) ** 0.5)


def _of_size(
  v: Array, target: Array, of: Callable[[Array], Array], own: Array, base: Array, errors: dict[float, float]
) -> Iterator[Problem]:
  """Yields problems of a velocity of the right convention: its scale, or that it does not fit at all."""
  factor = float(np.vdot(v, target) / max(np.vdot(v, v), 1e-12))
  scaled = of(factor * v)
  if not 0.5 < factor < 2 and scaled.sum() < BETTER * min(own.sum(), base.sum()) and _is_clear(own - scaled):
    text = f"{factor:.3g} times its velocity fits better, with {scaled.sum() / own.sum():.2g} of its error"
    yield Problem("velocity scale", text, code_of(f"{factor:.4g} * velocity(x, t, cond)"))
  # Guidance inside the function costs error where there is much noise. The fit is to these very examples, which makes
  # it better than the truth of normal data, by a share of 1 / num and by chance.
  elif min(errors.values()) >= 1 + 2 / len(own) and _is_clear(own - base):
    text = (
      f"its error is {own.sum() / base.sum():.2f} of a Gaussian fit's, which knows the data's mean and variance alone"
    )
    fix = "Train it longer; or these are not its data, or its path from data to noise is another (alpha, sigma)."
    yield Problem("fit", text, fix)


def _of_condition(read: Field, dataset: Dataset, x0: Array, eps: Array, cond: Any, rng: Any) -> Iterator[Problem]:
  """Yields problems of the condition: it changes nothing, or means something else."""
  count = len(x0)
  t = 0.6 + 0.3 * rng.random(count, np.float32)
  x = noised(x0, eps, t)
  error = lambda v: np.mean(np.square(v - (eps - x0)).reshape(count, -1), axis=1)
  right = read(x, t, cond)
  if dataset.embedding is None:
    others = np.asarray((cond + rng.integers(1, dataset.num_classes, count)) % dataset.num_classes, np.int32)
  else:
    others = _rows(cond, np.roll(np.arange(count), 1))
  wrong = read(x, t, others)
  if np.abs(wrong - right).max() <= 1e-5 * np.abs(right).max():
    text = "the condition changes nothing: with another one the velocity is the same"
    fix = "Pass cond on to the network; a teacher that has none goes with data without labels, from_arrays(x0)."
    yield Problem("condition", text, fix)
    return
  own, other = error(right), error(wrong)
  effect = np.mean(np.square(wrong - right).reshape(count, -1), axis=1)  # what other labels cost where all is right
  # What hardly depends on labels, as after a few steps of training, says nothing of their order.
  if dataset.embedding is not None or own.mean() < other.mean() or effect.mean() < FAINT * own.mean():
    return
  if not _is_clear(effect + own - other):
    return
  text = "other labels fit the examples as well as their own: its classes are in another order"
  fix = "Map the labels to the teacher's before it is called."
  classes = dataset.num_classes
  if classes <= MAX_CLASSES:
    from scipy.optimize import linear_sum_assignment  # slow to import

    errors = np.stack([error(read(x, t, np.full(count, k, np.int32))) for k in range(classes)])  # (label, example)
    mean = np.array([errors[:, cond == k].mean(1) if np.any(cond == k) else np.zeros(classes) for k in range(classes)])
    order = linear_sum_assignment(mean)[1]
    moved = [f"{k} is its {order[k]}" for k in range(classes) if order[k] != k]
    if moved and error(read(x, t, np.asarray(order, np.int32)[cond])).mean() < own.mean():
      text += f"; class {', '.join(moved[:8])}{', ...' if len(moved) > 8 else ''}"
      fix = code_of("velocity(x, t, order[cond])", f"order = jnp.array({order.tolist()})")
  yield Problem("labels", text, fix)


def _first_line(error: Exception) -> str:
  return next(iter(str(error).strip().splitlines()), "")[:300]


_CALLBACK = """def corrected(x, t, cond):
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return jax.pure_callback(lambda *a: np.asarray(velocity(*a), np.float32), like, x, t, cond)

teacher = pf.Teacher(corrected)"""
