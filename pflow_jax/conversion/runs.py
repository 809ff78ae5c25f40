"""Runs of ours as the converter reads them: they may be somebody else's, and are looked at before they are believed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from pflow_jax.conversion.models import Model
from pflow_jax.files import foreign
from pflow_jax.settings.tree import Settings
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.fields import Blocks, Depth, Epsilon, Number, Positive, Side, Size, Sizes
from pflow_jax.torch_io.table import is_lora
from pflow_jax.training import workdir

_Rank = tuple[str, Size]
_Number = Number | None


@dataclasses.dataclass(frozen=True)
class _ModelSection:
  kind: str
  width: Size | None = None
  depth: Depth | None = None
  single_depth: Depth | None = None
  num_heads: Size | None = None
  head_dim: Size | None = None
  patch_size: Size | None = None
  text_width: Size | None = None
  pooled_width: Size | None = None
  rope_axes: tuple[Size, ...] | None = None
  mlp_ratio: Positive | None = None
  norm_eps: Epsilon | None = None
  time_scale: Positive | None = None
  frequency_shift: Literal[0, 1] | None = None
  flip_time: bool | None = None
  guidance: _Number = None
  model_channels: Size | None = None
  channel_mult: Sizes | None = None
  num_blocks: Blocks | None = None
  attn_levels: tuple[int, ...] | None = None
  channels_per_head: Size | None = None
  time_embedding: str | None = None
  dtype: str | None = None
  residual_dtype: str | None = None
  remat: str | None = None
  attention: str | None = None
  scan_unroll: Depth | None = None


@dataclasses.dataclass(frozen=True)
class _HeadSection:
  kind: str
  num_components: Size | None = None
  num_coefficients: Size | None = None
  logstd_inner_dim: Size | None = None
  log_std: Number | str | None = None
  basis: str | None = None
  compat: bool | None = None
  sigma_data: Positive | None = None
  max_sigma: Positive | None = None
  min_sigma: Positive | None = None


@dataclasses.dataclass(frozen=True)
class _ObjectiveSection:
  kind: str
  nfe: Depth | None = None
  final_scale: _Number = None
  shift: _Number = None
  guidance: tuple[Number, Number] | None = None


@dataclasses.dataclass(frozen=True)
class _SampleSection:
  temperature: _Number = None
  auto_temperature: bool | None = None


@dataclasses.dataclass(frozen=True)
class _AdaptersSection:
  table: tuple[_Rank | tuple[str, Size, _Number] | tuple[str, Size, _Number, Number], ...] = ()
  train: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _TeacherSection:
  workdir: str | None = None
  which: str = "ema"
  guidance: _Number = None


@dataclasses.dataclass(frozen=True)
class _DataSection:
  name: str | None = None
  shape: tuple[Size, ...] | None = None
  num_classes: Size | None = None


@dataclasses.dataclass(frozen=True)
class _SourceSection:
  sample_size: Side | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
  """The keys of a run's config that the converter reads; there are more."""

  model: _ModelSection
  objective: _ObjectiveSection
  head: _HeadSection | None = None
  policy: _HeadSection | None = None  # its name before
  data: _DataSection = _DataSection()
  sample: _SampleSection = _SampleSection()
  adapters: _AdaptersSection = _AdaptersSection()
  teacher: _TeacherSection = _TeacherSection()
  source: _SourceSection = _SourceSection()


def is_run(folder: str | os.PathLike) -> bool:
  """Returns whether a folder is a run of ours, by its config."""
  path = epath.Path(folder) / workdir.CONFIG
  try:
    return path.exists() and "model" in foreign.read_json(path)
  except ValueError:  # whoever reads it says what is wrong
    return False


def read_run(folder: str) -> Settings:
  """Reads the settings of the run in `folder`.

  Raises:
    ValueError: there is none, or a key is of another type.
  """
  path = epath.Path(folder) / workdir.CONFIG
  if path.exists():
    foreign.read_json(path, _Run if "_class_name" not in foreign.read_json(path) else dict[str, Any])
  return workdir.load_settings(folder)


def check_leaves(model: Model, got: Mapping[str, tuple[int, ...]], where: str) -> None:
  """Refuses a run whose leaves are not those of its config's network, or some of them and adapters.

  Args:
    model: of its config.
    got: shapes of its leaves, by path.
    where: the run, for errors.

  Raises:
    ValueError: leaves are missing, unexpected or of another shape.
  """
  expected = model.shapes()
  if any(map(is_lora, got)):  # beside which only those are stored that train
    expected = {path: shape for path, shape in expected.items() if path in got}
    got = {path: shape for path, shape in got.items() if not is_lora(path)}
  check_tensors(expected, got, where)
