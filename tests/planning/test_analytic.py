"""The closed form against what tracing the step counts; nothing is compiled."""

import jax
import pytest
from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.networks.dit import DIT_SIZES
from pflow_jax.planning.analytic import analytic_step_flops
from pflow_jax.settings.defaults import default_config
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.flops import count_flops
from pflow_jax.training.step import make_program

# ImageNet's latents; no record is ever read, and no teacher.
LATENTS = data.Dataset("latents", (32, 32, 4), 1000, tuple(map(str, range(1000))), records=None)
VELOCITY = dict(kind="velocity")
GMFLOW = dict(kind="gmflow", num_components=32)
ARC = dict(kind="arc", num_components=8)
ADAPTERS = (("blocks/(qkv|proj|mlp_in|mlp_out)", 64),)
BATCH = 4

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def counts(monkeypatch):
  """Returns (closed form, traced) of a run; `changes` are of the sections model and objective."""
  monkeypatch.setattr(data, "load", lambda **_: LATENTS)

  def of(kind, policy, model="S", adapters=(), teacher=(), **changes):
    config = default_config(kind)
    config.update(data=dict(name="latents"), policy=ConfigDict(policy))
    config.model = ConfigDict(DIT_SIZES[model] | dict(kind="dit", patch_size=2, remat="none", dtype="float32"))
    config.train.update(batch_size=BATCH, steps=10)
    config.optimizer.learning_rate = 1e-4
    if kind != "flow_matching":
      config.teacher.update(dict(teacher))
      config.adapters.table = adapters
    for name, value in changes.items():
      (config.model if name in config.model else config.objective)[name] = value
    experiment = build(config, abstract=True)
    program = make_program(config, experiment, layout_of(config, jax.devices()[:1]))
    closed = analytic_step_flops(experiment, BATCH, data_free=kind == "imitation_data_free")
    return closed, count_flops(program.trace().jaxpr)

  return of


def assert_alike(pair):
  closed, traced = pair
  assert closed == pytest.approx(traced, rel=2e-3)  # the rest is the policies'


@pytest.mark.parametrize("model", ["S", "B", "XL"])
def test_the_published_runs(model, counts):
  assert_alike(counts("imitation", GMFLOW, model, num_states=2))
  assert_alike(counts("imitation", ARC, model, ADAPTERS, num_states=4, window=3.0, dropout=0.1))
  assert_alike(counts("ayf_emd", VELOCITY, model))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_what_rematerialisation_adds(remat, counts):
  assert_alike(counts("flow_matching", VELOCITY, remat=remat))
  assert_alike(counts("imitation", ARC, adapters=(("blocks/qkv", 64),), remat=remat))
  assert_alike(counts("ayf_emd", VELOCITY, remat=remat))


GUIDED = dict(guidance=2.0)
CASES = {
  "a teacher": dict(kind="flow_matching", policy=VELOCITY),
  "the other side of a flow map": dict(kind="ayf_lmd", policy=VELOCITY),
  "guided, all segments": dict(kind="imitation_data_free", policy=GMFLOW, nfe=2, teacher=GUIDED),
  "all segments, one at a time": dict(kind="imitation_data_free", policy=GMFLOW, nfe=2, remat="full"),
  "and with adapters": dict(kind="imitation_data_free", policy=ARC, nfe=2, adapters=ADAPTERS, remat="full"),
  "autoguided": dict(kind="imitation", policy=ARC, teacher=GUIDED | dict(weak_workdir="weak")),
  "DX, windows": dict(kind="imitation", policy=dict(kind="dx", num_coefficients=10), window=10.0),
  "several strengths": dict(kind="ayf_emd", policy=VELOCITY, teacher=GUIDED, guidance=(1.0, 3.0)),
  "flow map with adapters": dict(kind="ayf_emd", policy=VELOCITY, adapters=(("blocks/qkv", 16),), remat="full"),
  "derivative in float32": dict(kind="consistency", policy=VELOCITY, dtype="bfloat16"),
  "self-guided": dict(kind="mean_flow", policy=VELOCITY, omega=0.5, kappa=0.3),
  "nothing below the head": dict(kind="imitation", policy=ARC, adapters=(("head/proj_out_means", 8),), remat="full"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_else_a_step_may_hold(case, counts):
  assert_alike(counts(**CASES[case]))


def test_no_formula_for_other_networks(monkeypatch):
  monkeypatch.setattr(data, "load", lambda **_: LATENTS)
  config = default_config("flow_matching")
  config.update(data=dict(name="latents"), model=ConfigDict(dict(kind="edm2")), policy=ConfigDict(VELOCITY))
  assert analytic_step_flops(build(config), BATCH) is None
