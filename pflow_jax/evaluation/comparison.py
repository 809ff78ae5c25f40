"""The comparison of all methods on small data, which the files in configs/compare/ describe."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

ALONE, TOGETHER = ((1,), (2,), (4,), (8,)), ((1, 2, 4, 8),)  # a student for each NFE, or one for all
FIRST = ((1,),)  # a student for 1 evaluation


def all_methods(
  path: pathlib.Path,
  variant: str,
  *,
  flops: float,
  weak_steps: int,
  adapters: bool,
  rivals: bool = False,
  changes: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """Makes a comparison of the variants of one config file, see `compare`.

  Args:
    path: the config file; it has the variants flow_teacher, gmflow, dx, arc, ayf_emd, ...
    variant: "full", or "quicktest" for a smoke test.
    flops: training budget of every student, in operations.
    weak_steps: training steps of the weak teacher.
    adapters: whether the file has ArcFlow with adapters too.
    rivals: whether it has the one-step methods of others, and the policies with an adversary and from a flow map.
    changes: of the teacher's settings, by section; data, network and evaluation are the students' too.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in ("full", "quicktest"):
    raise ValueError(f"variant: expected 'full' or 'quicktest', got {variant!r}")
  quicktest = variant == "quicktest"

  def method(name: str, title: str, students: Any, own: str = "", **options: Any) -> dict[str, Any]:
    config = f"{path}:{own or name}{',quicktest' if quicktest else ''}"
    return dict(name=name, title=title, config=config, students=students, **options)

  def teacher(**train: int) -> dict[str, Any]:
    overrides = {section: dict(values) for section, values in (changes or {}).items()}
    if train:
      overrides["train"] = overrides.get("train", {}) | train
    return dict(config=method("flow_teacher", "", ())["config"], overrides=overrides)

  config = ConfigDict()
  config.teacher, config.weak = teacher(), teacher(steps=2 if quicktest else weak_steps)
  config.flops = flops
  config.methods = (
    method("gmflow", "π-Flow, GMFlow", ALONE),
    method("dx", "π-Flow, DX", ALONE),
    method("arc", "ArcFlow, all weights" if adapters else "ArcFlow", ALONE),
    *([method("arc_adapters", "ArcFlow, adapters", ALONE)] if adapters else []),
    method("ayf_emd", "AYF-EMD", TOGETHER),
    method(
      "ayf_emd_autoguided",
      "AYF-EMD + autoguidance",
      TOGETHER,
      "ayf_emd",
      weak=True,
      overrides=dict(objective=dict(guidance=(1.0, 2.0)), sample=dict(guidance=1.5)),
    ),
    method(
      "ayf_emd_adversarial",
      "AYF-EMD + adversarial",
      TOGETHER,
      start="ayf_emd",
      overrides=dict(objective=dict(warmup_steps=0)),  # it starts from a student whose warm-up is over
    ),
    method("ayf_lmd", "AYF-LMD", TOGETHER),
    method("mean_flow", "MeanFlow", TOGETHER),
    method("consistency", "consistency", TOGETHER),
    *(_rivals(method) if rivals else ()),
  )
  return config


def _rivals(method: Callable[..., dict[str, Any]]) -> tuple[dict[str, Any], ...]:
  return (
    method("improved_mean_flow", "iMF", TOGETHER),
    method("decoupled_mean_flow", "DMF", TOGETHER),
    method("free_flow", "FreeFlow", FIRST),
    # As much training as the adversarial flow map, which starts from a finished student too.
    method("gmflow_adversarial", "π-Flow, GMFlow + adversarial", FIRST, start="gmflow"),
    method("gmflow_twice", "π-Flow, GMFlow, twice the training", FIRST, "gmflow", start="gmflow"),
    method("gmflow_from_map", "π-Flow, GMFlow from AYF-EMD", FIRST, start="ayf_emd"),
  )
