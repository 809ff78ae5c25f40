"""Descriptions of samples: they differ where samples may, and are the same where only their computation differs."""

import dataclasses
import types

import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.evaluation.protocol import Protocol, about
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build
from tests.evaluation.stub_network import StubNetwork
from tests.programs import quick

PROTOCOL = Protocol()


@pytest.fixture(autouse=True)
def parameters(monkeypatch):
  monkeypatch.setattr(about, "digest_of_parameters", lambda *place: f"parameters {place}")


def described(variant, *changes, protocol=PROTOCOL, which="ema", step=3, dataset=None):
  settings = Settings.of(quick("digits", variant, "teacher"))
  if variant == "ayf_emd":  # a flow map that takes several strengths of guidance
    settings = settings.changed("objective", guidance=(1.0, 2.0)).changed("teacher", guidance=1.25)
  for section, values in changes:
    settings = settings.changed(section, **values)
  return about.of_sampler(build(settings, abstract=True, dataset=dataset), "run", step, which, protocol)


@pytest.mark.parametrize(
  ("variant", "section", "values"),
  [
    ("gmflow", "objective", {"shift": 2.5}),
    ("gmflow", "objective", {"final_scale": 0.5}),
    ("gmflow", "head", {"num_components": 4}),
    ("gmflow", "model", {"dtype": "bfloat16"}),
    ("gmflow", "model", {"residual_dtype": "bfloat16"}),
    ("gmflow", "sample", {"temperature": 0.5}),
    ("gmflow", "sample", {"substeps": 64}),
    ("ayf_emd", "sample", {"gamma": 0.5}),
    ("ayf_emd", "teacher", {"guidance": 1.5}),
    ("ayf_emd", "sample", {"guidance": 1.5}),
    ("arc_adapters", "adapters", {"table": (("blocks/(mlp_in|mlp_out)|time_embed/.*", 8, 2.0),)}),
  ],
)
def test_what_samples_depend_on_is_described(variant, section, values, monkeypatch):
  saved = types.SimpleNamespace(digest="digest of the base")
  monkeypatch.setattr(about.Experiment, "saved", {"teacher": saved})
  assert described(variant, (section, values)) != described(variant)


@pytest.mark.parametrize(
  ("section", "values"),
  [
    ("model", {"remat": "full"}),
    ("model", {"scan_unroll": 1}),
    ("sample", {"batch_size": 3}),
    ("sample", {"autoencoder": "elsewhere"}),
    ("teacher", {"guidance": 1.5}),
    ("optimizer", {"learning_rate": 0.5}),
    ("mesh", {"fsdp": 2}),
    ("evaluate", {"nearest_k": 3}),
  ],
)
def test_what_they_do_not_depend_on_is_not(section, values):
  assert described("gmflow", (section, values)) == described("gmflow")


def test_a_flow_map_is_described_by_the_strength_that_it_is_sampled_with():
  strength = lambda *changes: described("ayf_emd", *changes)["sample"]["guidance"]
  assert strength() == 1.25
  assert strength(("sample", {"guidance": 1.5})) == 1.5
  assert described("ayf_emd", ("sample", {"guidance": 1.25})) == described("ayf_emd"), "however it is given"


def test_parameters_noise_and_features_are_described(monkeypatch):
  assert described("gmflow", which="params") != described("gmflow") != described("gmflow", step=4)
  assert described("gmflow", protocol=Protocol(seed=1)) != described("gmflow")
  for size, classes in ((16, 10), (8, 9)):
    other = data.from_arrays(np.zeros((10, size, size, 1), np.float32), np.arange(10) % classes)
    assert described("gmflow", dataset=other) != described("gmflow")
  experiment = build(quick("digits", "gmflow", "teacher"), abstract=True)
  features = lambda protocol=PROTOCOL, name="stub 1": about.of_features(experiment, StubNetwork(name=name), protocol)
  assert features(name="stub 2") != features() != features(Protocol(labels="balanced"))
  found = features()
  for digest in ("one", "two"):
    monkeypatch.setattr(about, "codec_of", lambda dataset, digest=digest: types.SimpleNamespace(digest=lambda: digest))
    assert features() not in (found, features(name="stub 2"))
    found = features()


def test_the_teachers_dtype_and_computation_are_described(student_run, teacher_run):
  def teacher(protocol=PROTOCOL, **changes):
    settings = Settings.of(quick("digits", "gmflow", teacher_run))
    model = {key: changes.pop(key) for key in ("residual_dtype",) if key in changes}
    settings = settings.changed("teacher", **changes).changed("model", **model)
    return about.of_teacher(build(settings), protocol)

  own = teacher()
  assert teacher() == own
  others = [teacher(dtype="bfloat16"), teacher(residual_dtype="bfloat16")]
  others += [teacher(Protocol(seed=1)), teacher(dataclasses.replace(PROTOCOL, num_samples=60_000))]
  assert own not in others
