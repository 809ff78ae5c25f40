"""Flow maps of text-to-image models as runs: their start, training from a converted teacher, samples, to PyTorch and
back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pflow_jax.checkpoints.checkpoint import Checkpointer, load_params
from pflow_jax.conversion.program import convert
from pflow_jax.core.objectives import flow_map
from pflow_jax.evaluation.sample import sample
from pflow_jax.mesh.partition import path_of
from pflow_jax.settings.tree import Settings
from pflow_jax.torch_io.table import same_bits
from pflow_jax.torch_io.tensors import WEIGHTS
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from tests.conversion.folders import assert_same_tensors, metadata_of, write_torch
from tests.programs import ROOT, load_module, quick
from tests.training.test_network import leaves_of

pytestmark = pytest.mark.usefixtures("float32")

KINDS = ("flux", "qwen_image")
STRENGTHS = {"flux": 3.5, "qwen_image": 4.0}  # of the configs' teachers
SHAPE = (8, 8, 4)
BRANCHES = ("length_embed/out/kernel", "guidance_embed/out/kernel")
reader = load_module(ROOT / "examples" / "torch_student.py")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
  """Folders torch/<kind>, of diffusers, and run/<kind>, converted."""
  folder = tmp_path_factory.mktemp("teachers")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    for kind in KINDS:
      write_torch(folder / "torch" / kind, kind)
      convert(folder / "torch" / kind, folder / "run" / kind)
  return folder


def config_of(kind, teachers, **train):
  """The quicktest of the config's flow map, on the teacher."""
  config = quick(kind, "ayf", teachers / "run" / kind, **train)
  config.model = workdir.load_config(teachers / "run" / kind).model.to_dict()
  config.data.shape = SHAPE
  config.teacher.dtype = "float32"
  config.adapters.table = tuple((pattern, 4) for pattern, *_ in config.adapters.table)
  config.objective.warmup_steps = 2
  config.optimizer.learning_rate = 1e-2
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teachers):
  """(workdir, final state) of three steps of FLUX.1's."""
  folder = tmp_path_factory.mktemp("trained")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return folder, train(config_of("flux", teachers), folder)


def write_untrained(folder, config):
  """A run of random parameters, as if it had trained."""
  experiment = build(config)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(experiment.init, jax.random.key(0), experiment.frozen)
  params = jax.tree.map(lambda s: rng.normal(scale=0.3, size=s.shape).astype(s.dtype), shapes)
  workdir.claim(folder, Settings.of(config, converted=True))
  with Checkpointer(folder / workdir.CHECKPOINTS) as checkpointer:
    checkpointer.save(1, {"params": params, "ema": params})
  return params


def inputs(kind, batch=3):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(batch, *SHAPE)).astype(np.float32)
  cond = {"text": rng.normal(size=(batch, 6, 12)).astype(np.float32)}
  if kind == "flux":
    return x, cond | {"pooled": rng.normal(size=(batch, 10)).astype(np.float32)}
  return x, cond | {"mask": np.arange(6) < np.array([[6], [3], [4]])[:batch]}


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_its_teacher_wherever_it_jumps(teachers, kind):
  """FLUX.1-dev's at the strength that is asked for, Qwen-Image's without guidance, which it is still to learn."""
  experiment = build(config_of(kind, teachers))
  frozen = experiment.load_frozen()
  trained = jax.jit(experiment.init)(jax.random.key(0), frozen)
  names = set(leaves_of(trained))
  assert {"length_embed/in/kernel", "length_embed/out/kernel", "time_embed/in/lora_a", "head/proj_out/bias"} < names
  assert {"final_norm/adaln/kernel", "double_blocks/img_mlp_in/lora_a"} < names
  assert ("guidance_embed/out/kernel" in names) == (kind == "qwen_image"), "the teacher's own stays as it is"
  assert not names & {"time_embed/in/kernel", "double_blocks/img_q/kernel"}
  x, cond = inputs(kind)
  t = jnp.array([0.3, 0.7, 1.0])
  jump = jax.jit(lambda trained, s, w: _jump(experiment, trained, frozen, x, t, cond, s=s, guidance=w))
  velocity = jax.jit(lambda w: experiment.teacher.velocity(frozen, w if kind == "flux" else 1.0)(x, t, cond))
  wanted = []
  for strength in (2.0, 5.0):
    w = jnp.full(3, strength)
    wanted.append(velocity(w))
    for s in (t, t / 2, 0 * t):
      np.testing.assert_allclose(jump(trained, s, w), wanted[-1], rtol=1e-5, atol=1e-6)
  assert (np.abs(wanted[0] - wanted[1]).max() > 1e-3) == (kind == "flux")
  # Not because they go nowhere.
  moved = jax.tree_util.tree_map_with_path(
    lambda keys, a: jax.random.normal(jax.random.key(1), a.shape) if path_of(keys) in BRANCHES else a, trained
  )
  one, *others = (jump(moved, s, jnp.full(3, w)) for s, w in ((t, 2.0), (0 * t, 2.0), (t, 5.0)))
  assert min(np.abs(one - other).max() for other in others) > 1e-3


def _jump(experiment, trained, frozen, *args, **named):
  return experiment.network(experiment.complete(trained, frozen), *args, **named)


def test_a_teacher_is_asked_for_the_strength_in_its_own_way(teachers):
  """FLUX.1-dev by its input, in one evaluation; Qwen-Image against the empty prompt, in two."""
  strengths = jnp.array([2.0, 3.0, 5.0])
  t = jnp.array([0.3, 0.7, 1.0])
  for kind in KINDS:
    experiment = build(config_of(kind, teachers))
    frozen = experiment.load_frozen()
    x, cond = inputs(kind)
    network = experiment.teacher.parts["strong"].network

    def velocities(w, experiment=experiment, network=network, kind=kind, frozen=frozen, x=x, cond=cond):
      got = experiment.teacher.velocity(frozen, w)(x, t, cond)
      if kind == "flux":
        return got, network(frozen["strong"], x, t, cond, guidance=w)
      null = jax.tree.map(lambda c, n: jnp.broadcast_to(n[: c.shape[1]], c.shape), cond, experiment.dataset.null_cond)
      own, empty = (network(frozen["strong"], x, t, c) for c in (cond, null))
      return got, empty + w[:, None, None, None] * (own - empty)

    np.testing.assert_allclose(*jax.jit(velocities)(strengths), rtol=1e-4, atol=1e-5)
    assert experiment.method.teachers_strength == STRENGTHS[kind]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(trained, teachers, tmp_path):
  folder, whole = trained
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / workdir.CHECKPOINTS / "3")
  half = leaves_of(load_params(tmp_path / "run" / workdir.CHECKPOINTS, which="params"))
  parts = train(config_of("flux", teachers), tmp_path / "run")
  assert int(parts.step) == 3
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  after = leaves_of(parts.params)
  assert {path for path in after if not np.array_equal(half[path], after[path])} == set(after)
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [(row["skipped"], row["masked"]) for row in rows] == [(0, 0)] * 3
  assert all(np.isfinite([row["residual"], row["derivative"]]).all() for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("flux", (1, 8)), ("qwen_image", (2, 4))])
def test_it_is_sampled_and_goes_to_pytorch_and_back(trained, teachers, tmp_path, kind, steps):
  folder, _ = trained
  if kind != "flux":
    write_untrained(folder := tmp_path / "run", config_of(kind, teachers))
  config = workdir.load_config(folder)
  config.sample.update(nfe=steps, batch_size=4)
  with np.load(sample(config, folder, num=3, out=tmp_path / "x").with_suffix(".npz")) as file:
    drawn = dict(file)
  convert(folder, tmp_path / "torch")
  tensors, base = load_file(tmp_path / "torch" / WEIGHTS), teachers / "torch" / kind
  assert "time_text_embed.length_embedder.linear_2.weight" in tensors
  assert ("time_text_embed.guidance_embedder.linear_1.bias" in tensors) == (kind == "qwen_image")
  stated = json.loads(metadata_of(tmp_path / "torch")["flow_map"])
  assert stated == dict(objective="ayf_emd", shift=3.2, guidance=[2.0, 5.0], strength=STRENGTHS[kind])
  card = (tmp_path / "torch" / "README.md").read_text()
  assert "A flow map" in card
  assert "--nfe 4" in card
  # PyTorch draws the same.
  cond = {name: drawn[name] for name in inputs(kind)[1]}
  np.savez(tmp_path / "noise.npz", noise=drawn["noise"], **cond)
  args = [f"--student={tmp_path / 'torch'}", f"--base={base}", f"--noise={tmp_path / 'noise.npz'}"]
  for nfe in steps:
    reader.main([*args, f"--nfe={nfe}", f"--out={tmp_path / 'x0.npy'}"])
    got, want = np.load(tmp_path / "x0.npy"), drawn[f"x0_nfe{nfe}"]
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
  one, other = (drawn[f"x0_nfe{nfe}"] for nfe in steps)
  assert np.abs(one - other).max() > 0.01 * np.abs(one).max()
  config.sample.update(guidance=2.5, nfe=steps[:1])
  with np.load(sample(config, folder, num=3, out=tmp_path / "weak").with_suffix(".npz")) as file:
    weak = file[f"x0_nfe{steps[0]}"]
  reader.main([*args, f"--nfe={steps[0]}", "--strength=2.5", f"--out={tmp_path / 'x0.npy'}"])
  error, difference = (np.abs(weak - other).max() for other in (np.load(tmp_path / "x0.npy"), one))
  assert error < 1e-3 * np.abs(weak).max()
  assert error < 0.1 * difference, "another strength is another picture"
  with pytest.raises(SystemExit, match=r"--strength: expected a strength in \[2.0, 5.0\], got 6"):
    reader.main([*args, "--nfe=2", "--strength=6", f"--out={tmp_path / 'no.npy'}"])
  # And it comes back.
  convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / kind)
  own, back = (load_params(path / workdir.CHECKPOINTS) for path in (folder, tmp_path / "back"))
  assert all(jax.tree.leaves(jax.tree.map(same_bits, own, back)))
  again = workdir.load_config(tmp_path / "back")
  assert (again.objective.kind, again.objective.shift, again.objective.guidance) == ("ayf_emd", 3.2, (2.0, 5.0))
  assert again.teacher.guidance == config.teacher.guidance
  assert build(again).method.teachers_strength == STRENGTHS[kind]
  whole = [build(c).load(path) for c, path in ((config, folder), (again, tmp_path / "back"))]
  assert all(jax.tree.leaves(jax.tree.map(same_bits, *(jax.tree.map(np.asarray, tree) for tree in whole))))
  convert(tmp_path / "back", tmp_path / "again")
  assert_same_tensors(tmp_path / "again", tmp_path / "torch")
  assert json.loads(metadata_of(tmp_path / "again")["flow_map"]) == stated
  assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "torch" / "config.json").read_text()


@pytest.mark.parametrize(("kind", "guidance"), [("flux", (2.0, 5.0)), ("qwen_image", (1.0, 1.0))])
def test_a_map_that_trained_in_full_needs_no_base(teachers, tmp_path, kind, guidance):
  """One for a single strength tells none."""
  config = config_of(kind, teachers)
  config.adapters.table, config.objective.guidance, config.teacher.guidance = (), guidance, 1.0
  params = write_untrained(tmp_path / "run", config)
  convert(tmp_path / "run", tmp_path / "torch")
  student = reader.load_student(tmp_path / "torch")
  assert ("strength" in student.sampling) == (kind == "flux")
  convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / kind)
  back = load_params(tmp_path / "back" / workdir.CHECKPOINTS)
  assert all(jax.tree.leaves(jax.tree.map(same_bits, params, back)))


def test_files_that_are_no_flow_maps_are_refused(teachers, tmp_path):
  write_untrained(tmp_path / "run", config_of("qwen_image", teachers))
  convert(tmp_path / "run", tmp_path / "torch")
  tensors, stated = load_file(tmp_path / "torch" / WEIGHTS), metadata_of(tmp_path / "torch")
  base, torch_base = teachers / "run" / "qwen_image", teachers / "torch" / "qwen_image"

  def refused(match, theirs, tensors=tensors, **changes):
    told = json.dumps(json.loads(stated["flow_map"]) | changes)
    save_file(tensors, tmp_path / "torch" / WEIGHTS, {"flow_map": told} if changes is not None else {})
    with pytest.raises(ValueError, match=match):
      convert(tmp_path / "torch", tmp_path / "back", base=base)
    if theirs:
      with pytest.raises(ValueError, match=theirs):
        reader.load_student(tmp_path / "torch", torch_base)

  name = "time_text_embed.length_embedder.linear_1.weight"
  lacking = {key: tensor for key, tensor in tensors.items() if key != name}
  refused(f"1 missing: {name}", f"missing: {name}", lacking, shift=3.2)
  refused("objective: expected one of .*'ayf_emd'.*got 'imitation'", None, objective="imitation")
  refused("metadata flow_map.*shift", None, shift=-1.0)
  refused("unexpected.*guidance_embedder", "unexpected: .*guidance_embedder", guidance=None)
  save_file(tensors, tmp_path / "torch" / WEIGHTS, {"policy_config": '{"type": "GMFlow"}'})
  with pytest.raises(
    ValueError, match="policy_config: GMFlow does not go with the class FlowMap|expected the metadata"
  ):
    convert(tmp_path / "torch", tmp_path / "back", base=base)
  with pytest.raises(ValueError, match="expected the metadata flow_map of a flow map, got"):
    reader.load_student(tmp_path / "torch", torch_base)
  assert not (tmp_path / "back").exists()


def test_what_it_cannot_learn_from_is_refused(teachers):
  config = config_of("flux", teachers)
  config.objective.guidance = (4.0, 5.0)
  with pytest.raises(ValueError, match=r"config\.model\.guidance: expected a strength in .*\[4\.0, 5\.0\].*got 3\.5"):
    build(config)
  config = config_of("qwen_image", teachers)
  config.teacher.guidance = 1.0
  with pytest.raises(ValueError, match=r"config\.teacher\.guidance: expected a strength in .*\[2\.0, 5\.0\].*got 1\.0"):
    build(config)
  config = config_of("qwen_image", teachers)
  config.model["attention"] = "splash"
  with pytest.raises(ValueError, match=r"config\.model\.attention: 'splash' has no forward derivative"):
    build(config)


def test_lengths_of_jumps_are_long_often_enough_for_one_step():
  """What configs/flux.py says of its distribution: 4 % of the jumps are longer than 0.9, of AYF's others 0.13 %."""
  for mean, std, share in ((-0.6, 1.6, 0.040), (-0.8, 1.0, 0.0013)):
    settings = flow_map.ayf_emd(time_mean=mean, time_std=std)
    t, s = flow_map.sample_interval(jax.random.key(0), 400_000, settings)
    np.testing.assert_allclose(np.mean(t - s > 0.9), share, rtol=0.15)
