"""The card of an export: README.md beside its weights, as the Hugging Face Hub shows it.

The last line of a card has the checksum of all that stands above it. A card that was edited, or that is another's, does
not fit its checksum and is left alone.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
from collections.abc import Mapping
from typing import Any

import yaml

from pflow_jax.conversion.origin import README, Origin, data_name, origin_of, plain
from pflow_jax.evaluation.tables import markdown_table
from pflow_jax.families.dit.authors import SIT
from pflow_jax.families.edm2.recognise import PRECOND
from pflow_jax.families.registry import FAMILIES, network_kind
from pflow_jax.files import foreign
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.versions import version_of
from pflow_jax.settings.tree import Settings

UNKNOWN = "unknown: fill in"
REPOSITORY = "https://github.com/pflow-jax/pflow_jax"
_LARGEST = 2**20
_MARK = re.compile(r"<!-- written by pflow_jax, sha256 ([0-9a-f]{64}); an edited card is left alone -->\n\Z")
_METHODS = {
  "imitation": "imitation distillation, π-ID ([π-Flow](https://arxiv.org/abs/2510.14974))",
  "flow_matching": "flow matching ([paper](https://arxiv.org/abs/2210.02747))",
  "ayf_emd": "a flow map, AYF-EMD ([Align Your Flow](https://arxiv.org/abs/2506.14603))",
  "ayf_lmd": "a flow map, AYF-LMD ([Align Your Flow](https://arxiv.org/abs/2506.14603))",
  "mean_flow": "a flow map, MeanFlow ([paper](https://arxiv.org/abs/2505.13447))",
  "consistency": "consistency distillation ([paper](https://arxiv.org/abs/2303.01469))",
  "pretrained": "trained elsewhere, converted",
}
_POLICIES = {
  "GMFlow": "a Gaussian mixture ([π-Flow](https://arxiv.org/abs/2510.14974))",
  "DX": "a grid of x0 ([π-Flow](https://arxiv.org/abs/2510.14974))",
  "ArcFlow": "momentum processes ([ArcFlow](https://arxiv.org/abs/2602.09014))",
}
_COLUMNS = {
  "name": "sampler",
  "nfe": "NFE",
  "alignment_ratio": "alignment error / teacher-4",
  "fd_ratio": "FD / teacher-128",
  "diversity_ratio": "diversity / teacher-128",
  "recall": "recall",
  "accuracy": "class accuracy",
}
_PIPELINES = {
  ("flux", "GMFlow"): ("PiFluxPipeline", "pipeline_piflux", "black-forest-labs/FLUX.1-dev"),
  ("flux", "DX"): ("PiFluxPipeline", "pipeline_piflux", "black-forest-labs/FLUX.1-dev"),
  ("flux", "ArcFlow"): ("ArcFluxPipeline", "arcflux_pipeline", "black-forest-labs/FLUX.1-dev"),
  ("qwen_image", "GMFlow"): ("PiQwenImagePipeline", "pipeline_piqwen", "Qwen/Qwen-Image"),
  ("qwen_image", "DX"): ("PiQwenImagePipeline", "pipeline_piqwen", "Qwen/Qwen-Image"),
  ("qwen_image", "ArcFlow"): ("ArcQwenImagePipeline", "arcqwen_pipeline", "Qwen/Qwen-Image"),
}

_CLASSES = {
  SIT: "With the code of SiT, or of REPA: the tensors are the state dict of its `SiT`, without projectors.\n",
  PRECOND: "With the code of [EDM2](https://github.com/NVlabs/edm2); `config` is config.json without `_class_name`:\n\n"
  "```python\nfrom safetensors.torch import load_file\nfrom training.networks_edm2 import "
  'Precond\n\nPrecond(**config).load_state_dict(load_file("FOLDER/diffusion_pytorch_model.safetensors"))\n```\n',
}
"""Instructions for other code that reads an export, by the class in its config.json."""


def write_card(out: pathlib.Path, text: str) -> bool:
  """Writes the card of an export, unless there is one that somebody edited.

  Args:
    out: folder of the export.
    text: result of `card`.

  Returns:
    Whether the card is of this export.
  """
  path = out / README
  if path.exists() and not is_own(path):
    return False
  if not path.exists() or path.read_text(encoding="utf-8") != text:
    write_atomically(path, text)
  return True


def is_own(path: pathlib.Path) -> bool:
  """Returns whether a card is as `write_card` left it."""
  try:
    text = foreign.read_text(path, _LARGEST)
  except ValueError:
    return False
  mark = _MARK.search(text)
  return mark is not None and mark[1] == _digest(text[: mark.start()])


def card(
  folder: str,
  settings: Settings,
  config: Mapping[str, Any],
  policy: str | None,
  which: str,
  step: int | None,
) -> str:
  """Returns the text of a card.

  Args:
    folder: workdir of the run.
    settings: of the run, with the folder of its teacher.
    config: content of config.json.
    policy: name of its policy in PyTorch, or None.
    which: "ema" or "params".
    step: of the checkpoint.
  """
  origin = origin_of(folder, settings)
  name = plain(pathlib.Path(os.path.abspath(folder)).name)
  parts = [
    "---\n" + yaml.safe_dump(_front(settings, origin, policy), sort_keys=False, allow_unicode=True) + "---\n",
    f"# {name}\n\n{_opening(settings, policy, _is_flow_map(config))}\n",
    _table(_about(settings, config, origin, policy)),
    _evaluation(folder, step),
    _training(settings, which, step),
    _use(settings, policy, config),
    f"## Versions\n\npflow_jax {version_of('pflow-jax')}, jax {version_of('jax')}, "
    f"flax {version_of('flax')}, Python {platform.python_version()}.\n",
  ]
  text = "\n".join(filter(None, parts)) + "\n"
  return f"{text}<!-- written by pflow_jax, sha256 {_digest(text)}; an edited card is left alone -->\n"


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _table(rows: Mapping[str, Any]) -> str:
  return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _is_flow_map(config: Mapping[str, Any]) -> bool:
  """Returns whether a config.json is of a flow map."""
  return config["_class_name"] in {family.names.flow_map_class for family in FAMILIES.values() if family.names}


def _front(settings: Settings, origin: Origin | None, policy: str | None) -> dict[str, Any]:
  """The fields that the Hub reads; "unknown" is one of its licences."""
  known = origin.told if origin else {}
  front: dict[str, Any] = {key: known[key] for key in ("license", "license_name", "license_link") if key in known}
  front = front or {"license": "unknown"}
  if "repo" in known:
    front["base_model"] = known["repo"]
    if not settings.converted:
      front["base_model_relation"] = "adapter" if settings.adapters.table else "finetune"
  if "text" in network_kind(settings.model.kind).conditions:
    front["pipeline_tag"] = "text-to-image"
  return front | {"library_name": "pflow_jax", "tags": ["pflow_jax", *([policy.lower()] if policy else []), "few-step"]}


def _opening(settings: Settings, policy: str | None, is_flow_map: bool) -> str:
  made = f"It was made with [pflow_jax]({REPOSITORY})."
  if is_flow_map:
    return f"A flow map: it draws a sample in 1, 2, 4 or any other number of network evaluations. {made}"
  if policy is None:
    return f"A flow model with the head `{settings.head.kind}`. {made}"
  count = settings.objective.nfe
  times = f"{count} network evaluation{'s' * (count > 1)}"
  which = "each" if count > 1 else "it"
  return f"A student that draws a sample in {times}: {which} predicts a policy, {_POLICIES.get(policy, policy)}. {made}"


def _about(settings: Settings, config: Mapping[str, Any], origin: Origin | None, policy: str | None) -> dict[str, Any]:
  ranks = sorted({row.rank for row in settings.adapters.rows})
  adapters = f", low-rank adapters of rank {', '.join(map(str, ranks))}" if ranks else ""
  about: dict[str, Any] = {"network": f"`{config['_class_name']}`{adapters}"}
  about["method"] = _METHODS.get(settings.kind, settings.kind)
  if policy is not None:
    objective, sample = settings.objective, settings.sample
    about["NFE"] = f"{objective.nfe}, the last segment {objective.final_scale:g} as long as the others"
    about["time shift"] = f"{objective.shift:g}"
    about["temperature"] = sample.temperature_of_segments
  elif _is_flow_map(config):
    about["time shift"] = f"{settings.objective.shift:g}"
    if settings.objective.guided:
      about["strengths of guidance"] = "{:g} to {:g}".format(*settings.objective.guidance)
  own = "of the model" if settings.converted else "of the teacher"
  if settings.teacher and settings.teacher.workdir:
    if origin is None:
      about["teacher"] = UNKNOWN
    else:
      about["teacher"] = origin.name if origin.converted else f"trained with pflow_jax on {origin.name}"
  known = origin.told if origin else {}
  licence = known.get("license_name", known.get("license", UNKNOWN))
  if settings.converted or "teacher" in about:
    about[f"licence {own}"] = f"[{licence}]({known['license_link']})" if "license_link" in known else licence
    if "license" in known:
      about[f"licence {own}"] += ", by its own card; look up what it allows of what is made from the model"
  return about


def _evaluation(folder: str, step: int | None) -> str:
  """The measurements of the run, if there are any of this step."""
  path = pathlib.Path(folder) / "evaluation" / "evaluation.json"
  try:
    if not path.is_file():
      return ""
    report = foreign.read_json(path)
    if report.get("step", step) != step:
      return ""
    rows = [{key: tuple(v) if isinstance(v := row.get(key), list) else v for key in _COLUMNS} for row in report["rows"]]
    table = markdown_table(rows, {key: title for key, title in _COLUMNS.items() if any(row[key] for row in rows)})
  except (ValueError, KeyError, TypeError, AttributeError):
    return ""
  counts = {"num_samples": "samples", "num_real": "data"}
  about = [f"{report[key]} {words}" for key, words in counts.items() if key in report]
  return (
    f"## Evaluation\n\n{table}\n*Alignment error* is the RMS distance to the teacher's 128-step sample from the same "
    f"noise, *FD* the Fréchet distance to the data ({', '.join(about)}, {data_name(report.get('data'))}).\n"
  )


def _training(settings: Settings, which: str, step: int | None) -> str:
  train, optimizer = settings.train, settings.optimizer
  if train is None or optimizer is None:
    return ""
  rows = {
    "checkpoint": f"step {step} of {train.steps:,}, {'averaged' if which == 'ema' else 'last'} parameters",
    "batch size": train.batch_size,
    "optimizer": f"AdamW, rate {optimizer.learning_rate:g}, {optimizer.schedule}, warm-up of {optimizer.warmup_steps}",
  }
  if settings.teacher and settings.teacher.guidance != 1:
    rows["guidance of the teacher"] = f"{settings.teacher.guidance:g}"
  rows |= {"data": f"{data_name(settings.data.get('name'))}, licence {UNKNOWN}", "seed": settings.seed}
  return f"## Training\n\n{_table(rows)}"


def _use(settings: Settings, policy: str | None, config: Mapping[str, Any]) -> str:
  """Blocks of code, for every program that reads the files."""
  adapters, kind = bool(settings.adapters.table), settings.model.kind
  text = "text" in network_kind(kind).conditions
  base = ', base="TEACHER"' if adapters else ""
  call = '.pictures(["a red fox in the snow"], pipeline="PIPELINE")' if text else ".sample(16, seed=0)"
  blocks = [
    f"`FOLDER` is this folder{', `TEACHER` that of its teacher' if adapters else ''}. With pflow_jax:\n\n```python\n"
    f'import pflow_jax as pf\n\nx = pf.load("FOLDER"{base}){call}\n```\n'
  ]
  is_flow_map = _is_flow_map(config)
  if policy is not None or is_flow_map:
    needed = ("--base TEACHER " if adapters else "") + ("--nfe 4 " if is_flow_map else "")
    cond = "--cond texts.npz" if text else "--labels 0"
    blocks.append(
      f"With PyTorch and diffusers alone, by [examples/torch_student.py]({REPOSITORY}/blob/main/examples/"
      f"torch_student.py):\n\n```sh\npython torch_student.py --student FOLDER {needed}--noise noise.npy {cond} --out "
      "x0.npy\n```\n"
    )
  if policy is None and not is_flow_map:
    blocks.append(_CLASSES.get(config["_class_name"], "With diffusers: its class has the name of the network above.\n"))
  elif policy is not None and (kind, policy) in _PIPELINES and adapters:
    blocks.append(_pipeline(settings, policy))
  return "## Use\n\n" + "\n".join(blocks)


def _pipeline(settings: Settings, policy: str) -> str:
  """The released pipeline of a policy; and ComfyUI, which has no ArcFlow."""
  pipeline, module, teacher = _PIPELINES[settings.model.kind, policy]
  objective = settings.objective
  release = policy == "ArcFlow"
  load = "load_arcflow_adapter" if release else "load_lakonlab_adapter"
  where = (
    "[ArcFlow](https://github.com/pnotp/ArcFlow)" if release else "[LakonLab](https://github.com/Lakonik/LakonLab)"
  )
  given = ""
  if policy == "DX":
    segment = f"{objective.max_segment:.6g}"
    mode = ', mode="polynomial"' if settings.head.get("basis") == "polynomial" else ""
    given = f', policy_type="DX", policy_kwargs=dict(segment_size={segment}, shift={objective.shift:g}{mode})'
  text = (
    f"With {where}, whose scheduler takes the shift {objective.shift:g}"
    f"{'' if release else f' and final_step_size_scale={objective.final_scale:g}'}:\n\n```python\n"
    f'from lakonlab.pipelines.{module} import {pipeline}\n\npipe = {pipeline}.from_pretrained("{teacher}"{given})\n'
    f'pipe.{load}("FOLDER", target_module_name="transformer")\n```\n'
  )
  constant = settings.head.kind == "gmflow" and settings.head.get("log_std", "learned") != "learned"
  if not release and not constant:
    text += (
      "\nWith [ComfyUI-piFlow](https://github.com/Lakonik/ComfyUI-piFlow): diffusion_pytorch_model.safetensors goes to "
      "models/loras, and is the adapter of its loader.\n"
    )
  return text
