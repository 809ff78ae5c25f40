"""The public names, and that importing them has no side effects."""

import subprocess
import sys

import pflow_jax

PUBLIC = {
  "ArcHead",
  "ArcPolicy",
  "DIT_SIZES",
  "DXHead",
  "DXPolicy",
  "DiT",
  "EDM2UNet",
  "EDM2_SIZES",
  "FlowMap",
  "FlowMatching",
  "GMFlowHead",
  "GMFlowPolicy",
  "Imitation",
  "MLP",
  "Policy",
  "VelocityHead",
  "auto_temperature",
  "autoguided",
  "average_velocity",
  "ayf_emd",
  "ayf_lmd",
  "consistency",
  "denoiser_velocity",
  "dropout",
  "dynamic_shift",
  "edm_denoiser",
  "flow_map_sde_renoise",
  "flow_map_sde_target",
  "flow_map_loss",
  "flow_matching_loss",
  "flow_sde_step",
  "guided",
  "imitation_loss",
  "imitation_loss_data_free",
  "mean_flow",
  "rollout",
  "sample_flow_map",
  "sample_student",
  "sample_teacher",
  "segment_grid",
  "shift_time",
  "student_params_from_teacher",
  "temperature",
  "unshift_time",
}


def test_public_names_are_pinned():
  loaded = {name for name in vars(pflow_jax) if not name.startswith("_")}
  own = {name for name in loaded if not isinstance(getattr(pflow_jax, name), type(sys))}
  assert own == PUBLIC


def test_import_starts_no_backend_and_loads_no_plotting():
  code = (
    "import sys, pflow_jax, pflow_jax.training.train, pflow_jax.evaluation.evaluate\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge._backends, 'a backend was started'\n"
    "heavy = {'matplotlib', 'tensorflow', 'torch', 'tensorboardX', 'sklearn', 'mlxtend'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
