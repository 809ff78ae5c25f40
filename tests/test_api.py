"""The public names, and that importing them has no side effects."""

import ast
import inspect
import subprocess
import sys

import pytest

import pflow_jax

PUBLIC = {
  "AdapterSettings",
  "Adversarial",
  "ArcHead",
  "ArcPolicy",
  "Codec",
  "DIT_SIZES",
  "DXHead",
  "DXPolicy",
  "DenoiserHead",
  "DiT",
  "EDM2UNet",
  "EDM2_SIZES",
  "EmaSettings",
  "Encoder",
  "EvaluateSettings",
  "Family",
  "DecoupledMeanFlow",
  "FlowMap",
  "FreeFlow",
  "ImprovedMeanFlow",
  "FlowMatching",
  "GMFlowHead",
  "GMFlowPolicy",
  "Head",
  "Imitation",
  "MLP",
  "MeshSettings",
  "Method",
  "NetworkKind",
  "NetworkNames",
  "OptimizerSettings",
  "Policy",
  "Reference",
  "Report",
  "Run",
  "SampleSettings",
  "StartSettings",
  "Teacher",
  "TeacherReport",
  "TeacherSettings",
  "TorchNames",
  "TrainSettings",
  "VelocityHead",
  "auto_temperature",
  "autoguided",
  "average_velocity",
  "ayf_emd",
  "ayf_lmd",
  "cache",
  "check_teacher",
  "consistency",
  "convert",
  "demo",
  "denoiser_velocity",
  "distill",
  "dropout",
  "encode",
  "dynamic_shift",
  "edm_denoiser",
  "flow_map_loss",
  "flow_map_sde_renoise",
  "flow_map_sde_target",
  "flow_matching_loss",
  "flow_sde_step",
  "guided",
  "imitation_loss",
  "imitation_loss_data_free",
  "load",
  "load_autoencoder",
  "load_reference",
  "make_reference",
  "mean_flow",
  "push",
  "register_family",
  "register_head",
  "register_network",
  "register_objective",
  "register_source",
  "rollout",
  "sample_flow_map",
  "sample_student",
  "sample_teacher",
  "segment_grid",
  "shift_time",
  "student_params_from_teacher",
  "temperature",
  "train",
  "unshift_time",
}


def test_public_names_are_pinned():
  assert set(dir(pflow_jax)) == PUBLIC | {"data", "plot", "table"}
  for name in PUBLIC:
    assert getattr(pflow_jax, name).__doc__ or isinstance(getattr(pflow_jax, name), dict), name


def test_type_checkers_see_the_same_names():
  (block,) = (node for node in ast.parse(inspect.getsource(pflow_jax)).body if isinstance(node, ast.If))
  seen = {(alias.name, node.module) for node in block.body for alias in node.names}
  own = {(name, f"pflow_jax.{module}") for name, module in pflow_jax._PLACES.items()}
  assert seen == own | {("data", "pflow_jax"), ("plot", "pflow_jax.evaluation"), ("table", "pflow_jax.torch_io")}


def test_a_name_that_is_none_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'DiTT'"):
    _ = pflow_jax.DiTT


def test_import_starts_no_backend_and_loads_no_plotting():
  code = (
    "import sys, pflow_jax, pflow_jax.commands.library\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge._backends, 'a backend was started'\n"
    "heavy = {'matplotlib', 'tensorflow', 'torch', 'tensorboardX', 'sklearn', 'mlxtend'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


def test_the_front_alone_loads_no_jax():
  code = "import sys, pflow_jax, pflow_jax.commands.cli; assert 'jax' not in sys.modules"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
