"""pflow_jax: few-step generation by policy-based flow distillation, in JAX.

    import pflow_jax as pf

    data = pf.data.load("digits")
    teacher = pf.train(pf.FlowMatching(), data, pf.DiT(patch_size=2, width=64, depth=4, num_heads=4), steps=2500)
    student = pf.distill(teacher, pf.Imitation(nfe=1), pf.GMFlowHead(num_components=16), steps=4000)
    x = student.sample(16, labels=[3, 7], seed=1)

A name is imported when it is asked for: `pflow --help` needs no JAX, and a policy no Orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pflow_jax.files.versions import check_jax

if TYPE_CHECKING:
  from pflow_jax import data as data
  from pflow_jax.commands.demo import demo as demo
  from pflow_jax.commands.library import Run as Run
  from pflow_jax.commands.library import check_teacher as check_teacher
  from pflow_jax.commands.library import distill as distill
  from pflow_jax.commands.library import load as load
  from pflow_jax.commands.library import train as train
  from pflow_jax.conversion.cache import cache as cache
  from pflow_jax.conversion.latents import encode as encode
  from pflow_jax.conversion.program import convert as convert
  from pflow_jax.conversion.push import push as push
  from pflow_jax.core.guidance import autoguided as autoguided
  from pflow_jax.core.guidance import guided as guided
  from pflow_jax.core.objectives.adversarial import Adversarial as Adversarial
  from pflow_jax.core.objectives.decoupled_mean_flow import DecoupledMeanFlow as DecoupledMeanFlow
  from pflow_jax.core.objectives.flow_map import FlowMap as FlowMap
  from pflow_jax.core.objectives.flow_map import ayf_emd as ayf_emd
  from pflow_jax.core.objectives.flow_map import ayf_lmd as ayf_lmd
  from pflow_jax.core.objectives.flow_map import consistency as consistency
  from pflow_jax.core.objectives.flow_map import flow_map_loss as flow_map_loss
  from pflow_jax.core.objectives.flow_map import mean_flow as mean_flow
  from pflow_jax.core.objectives.flow_matching import FlowMatching as FlowMatching
  from pflow_jax.core.objectives.flow_matching import flow_matching_loss as flow_matching_loss
  from pflow_jax.core.objectives.free_flow import FreeFlow as FreeFlow
  from pflow_jax.core.objectives.imitation import Imitation as Imitation
  from pflow_jax.core.objectives.imitation import imitation_loss as imitation_loss
  from pflow_jax.core.objectives.imitation import imitation_loss_data_free as imitation_loss_data_free
  from pflow_jax.core.objectives.improved_mean_flow import ImprovedMeanFlow as ImprovedMeanFlow
  from pflow_jax.core.policies import ArcPolicy as ArcPolicy
  from pflow_jax.core.policies import DXPolicy as DXPolicy
  from pflow_jax.core.policies import GMFlowPolicy as GMFlowPolicy
  from pflow_jax.core.policies import Policy as Policy
  from pflow_jax.core.policies import auto_temperature as auto_temperature
  from pflow_jax.core.policies import dropout as dropout
  from pflow_jax.core.policies import temperature as temperature
  from pflow_jax.core.rollout import average_velocity as average_velocity
  from pflow_jax.core.rollout import rollout as rollout
  from pflow_jax.core.samplers import flow_map_sde_renoise as flow_map_sde_renoise
  from pflow_jax.core.samplers import flow_map_sde_target as flow_map_sde_target
  from pflow_jax.core.samplers import flow_sde_step as flow_sde_step
  from pflow_jax.core.samplers import sample_flow_map as sample_flow_map
  from pflow_jax.core.samplers import sample_student as sample_student
  from pflow_jax.core.samplers import sample_teacher as sample_teacher
  from pflow_jax.core.schedule import dynamic_shift as dynamic_shift
  from pflow_jax.core.schedule import segment_grid as segment_grid
  from pflow_jax.core.schedule import shift_time as shift_time
  from pflow_jax.core.schedule import unshift_time as unshift_time
  from pflow_jax.data.registry import register_source as register_source
  from pflow_jax.evaluation import plot as plot
  from pflow_jax.evaluation.measure import Report as Report
  from pflow_jax.evaluation.references import Reference as Reference
  from pflow_jax.evaluation.references import load_reference as load_reference
  from pflow_jax.evaluation.references import make_reference as make_reference
  from pflow_jax.evaluation.teacher_check import TeacherReport as TeacherReport
  from pflow_jax.families.autoencoder import Codec as Codec
  from pflow_jax.families.autoencoder import load_autoencoder as load_autoencoder
  from pflow_jax.families.encoders import Encoder as Encoder
  from pflow_jax.families.family import Family as Family
  from pflow_jax.families.names import NetworkNames as NetworkNames
  from pflow_jax.families.names import TorchNames as TorchNames
  from pflow_jax.families.registry import register_family as register_family
  from pflow_jax.networks.denoiser import denoiser_velocity as denoiser_velocity
  from pflow_jax.networks.denoiser import edm_denoiser as edm_denoiser
  from pflow_jax.networks.dit import DIT_SIZES as DIT_SIZES
  from pflow_jax.networks.dit import DiT as DiT
  from pflow_jax.networks.edm2 import EDM2_SIZES as EDM2_SIZES
  from pflow_jax.networks.edm2 import EDM2UNet as EDM2UNet
  from pflow_jax.networks.heads import ArcHead as ArcHead
  from pflow_jax.networks.heads import DenoiserHead as DenoiserHead
  from pflow_jax.networks.heads import DXHead as DXHead
  from pflow_jax.networks.heads import GMFlowHead as GMFlowHead
  from pflow_jax.networks.heads import Head as Head
  from pflow_jax.networks.heads import VelocityHead as VelocityHead
  from pflow_jax.networks.heads import register_head as register_head
  from pflow_jax.networks.heads import student_params_from_teacher as student_params_from_teacher
  from pflow_jax.networks.mlp import MLP as MLP
  from pflow_jax.networks.registry import NetworkKind as NetworkKind
  from pflow_jax.networks.registry import register_network as register_network
  from pflow_jax.settings.adapters import AdapterSettings as AdapterSettings
  from pflow_jax.settings.mesh import MeshSettings as MeshSettings
  from pflow_jax.settings.optimizer import EmaSettings as EmaSettings
  from pflow_jax.settings.optimizer import OptimizerSettings as OptimizerSettings
  from pflow_jax.settings.sample import EvaluateSettings as EvaluateSettings
  from pflow_jax.settings.sample import SampleSettings as SampleSettings
  from pflow_jax.settings.teacher import StartSettings as StartSettings
  from pflow_jax.settings.teacher import TeacherSettings as TeacherSettings
  from pflow_jax.settings.train import TrainSettings as TrainSettings
  from pflow_jax.torch_io import table as table
  from pflow_jax.training.methods import Method as Method
  from pflow_jax.training.methods import register_objective as register_objective
  from pflow_jax.training.teachers import Teacher as Teacher

_NAMES: dict[str, tuple[str, ...]] = {
  "core.guidance": ("autoguided", "guided"),
  "core.objectives.adversarial": ("Adversarial",),
  "core.objectives.decoupled_mean_flow": ("DecoupledMeanFlow",),
  "core.objectives.flow_map": ("FlowMap", "ayf_emd", "ayf_lmd", "consistency", "flow_map_loss", "mean_flow"),
  "core.objectives.flow_matching": ("FlowMatching", "flow_matching_loss"),
  "core.objectives.free_flow": ("FreeFlow",),
  "core.objectives.improved_mean_flow": ("ImprovedMeanFlow",),
  "core.objectives.imitation": ("Imitation", "imitation_loss", "imitation_loss_data_free"),
  "core.policies": ("ArcPolicy", "DXPolicy", "GMFlowPolicy", "Policy", "auto_temperature", "dropout", "temperature"),
  "core.rollout": ("average_velocity", "rollout"),
  "core.samplers": (
    "flow_map_sde_renoise",
    "flow_map_sde_target",
    "flow_sde_step",
    "sample_flow_map",
    "sample_student",
    "sample_teacher",
  ),
  "core.schedule": ("dynamic_shift", "segment_grid", "shift_time", "unshift_time"),
  "data.registry": ("register_source",),
  "networks.denoiser": ("denoiser_velocity", "edm_denoiser"),
  "networks.dit": ("DIT_SIZES", "DiT"),
  "networks.edm2": ("EDM2_SIZES", "EDM2UNet"),
  "networks.heads": (
    "ArcHead",
    "DXHead",
    "DenoiserHead",
    "GMFlowHead",
    "Head",
    "VelocityHead",
    "register_head",
    "student_params_from_teacher",
  ),
  "networks.mlp": ("MLP",),
  "networks.registry": ("NetworkKind", "register_network"),
  "settings.adapters": ("AdapterSettings",),
  "settings.mesh": ("MeshSettings",),
  "settings.optimizer": ("EmaSettings", "OptimizerSettings"),
  "settings.sample": ("EvaluateSettings", "SampleSettings"),
  "settings.teacher": ("StartSettings", "TeacherSettings"),
  "settings.train": ("TrainSettings",),
  "families.autoencoder": ("Codec", "load_autoencoder"),
  "families.encoders": ("Encoder",),
  "families.family": ("Family",),
  "families.names": ("NetworkNames", "TorchNames"),
  "families.registry": ("register_family",),
  "training.methods": ("Method", "register_objective"),
  "training.teachers": ("Teacher",),
  "evaluation.measure": ("Report",),
  "evaluation.references": ("Reference", "load_reference", "make_reference"),
  "evaluation.teacher_check": ("TeacherReport",),
  "conversion.cache": ("cache",),
  "conversion.latents": ("encode",),
  "conversion.program": ("convert",),
  "conversion.push": ("push",),
  "commands.demo": ("demo",),
  "commands.library": ("Run", "check_teacher", "distill", "load", "train"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}
__version__: str  # of what is installed, see `__getattr__`
_MODULES = {"data": "data", "plot": "evaluation.plot", "table": "torch_io.table"}


def __getattr__(name: str) -> Any:
  value: Any
  if name == "__version__":
    value = importlib.import_module("pflow_jax.files.versions").version_of("pflow-jax")
  elif name in _MODULES:
    value = importlib.import_module(f"pflow_jax.{_MODULES[name]}")
  elif name in _PLACES:
    value = getattr(importlib.import_module(f"pflow_jax.{_PLACES[name]}"), name)
  else:
    raise AttributeError(f"module 'pflow_jax' has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*_PLACES, *_MODULES])


check_jax()
del check_jax
