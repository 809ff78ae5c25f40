"""Plan of a comparison: its methods, and the runs of a seed in their order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pflow_jax.evaluation.compare_report import TEACHER
from pflow_jax.files import foreign
from pflow_jax.settings.config_file import read_config_file
from pflow_jax.settings.renamed import renewed
from pflow_jax.settings.sections import as_section, call, refuse_unknown
from pflow_jax.settings.tree import SECTIONS, Settings
from pflow_jax.training.network import OF_FLOW_MAPS

KEYS = ("teacher", "weak", "flops", "methods")
WEAK = "weak"


@dataclasses.dataclass(frozen=True)
class Method:
  """One method of a comparison.

  Attributes:
    name: of its folder, and for `only`.
    config: "path/of/config.py:variant", the path as for `pflow train`.
    students: the numbers of evaluations that each student is sampled with: ((1,), (2,)) are two students,
      ((1, 2),) is one. A policy student with one number is also trained for it, objective.nfe.
    title: in the table and the picture; by default the name.
    overrides: nested keys of the config, dict(objective=dict(dropout=0.1)).
    start: name of an earlier method; this one starts from that one's student for the same numbers of evaluations.
    weak: whether the weak teacher guides it.
  """

  name: str
  config: str
  students: tuple[tuple[int, ...], ...]
  title: str = ""
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  start: str | None = None
  weak: bool = False

  def __post_init__(self):
    if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in (TEACHER, WEAK):
      raise ValueError(
        f"config.methods: expected a name of letters, digits, '_', '.' and '-' other than {TEACHER!r} and {WEAK!r}, "
        f"got {self.name!r}"
      )
    numbers = [nfe for student in self.students for nfe in student]
    if not all(self.students) or not numbers or len(set(numbers)) < len(numbers):
      raise ValueError(
        f"config.methods, {self.name}: students: expected groups of numbers of evaluations, none of them twice, such "
        f"as ((1,), (2,)) or ((1, 2),), got {self.students}"
      )


@dataclasses.dataclass(frozen=True)
class Run:
  """One training and, of a student, its evaluation.

  Attributes:
    name: its folder below the seed's.
    method: its method's name, or "teacher", or "weak".
    settings: complete without the workdirs of the runs that it needs and, with a budget, train.steps.
    nfe: numbers of evaluations; () is a teacher, which its students' evaluations measure.
    flops: budget in operations; None trains for train.steps.
    needs: runs that have to be finished before, by the key of the config that takes their folder.
  """

  name: str
  method: str
  settings: Settings
  nfe: tuple[int, ...] = ()
  flops: float | None = None
  needs: Mapping[str, Run] = dataclasses.field(default_factory=dict)

  def described(self) -> dict[str, Any]:
    """All that its result depends on, in JSON's types."""
    needs = {key: run.described() for key, run in self.needs.items()}
    return {"config": self.settings.plain(), "flops": self.flops, "needs": needs}


def read_methods(config: Mapping[str, Any]) -> dict[str, Method]:
  """Reads the methods of a comparison, by name.

  Raises:
    ValueError: keys are unknown or missing.
  """
  refuse_unknown(config, KEYS, "config")
  missing = [key for key in KEYS if key != "weak" and not config.get(key)]
  if missing:
    raise ValueError(f"config: {', '.join(missing)} must be set")
  given = foreign.check_arguments(_comparison, {key: config[key] for key in ("flops", "methods")}, where="config")
  if given["flops"] <= 0:
    raise ValueError(f"config.flops: expected a number of operations > 0, got {config['flops']}")
  methods: dict[str, Method] = {}
  for values in given["methods"]:
    rest = as_section(values, "config.methods")
    name = str(rest.pop("name", ""))
    method = call(Method, f"methods, {name}", rest, name=name)
    if name in methods:
      raise ValueError(f"config.methods: expected every name once, got {name!r} twice")
    if method.start is not None:
      refuse_unknown({method.start: None}, list(methods), f"config.methods, {name}: start: the list before it")
      if not all(_student_of(methods[method.start], student) for student in method.students):
        raise ValueError(
          f"config.methods, {name}: expected students of {method.start} to start from, "
          f"{methods[method.start].students}, got {method.students}"
        )
    if method.weak and not config.get("weak"):
      raise ValueError(f"config.methods, {name}: weak needs the section config.weak")
    methods[name] = method
  return methods


def _comparison(flops: float, methods: tuple[Any, ...]) -> None:
  """Types of the keys of a comparison that are no sections."""


def plan(config: Mapping[str, Any], seed: int) -> list[Run]:
  """Makes all runs of one seed, each after those that it needs.

  Raises:
    ValueError: configs cannot be read, or their students are measured against different teachers.
  """
  methods = read_methods(config)
  numbers = {nfe for method in methods.values() for student in method.students for nfe in student}

  def teacher(section: str) -> Run:
    return Run(section, section, dataclasses.replace(call(read_config, section, config[section]), seed=seed))

  strong = teacher(TEACHER)
  common = strong.settings
  steps = tuple(sorted({*common.evaluate.teacher_steps, *numbers}))
  runs = {TEACHER: strong} | ({WEAK: teacher(WEAK)} if any(m.weak for m in methods.values()) else {})
  for method in methods.values():
    for nfe in method.students:
      where = f"methods, {method.name}"
      own = {name: common.plain()[name] for name in ("data", "model", "evaluate")}
      values = call(read_config, where, {"config": method.config}).plain()
      own["model"] |= {key: values["model"][key] for key in OF_FLOW_MAPS if key in values["model"]}
      student = Settings.of({**values, **own})
      student = dataclasses.replace(student, seed=seed).changed("evaluate", teacher_steps=steps)
      # All students are timed with one batch size.
      student = student.changed("sample", nfe=tuple(nfe), batch_size=common.sample.batch_size)
      if len(nfe) == 1 and "nfe" in {field.name for field in dataclasses.fields(student.objective)}:
        student = student.changed("objective", nfe=nfe[0])
      student = _overridden(student.plain(), method.overrides, f"config.{where}")
      needs = {"teacher.workdir": strong}
      if method.weak:
        needs["teacher.weak_workdir"] = runs[WEAK]
      if method.start:
        start = _student_of(methods[method.start], nfe)
        assert start is not None
        needs["start.workdir"] = runs[_run_name(method.start, start)]
      name = _run_name(method.name, nfe)
      runs[name] = Run(name, method.name, student, nfe, config["flops"], needs)
  _check_reference([run for run in runs.values() if run.nfe])
  return list(runs.values())


def read_config(config: str, overrides: Mapping[str, Any] | None = None) -> Settings:
  """Reads the settings of "path/of/config.py:variant", with nested keys changed.

  Raises:
    ValueError: the file fails, or sections or keys are unknown.
  """
  settings = _overridden(renewed(read_config_file(config).to_dict()), overrides or {}, config)
  for section in ("train", "optimizer"):
    settings.need(section)
  return settings


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Settings:
  overrides = renewed(overrides)
  refuse_unknown(overrides, SECTIONS, f"{where}: overrides")
  merged = dict(values)
  for section, changes in overrides.items():
    own = merged.get(section)
    merged[section] = {**own, **changes} if isinstance(own, Mapping) and isinstance(changes, Mapping) else changes
  try:
    return Settings.of(merged)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _student_of(method: Method, numbers: tuple[int, ...]) -> tuple[int, ...] | None:
  """Finds the student of a method that is sampled with all these numbers of evaluations."""
  return next((student for student in method.students if set(numbers) <= set(student)), None)


def _run_name(method: str, nfe: tuple[int, ...]) -> str:
  return f"{method}/nfe{'-'.join(map(str, nfe))}"


def _check_reference(runs: Sequence[Run]) -> None:
  """Raises ValueError unless all students have one teacher, with one guidance and sampler: the ratios' reference."""

  def reference(run: Run) -> str:
    t = run.settings.teacher
    weak = f", weak teacher {'teacher.weak_workdir' in run.needs}" if t and t.guidance != 1 else ""
    keys = ("guidance", "interval", "orthogonal", "which")
    shift = getattr(run.settings.objective, "shift", 1.0)
    return ", ".join(f"{key} {getattr(t, key, None)}" for key in keys) + f"{weak}, shift {shift}"

  references = {run.name: reference(run) for run in runs}
  if len(set(references.values())) > 1:
    listing = "".join(f"\n  {name}: {text}" for name, text in references.items())
    raise ValueError(f"methods that are compared must share a teacher's guidance and shift, got:{listing}")
