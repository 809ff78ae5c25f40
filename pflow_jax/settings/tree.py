"""All settings of a run, parsed once where its config comes in."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from pflow_jax.core.objectives import OBJECTIVES, PRETRAINED, settings_of
from pflow_jax.core.objectives.adversarial import Adversarial
from pflow_jax.settings.adapters import AdapterSettings
from pflow_jax.settings.mesh import MeshSettings
from pflow_jax.settings.optimizer import EmaSettings, OptimizerSettings
from pflow_jax.settings.renamed import renewed
from pflow_jax.settings.sample import EvaluateSettings, SampleSettings
from pflow_jax.settings.sections import as_section, call, check_sections, choose, refuse_unknown
from pflow_jax.settings.teacher import StartSettings, TeacherSettings
from pflow_jax.settings.train import TrainSettings

OWNERS: dict[str, type] = {
  "adapters": AdapterSettings,
  "teacher": TeacherSettings,
  "start": StartSettings,
  "adversarial": Adversarial,
  "optimizer": OptimizerSettings,
  "ema": EmaSettings,
  "train": TrainSettings,
  "sample": SampleSettings,
  "evaluate": EvaluateSettings,
  "mesh": MeshSettings,
}
"""Sections whose keys are the fields of one class."""

SECTIONS = ("seed", "data", "model", "head", "objective", *OWNERS)


@dataclasses.dataclass(frozen=True)
class Choice:
  """The name and the options of one of several kinds, such as a network's.

  The options are checked by the code that makes it.
  """

  kind: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, section: Any, where: str = "config") -> Choice:
    """Parses a section, whose key `kind` is the name.

    Raises:
      ValueError: it is no section, or has no kind.
    """
    options = as_section(section, where)
    kind = options.pop("kind", None)
    if kind is None:
      raise ValueError(f"{where}: kind must be set")
    return cls(kind, _with_tuples(options))

  def get(self, name: str, default: Any = None) -> Any:
    """An option, or `default` where it is not set."""
    value = self.options.get(name)
    return default if value is None else value

  def plain(self) -> dict[str, Any]:
    """The section of a config."""
    return {"kind": self.kind, **self.options}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; each field is a section of its config.

  Attributes:
    data: options of `data.load`, its name among them; empty for a model that an early version converted.
    model: the network, of `networks.registry`.
    head: its output layer.
    kind: of the objective, one of `core.objectives.OBJECTIVES`.
    objective: its settings.
    adapters: low-rank adapters of a student.
    teacher: a student's teacher; None for a run that learns from data alone.
    start: the run that the parameters start from.
    adversarial: adversarial finetuning of a flow map, or None.
    optimizer: None for a model that was not trained here.
    ema: the average of the parameters.
    train: length and bookkeeping; None for a model that was not trained here.
    sample: of the samples.
    evaluate: of the evaluation.
    mesh: of the devices.
    seed: of the whole run.
    source: origin of a converted model, or None.
  """

  data: Mapping[str, Any]
  model: Choice
  head: Choice
  kind: str
  objective: Any
  adapters: AdapterSettings = AdapterSettings()
  teacher: TeacherSettings | None = None
  start: StartSettings = StartSettings()
  adversarial: Adversarial | None = None
  optimizer: OptimizerSettings | None = None
  ema: EmaSettings = EmaSettings()
  train: TrainSettings | None = None
  sample: SampleSettings = SampleSettings()
  evaluate: EvaluateSettings = EvaluateSettings()
  mesh: MeshSettings = MeshSettings()
  seed: int = 0
  source: Mapping[str, Any] | None = None

  @classmethod
  def of(
    cls, config: Settings | Mapping[str, Any], *, converted: bool = False, quiet: bool = False, where: str = "config"
  ) -> Settings:
    """Parses a config; parsed settings are returned as they are.

    Args:
      config: sections by name, such as a ConfigDict.
      converted: whether it may be that of a converted model.
      quiet: whether to leave out warnings of former names.
      where: its name in errors.

    Raises:
      ValueError: an unknown section or key, with the nearest known one; a value that does not fit.
    """
    if isinstance(config, Settings):
      return config
    values = renewed(as_section(config, where), quiet=quiet)
    kind = as_section(values.get("objective") or {}, f"{where}.objective").get("kind")
    converted = converted and kind == PRETRAINED
    known = (*SECTIONS, "source") if converted else SECTIONS
    needed = ("model", "head", "objective") if converted else ("data", "model", "head", "objective")
    check_sections(values, known, needed, where=where)
    kinds = {name: make for name, make in OBJECTIVES.items() if converted or name != PRETRAINED}
    make, options = choose(kinds, "objective", values["objective"])
    assert kind is not None
    parsed: dict[str, Any] = {
      name: made
      for name, owner in OWNERS.items()
      if values.get(name) is not None and (made := _parsed(owner, name, values[name])) is not None
    }
    return cls(
      data=_with_tuples(as_section(values.get("data", {}), "config.data")),
      model=Choice.of(values["model"], "config.model"),
      head=Choice.of(values["head"], "config.head"),
      kind=kind,
      objective=call(make, "objective", options, settings=settings_of(kind)),
      seed=values.get("seed", 0),
      source=as_section(values["source"], "config.source") if values.get("source") is not None else None,
      **parsed,
    )

  @property
  def converted(self) -> bool:
    """Returns whether it is a model that was trained elsewhere and converted."""
    return self.kind == PRETRAINED

  def need(self, section: str) -> Any:
    """Returns a section that may be absent.

    Raises:
      ValueError: it is absent.
    """
    value = getattr(self, section)
    if value is None:
      raise ValueError(f"config.{section}: {', '.join(_required(OWNERS[section])) or 'the section'} must be set")
    return value

  def changed(self, section: str, **values: Any) -> Settings:
    """Returns these settings with other values of a section's keys."""
    own, new = getattr(self, section), dict[str, Any]()
    if isinstance(own, Choice):
      new[section] = Choice(own.kind, {**own.options, **values})
    elif isinstance(own, Mapping):
      new[section] = {**own, **values}
    else:
      new[section] = call(type(own), section, _fields(own) | values)
    return dataclasses.replace(self, **new)

  def plain(self) -> dict[str, Any]:
    """Returns the config in JSON's types: nested dicts, lists, numbers, strings, None."""
    return json.loads(json.dumps(dict(self._sections())))

  def config(self, hints: Mapping[str, Mapping[str, Any]] | None = None) -> ConfigDict:
    """Returns the config as a ConfigDict that a command line can change; unset keys know their type.

    Args:
      hints: annotations of the options of the sections "model" and "head".
    """
    owners = {**{name: type(value) for name, value in vars(self).items() if name in OWNERS}, "objective": None}
    config = ConfigDict()
    for name, values in self._sections():
      if not isinstance(values, Mapping):
        config[name] = values
        continue
      owner = settings_of(self.kind) if name == "objective" else owners.get(name)
      known = typing.get_type_hints(owner) if owner else (hints or {}).get(name, {})
      config[name] = {key: unset(known[key]) if v is None and key in known else v for key, v in values.items()}
    return config

  def _sections(self) -> Iterator[tuple[str, Any]]:
    yield "seed", self.seed
    yield "data", dict(self.data)
    yield "model", self.model.plain()
    yield "head", self.head.plain()
    yield "objective", {"kind": self.kind, **_fields(self.objective)}
    for name in OWNERS:
      if getattr(self, name) is not None:
        yield name, _fields(getattr(self, name))
    if self.source is not None:
      yield "source", dict(self.source)


def _fields(value: Any) -> dict[str, Any]:
  return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _required(owner: type) -> list[str]:
  return [field.name for field in dataclasses.fields(owner) if field.default is dataclasses.MISSING]


def _parsed(owner: type, name: str, values: Any) -> Any:
  """Parses a section; None where a required key is missing: a model that was trained elsewhere has no length."""
  values = as_section(values, f"config.{name}")
  refuse_unknown(values, [field.name for field in dataclasses.fields(owner)], f"config.{name}")
  return None if any(values.get(key) is None for key in _required(owner)) else call(owner, name, values)


def _with_tuples(value: Any) -> Any:
  """Turns lists into tuples: JSON makes lists of tuples, and flags can change tuples alone."""
  if isinstance(value, Mapping):
    return {key: _with_tuples(inner) for key, inner in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, (list, tuple)) else value


def unset(hint: Any) -> Any:
  """Returns an unset key of a ConfigDict, which takes a value of the type `hint`."""
  kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind in (int, float, str, bool)]
  return config_dict.placeholder(kinds[0] if kinds else object)
