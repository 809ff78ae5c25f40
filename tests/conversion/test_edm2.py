"""EDM2 through `pflow convert`: a snapshot, a state dict and a training state in, NVIDIA's class out, to the bit."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pflow_jax as pf
from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.commands import cli
from pflow_jax.commands import run as commands_run
from pflow_jax.conversion import models
from pflow_jax.conversion.from_torch import open_source
from pflow_jax.conversion.program import convert
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.evaluation import sample as evaluation_sample
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.families.edm2.latents import scaling_of
from pflow_jax.networks.vae import AutoencoderKL
from pflow_jax.settings.defaults import default_config
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.torch_io.tensors import WEIGHTS
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.parts import find_guide
from tests import edm2
from tests.programs import write_pretrained

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("edm2")
  path = edm2.snapshot(folder / "edm2-img64-xs-0134217-0.110.pkl", "weak")
  convert(path, folder / "run")
  convert(folder / "run", folder / "torch")
  return folder


def test_a_snapshot_becomes_a_teacher(files, capsys):
  settings = workdir.load_settings(files / "run")
  assert settings.head.plain() == {"kind": "denoiser", "sigma_data": 0.5, "max_sigma": 80.0, "min_sigma": 0.002}
  sizes = dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_levels=(1,), channels_per_head=8)
  assert settings.model.plain() == {"kind": "edm2", **sizes, "time_embedding": "fourier", "dtype": "float16"}
  assert settings.data == {"name": "synthetic", "shape": (16, 16, 3), "num_classes": 5}
  assert (settings.sample.solver, settings.sample.nfe) == ("edm", (63,))
  assert settings.source == {
    "class": "Precond",
    "folder": files.name,
    "sample_size": 16,
    "encoder": "StandardRGBEncoder",
    "file": "edm2-img64-xs-0134217-0.110",
    "license": "cc-by-nc-sa-4.0",
  }
  notes = models.recognise(open_source(files / "edm2-img64-xs-0134217-0.110.pkl")).notes
  assert notes[-1] == "teacher: edm2 8, 16 x 16 x 3, 5 classes, sigma_data 0.5, encoder StandardRGBEncoder"
  assert "left out: logvar_fourier.freqs, logvar_fourier.phases, logvar_linear.weight" in notes[0]


def test_there_and_back_is_exact(files, tmp_path):
  """Halves as the release has them, whole numbers, and a state dict that NVIDIA's class loads with all its names."""
  want = edm2.state_dict("weak")
  got = load_file(files / "torch" / WEIGHTS)
  assert got.keys() == want.keys()
  for name, tensor in want.items():
    if name.startswith("logvar"):
      assert not got[name].any()  # u(sigma) = 0: the loss is not weighted
    else:
      assert torch.equal(got[name], tensor.half()), name
  config = json.loads((files / "torch" / "config.json").read_text())
  defaults = {"use_fp16": True, "sigma_data": 0.5}
  assert {key: value for key, value in config.items() if key[0] != "_"} | defaults == edm2.KINDS["weak"] | defaults
  card = (files / "torch" / "README.md").read_text()
  assert "license: cc-by-nc-sa-4.0" in card
  assert "Precond(**config).load_state_dict" in card
  convert(files / "torch", tmp_path / "again")
  ours, again = (
    load_params(folder / workdir.CHECKPOINTS, which="params") for folder in (files / "run", tmp_path / "again")
  )
  jax.tree.map(np.testing.assert_array_equal, ours, again)
  assert workdir.load_settings(tmp_path / "again").model == workdir.load_settings(files / "run").model


def test_float32_goes_there_and_back(tmp_path):
  state = edm2.state_dict("weak")
  convert(edm2.snapshot(tmp_path / "a.pkl", "weak", torch.float32), tmp_path / "run")
  assert workdir.load_settings(tmp_path / "run").model.get("dtype") == "float32"
  convert(tmp_path / "run", tmp_path / "torch")
  got = load_file(tmp_path / "torch" / WEIGHTS)
  assert all(torch.equal(got[name], tensor) for name, tensor in state.items() if not name.startswith("logvar"))


@pytest.mark.parametrize("kind", ["weak", "img512"])
def test_tensors_alone_tell_their_sizes(tmp_path, kind):
  """A state dict without a config, as in the training states of NVIDIA's code."""
  state = edm2.state_dict(kind)
  path = tmp_path / "training-state-0134217.pt"
  torch.save(
    {"state": {"cur_nimg": 3}, "net": dict(state), "ema": {"stds": [0.05], "emas": [state]}, "loss_fn": {"a": 1}}, path
  )
  for key in ("net", "ema.emas.0"):
    source = models.recognise(open_source(path, key))
    model = models.model_of_torch(source.config, source.tensors.metadata, source.tensors)
    assert "64 channels a head and sigma_data 0.5, which its tensors do not tell" in source.notes[0]
    want = edm2.NAMES.model_from_config(edm2.KINDS[kind])
    assert model.attributes == want | {"channels_per_head": 64}
  save_file(state, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text('{"channels_per_head": 8}')
  assert models.recognise(open_source(tmp_path / "model.safetensors")).config["channels_per_head"] == 8


CHANGES = {
  "clip_act": (128, "clip_act: input should be greater than or equal to 256"),
  "channel_mult_noise": (2, "channel_mult_noise, channel_mult_emb: expected 1 and the largest of channel_mult, got 2"),
  "num_blocks": (60, "num_blocks: 2 levels of 60 blocks cannot be in 60 tensors"),
  "resample_filter": ([1, 3, 3, 1], "resample_filter"),
  "img_resolution": (17, "img_resolution: expected a multiple of 2, got 17"),
  "gelu": (True, "fields that this package does not know.*gelu = True"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_networks_are_refused(tmp_path, name):
  value, match = CHANGES[name]
  path = edm2.snapshot(tmp_path / "a.pkl", "weak")
  (tmp_path / "config.json").write_text(json.dumps({name: value}))
  with pytest.raises(ValueError, match=match):
    convert(path, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_runs_that_nvidias_class_has_no_place_for_are_refused(files):
  settings = workdir.load_settings(files / "run")
  shapes = {"out_conv/mp_kernel": (3, 3, 8, 3), "class_embed/mp_kernel": (5, 16)}
  data = {"sample_size": 16}
  made = models.model_of_run(settings, shapes, data)
  assert (made.attributes["channels"], made.attributes["num_classes"]) == (3, 5)
  with pytest.raises(ValueError, match="expected an EDM2's"):
    models.model_of_run(settings, {}, data)
  slow = models.model_of_run(settings.changed("model", time_embedding="positional"), shapes, data)
  with pytest.raises(ValueError, match="Precond has time_embedding 'fourier', .* got 'positional'"):
    _ = slow.torch_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A folder with the workdirs "strong", "weak" and "uncond", the latter of a network that knows no classes."""
  folder = tmp_path_factory.mktemp("pair")
  for kind in ("strong", "weak", "uncond"):
    convert(edm2.snapshot(folder / f"{kind}.pkl", kind, torch.float32), folder / kind)
  return folder


def student_of(pair, weak="weak", **data):
  """Config of a student of "strong", which a weaker one guides at 2.1."""
  own = workdir.load_settings(pair / "strong")
  config = default_config("ayf_emd")
  config.data = dict(name="synthetic", shape=(16, 16, 3), num_classes=5) | data
  config.model, config.head = own.model.plain(), own.head.plain()
  config.teacher.workdir, config.teacher.weak_workdir = str(pair / "strong"), str(pair / weak)
  config.teacher.guidance = 2.1
  return config


NOISE = np.random.default_rng(2).standard_normal((3, 16, 16, 3)).astype(np.float32)  # of the golden samples
LABELS = np.array([0, 2, 4])


def check_golden(golden, samples):
  want = golden("edm2_samples")["guided"]
  assert np.linalg.norm(np.moveaxis(samples, -1, 1) - want) < 1e-4 * np.linalg.norm(want)


def test_a_converted_teacher_with_a_weak_one_makes_nvidias_samples(golden, pair):
  """A student's teacher and its weaker guide, by their workdirs, walked as the release walks them."""
  experiment = build(student_of(pair))
  velocity = experiment.teacher.velocity(experiment.load_frozen())
  samples = jax.jit(lambda x, c: sample_teacher(velocity, x, c, steps=32, solver="edm"))(NOISE, LABELS)
  check_golden(golden, samples)


def test_a_converted_teacher_is_sampled_with_a_weak_one(golden, pair, tmp_path, monkeypatch):
  """By a command and in a notebook, as the release samples by default."""
  for program in (commands_run, evaluation_sample):
    monkeypatch.setattr(program, "draw_noise", lambda *_: (NOISE, LABELS))
  guided = [f"--config.sample.weak_workdir={pair / 'weak'}", "--config.sample.guidance=2.1"]
  cli.main(["sample", f"--workdir={pair / 'strong'}", "--num=3", f"--out={tmp_path / 'x'}", *guided])
  with np.load(tmp_path / "x.npz") as drawn:
    check_golden(golden, drawn["x0_nfe63"])
  check_golden(golden, pf.load(pair / "strong").sample(3, weak_workdir=str(pair / "weak"), guidance=2.1))


def test_a_weak_network_may_know_no_classes(pair):
  """NVIDIA's snapshots named -uncond-, which are guides of classifier-free guidance, and no teachers of classes."""
  experiment = build(student_of(pair, "uncond"))
  weak = experiment.teacher.parts["weak"]
  assert weak.network.module.num_classes == 0

  @jax.jit
  def velocities(params):
    fields = [experiment.teacher.parts[name].field(params[name]) for name in ("strong", "weak")]
    fields.append(experiment.teacher.velocity(params))
    return [field(NOISE, jnp.full(3, 0.5), LABELS) for field in fields]

  strong, without, guided = velocities(experiment.load_frozen())
  np.testing.assert_allclose(guided, 2.1 * strong - 1.1 * without, rtol=1e-4, atol=1e-4)
  config = student_of(pair)
  config.teacher.workdir = str(pair / "uncond")
  config.model = workdir.load_settings(pair / "uncond").model.plain()
  with pytest.raises(ValueError, match="the teacher in .*uncond is of 3 channels and 0 classes, synthetic has 3 and 5"):
    build(config)


def test_a_weak_network_of_another_family_is_refused(pair, tmp_path):
  """A DiT of latents of unit variance, beside a network of pixels with a deviation of 0.5."""
  config = student_of(pair)
  other = config.copy_and_resolve_references()
  other.model, other.head = dict(kind="dit", width=8, depth=1, num_heads=1, patch_size=8), dict(kind="velocity")
  config.teacher.weak_workdir = str(write_pretrained(other, tmp_path / "dit"))
  with pytest.raises(
    ValueError, match=r"weak teacher in .*dit takes data with a standard deviation of 1, .* guide 0\.5"
  ):
    build(config)


def test_guides_of_samples_that_do_not_fit_are_refused(pair, tmp_path, capsys):
  settings, weak = workdir.load_settings(pair / "strong"), str(pair / "weak")
  load = lambda **changes: data.load("synthetic", **{"shape": (16, 16, 3), "num_classes": 5, **changes})
  with pytest.raises(ValueError, match=r"weak teacher in .*weak is of 3 channels and 5 classes, synthetic has 3 and 7"):
    find_guide(settings, load(num_classes=7), weak, None)
  with pytest.raises(ValueError, match=r"weak is of 3 channels and 5 classes, synthetic has 4 and 5"):
    find_guide(settings, load(shape=(16, 16, 4)), weak, None)
  with pytest.raises(ValueError, match=r"weak takes data with a standard deviation of 0\.5, the model .* guide 1"):
    find_guide(settings.changed("head", sigma_data=1.0), load(), weak, None)
  with pytest.raises(ValueError, match="no checkpoint of step 7"):
    find_guide(settings, load(), weak, 7)
  with pytest.raises(ValueError, match=r"config\.sample\.weak_workdir: guides a teacher .* this run is a student"):
    build(student_of(pair)).method.guide(SampleSettings(weak_workdir=weak, guidance=2.0))
  run = ["sample", f"--workdir={pair / 'strong'}", "--num=2", f"--out={tmp_path / 'x'}"]
  cases = {
    ("--config.sample.weak_workdir=missing", "--config.sample.guidance=2"): (
      "config.sample.weak_workdir: there is no run in .*missing; say where the teacher is with --config.sample.weak"
    ),
    (f"--config.sample.weak_workdir={weak}",): "guides nothing at strength 1; set config.sample.guidance",
    ("--config.sample.weak_step=1",): "is of a weaker model, whose run config.sample.weak_workdir names",
    ("--config.sample.guidance=2",): r"or a weaker one that guides it \(config\.sample\.weak_workdir\)",
  }
  for flags, problem in cases.items():
    with pytest.raises(SystemExit) as ended:
      cli.main([*run, *flags])
    assert ended.value.code == 2
    assert re.search(problem, capsys.readouterr().err)


def test_samples_of_latents_are_decoded_as_nvidia_does(tmp_path):
  """Of pictures in [0, 1], scaled by channel; an autoencoder that did not make EDM2's latents is refused."""
  encoder = edm2.persistent("StabilityVAEEncoder", base=object, vae_name="stabilityai/sd-vae-ft-mse")
  convert(edm2.snapshot(tmp_path / "a.pkl", "img512", torch.float32, encoder=encoder), tmp_path / "run")
  mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
  vae = AutoencoderKL(widths=(2,), depth=1, groups=1, mid_attention=False)
  params = vae.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))["params"]
  for name, module in (("sd", vae), ("sdxl", vae.clone(scale=0.13025))):
    pf.Codec(module, params).save(tmp_path / name)
  settings = workdir.load_settings(tmp_path / "run").changed("sample", autoencoder=str(tmp_path / "sd"))
  codec = codec_of(build(settings, run=tmp_path / "run").dataset)
  z = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
  raw = z / 0.5 * std + mean
  picture = vae.apply({"params": params}, jnp.float32(raw * 0.18215), method="decode")  # in [0, 1]
  np.testing.assert_allclose(codec.decode(z), 2 * picture - 1, rtol=1e-4, atol=1e-5)
  x = np.random.default_rng(1).uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32)
  encoded = vae.apply({"params": params}, jnp.asarray((x + 1) / 2), method="encode") / 0.18215
  np.testing.assert_allclose(codec.encode(x), (encoded - mean) / std * 0.5, rtol=1e-4, atol=1e-5)
  other = settings.changed("sample", autoencoder=str(tmp_path / "sdxl"))
  with pytest.raises(ValueError, match="sdxl: expected sd-vae-ft-mse, with which EDM2's latents are made"):
    codec_of(build(other, run=tmp_path / "run").dataset)


@pytest.mark.parametrize(
  ("arguments", "scale"),
  [({"final_std": 1, "raw_std": [1, 2, 4, 8]}, (1, 0.5, 0.25, 0.125)), ({"raw_mean": "an array"}, None)],
)
def test_the_scale_of_an_encoder_is_that_of_its_arguments(arguments, scale):
  found = scaling_of(arguments)
  assert (found and found.scale) == scale
