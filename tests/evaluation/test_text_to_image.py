"""The whole way of FLUX.1 and Qwen-Image, tiny: convert, cache prompts, distil, sample, export, and the same picture
in PyTorch."""

import importlib.util
import json
from unittest import mock

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.conversion.cache import cache
from pflow_jax.conversion.program import convert
from pflow_jax.evaluation import text_to_image
from pflow_jax.evaluation.text_to_image import sample_prompts
from pflow_jax.families.autoencoder import load_autoencoder
from pflow_jax.families.text import encode_prompts
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from pflow_jax.training.workdir import load_config
from tests import encoders
from tests.programs import ROOT, quick, write_pretrained

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", "the dog", "two cats of a photo", "blue", "a photo of the dog", "red", "cats", "a a a"]
SIZE = dict(num_layers=1, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6))


def torch_student():
  spec = importlib.util.spec_from_file_location("torch_student", ROOT / "examples" / "torch_student.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def write_pipeline(model, folder):
  """A folder as published: transformer, autoencoder, and text encoders."""
  torch.manual_seed(0)
  if model == "flux":
    encoders.write_flux(folder)
    sizes = dict(joint_attention_dim=encoders.T5_WIDTH, pooled_projection_dim=encoders.CLIP_WIDTH, **SIZE)
    transformer = diffusers.FluxTransformer2DModel(num_single_layers=1, guidance_embeds=True, **sizes)
    vae = diffusers.AutoencoderKL(
      latent_channels=16,
      block_out_channels=(8, 8),
      down_block_types=["DownEncoderBlock2D"] * 2,
      up_block_types=["UpDecoderBlock2D"] * 2,
      norm_num_groups=4,
      scaling_factor=0.36,
      shift_factor=0.11,
      use_quant_conv=False,
      use_post_quant_conv=False,
    )
  else:
    encoders.write_qwen_image(folder)
    transformer = diffusers.QwenImageTransformer2DModel(joint_attention_dim=encoders.QWEN_WIDTH, **SIZE)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2], temperal_downsample=[False])
  for parameter in [*transformer.parameters(), *vae.parameters()]:
    with torch.no_grad():
      parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
  transformer.save_pretrained(folder / "transformer")
  vae.save_pretrained(folder / "vae")
  return folder


def student_config(model, teacher, prompts, **changes):
  """The quicktest of the model's published recipe, on real prompts of the tiny encoders."""
  config = quick(model, "gm_data_free", teacher, steps=20, checkpoint_every=20, batch_size=8, log_every=1, **changes)
  config.data = dict(name=f"prompts:{prompts}", model=model, shape=(8, 8, 16))
  own = load_config(teacher).model
  for key in ("depth", "single_depth", "num_heads", "head_dim", "text_width", "pooled_width", "rope_axes"):
    if key in own:
      config.model[key] = own[key]
  config.optimizer.update(learning_rate=1e-2)
  config.objective.ratio_decay = 0
  config.teacher.dtype = "float32"  # as PyTorch reads the folder here
  return config


@pytest.fixture(scope="module", params=["flux", "qwen_image"])
def journey(request, tmp_path_factory):
  """Folders and results of all steps, as a user would run them."""
  model, root = request.param, tmp_path_factory.mktemp(request.param)
  torch.set_num_threads(1)
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    pipeline = write_pipeline(model, root / "pipeline")
    convert(pipeline / "transformer", root / "teacher")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    length = 12 if model == "flux" else 16
    cache(str(root / "prompts.txt"), model, str(root / "prompts"), encoders=str(pipeline), max_length=length)
    train(student_config(model, root / "teacher", root / "prompts"), root / "student")
    config = load_config(root / "student")
    config.sample.method = "lakonlab-0.2"
    out = sample_prompts(config, root / "student", PROMPTS[:2], pipeline=pipeline, height=12, width=20, seed=3)
    convert(root / "student", root / "export")
  return model, root, out


def test_loss_falls(journey):
  _, root, _ = journey
  losses = [json.loads(line)["loss"] for line in (root / "student" / "metrics.jsonl").read_text().splitlines()]
  assert len(losses) == 20
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_adapter_and_heads_alone_train(journey):
  _, root, _ = journey
  keys = json.loads((root / "export" / "config.json").read_text())
  assert keys["_class_name"].startswith("GM")
  tensors, metadata = torch_student().read_tensors(root / "export")
  assert json.loads(metadata["policy_config"]) == {"type": "GMFlow"}
  assert any("lora_A" in name for name in tensors)
  assert {name.split(".")[0] for name in tensors if "lora" not in name} == {
    *("norm_out", "proj_out_means", "proj_out_logweights", "proj_out_logstds")
  }


def test_pytorch_draws_the_same_picture(journey):
  _, root, out = journey
  reader = torch_student()
  with np.load(out / "samples.npz") as file:
    arrays = dict(file)
  args = ["--student", root / "export", "--base", root / "pipeline", "--noise", out / "samples.npz"]
  args += ["--out", root / "x0.npy", "--vae", root / "pipeline" / "vae"]
  reader.main(list(map(str, args)))
  x0 = np.load(root / "x0.npy")
  assert x0.shape == arrays["x0"].shape
  assert np.linalg.norm(x0 - arrays["x0"]) / np.linalg.norm(x0) < 1e-3
  theirs = reader.decode(torch.tensor(x0).movedim(-1, 1), root / "pipeline" / "vae")
  for i, picture in enumerate(theirs):
    with Image.open(out / f"{i:04d}.png") as image:
      difference = np.abs(np.asarray(image, np.float32) - np.asarray(picture, np.float32))
    assert difference.max() <= 2  # of 255: rounding


def test_pictures_say_how_they_were_made(journey):
  model, _, out = journey
  with Image.open(out / "0001.png") as image:
    assert image.size[0] == 20 * image.size[1] // 12
    told = json.loads(image.info["parameters"])
  expected = {
    "temperature": "auto",
    "prompt": "the dog",
    "index": 1,
    "seed": 3,
    "nfe": 4,
    "model": model,
    "step": 20,
    "width": 20,
    "height": 12,
  }
  assert expected.items() <= told.items()
  assert (out / "overview.png").exists()


def test_command_line_and_a_file_of_prompts(journey, capsys, tmp_path):
  """A picture depends on its prompt, its place and the seed, not on what it is sampled with."""
  _, root, out = journey
  (tmp_path / "more.jsonl").write_text('{"prompt": "the dog"}\n')
  args = ["sample", "--workdir", root / "student", "--prompt", "a red cat", "--prompts", tmp_path / "more.jsonl"]
  args += ["--pipeline", root / "pipeline", "--width", 20, "--height", 12, "--seed", 3, "--out", tmp_path / "out"]
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    main([*map(str, args), "--config.sample.method=lakonlab-0.2"])
  assert "overview.png" in capsys.readouterr().out
  with np.load(tmp_path / "out" / "samples.npz") as again, np.load(out / "samples.npz") as first:
    np.testing.assert_allclose(again["x0"], first["x0"], atol=1e-5)


def test_a_converted_teacher_is_sampled_with_guidance(journey, tmp_path):
  """By hand: Euler's steps at the model's shifted times, away from the empty prompt."""
  model, root, _ = journey
  config = load_config(root / "teacher")
  config.sample.guidance, config.data.max_length = 2.0, 12 if model == "flux" else 16
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    out = sample_prompts(
      config, root / "teacher", PROMPTS[:2], pipeline=root / "pipeline", height=12, width=20, nfe=2, out=tmp_path / "o"
    )
    with np.load(out / "samples.npz") as file:
      arrays = dict(file)
    encoded = encode_prompts(model, root / "pipeline", [*PROMPTS[:2], ""], config.data.max_length, dtype="float32")
    cond, null = {k: v[:2] for k, v in encoded.items()}, {k: v[[2, 2]] for k, v in encoded.items()}
    dataset = data.Dataset(
      "prompts",
      arrays["noise"].shape[1:],
      0,
      (),
      records=None,
      embedding=data.Embedding(
        lengths=(cond["text"].shape[1],),
        text_width=cond["text"].shape[2],
        masked="mask" in cond,
        pooled_width=cond["pooled"].shape[1] if "pooled" in cond else 0,
      ),
    )
    experiment = build(config, dataset=dataset, run=root / "teacher")
    velocity = experiment.method.velocity(experiment.load(root / "teacher", "params"))
    x, middle = arrays["noise"], 3.2 * 0.5 / (1 + 2.2 * 0.5)
    for t, s in ((1.0, middle), (middle, 0.0)):
      times = np.full(2, t, np.float32)
      v, v_null = velocity(x, times, cond), velocity(x, times, null)
      x = x + (s - t) * np.asarray(v_null + 2 * (v - v_null))
  assert np.abs(x - arrays["noise"]).max() > 0.1
  np.testing.assert_allclose(arrays["x0"], x, atol=2e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(pipeline=None), "^pipeline: expected"),
    (dict(width=7), "^width: expected a multiple of 4 pixels, got 7"),
    (dict(pipeline="nowhere"), "nowhere"),
  ],
)
def test_what_does_not_fit_is_refused(options, message, journey, tmp_path):
  _, root, _ = journey
  config = load_config(root / "student")
  given = dict(pipeline=root / "pipeline", out=tmp_path / "out") | options
  with pytest.raises(ValueError, match=message):
    sample_prompts(config, root / "student", ["a"], **given)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("folder", "flags", "message"),
  [
    ("teacher", ["--prompt=a"], "--pipeline: expected the folder of the published model"),
    ("pipeline/transformer", ["--prompt=a"], "is of a model for PyTorch; `pflow convert --source"),
    ("student", ["--width=20"], "--width: of pictures of prompts; give --prompt"),
    ("student", ["--prompt=a", "--num=4"], "--num and --prompt: expected one of them"),
  ],
)
def test_mistakes_of_the_command_line(folder, flags, message, journey, capsys):
  with pytest.raises(SystemExit) as stopped:
    main(["sample", f"--workdir={journey[1] / folder}", *flags])
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_classes_are_no_texts(student_run):
  with pytest.raises(ValueError, match="knows classes, not texts"):
    sample_prompts(load_config(student_run), student_run, ["a"])


def test_pictures_become_latents(journey, tmp_path):
  _, root, _ = journey
  codec = load_autoencoder(root / "pipeline")
  Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3)).save(tmp_path / "tall.png")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    z = codec.read([tmp_path / "tall.png"], (8, 12))
  assert z.shape == (1, 8 // codec.factor, 12 // codec.factor, 16)
  (tmp_path / "no.png").write_text("no picture")
  with pytest.raises(ValueError, match=r"cannot read the image .*no\.png"):
    codec.read([tmp_path / "no.png"], (8, 12))


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("policy", ["gmflow", "arc"])
@pytest.mark.parametrize("model", ["flux", "qwen_image"])
def test_student_starts_as_its_teachers_one_step(model, policy, tmp_path):
  """Without noise on the biases, and before any training, the policy is the teacher's velocity."""
  config = quick(model, {"gmflow": "gm", "arc": "arc"}[policy])
  write_pretrained(config, tmp_path)
  config.teacher.update(workdir=str(tmp_path), guidance=1.0, bias_noise=0.0, dtype="float32")
  experiment = build(config)
  frozen = experiment.load_frozen()
  batch = next(data.batches(experiment.dataset, 4, seed=0))
  x, t = jax.random.normal(jax.random.key(0), (4, *experiment.dataset.shape)), jax.numpy.array([1.0, 0.9, 0.5, 0.2])

  @jax.jit
  def both(frozen):
    params = experiment.complete(experiment.init(jax.random.key(1), frozen), frozen)
    policies = experiment.method.student(params)(x, t, batch["cond"])
    velocity = jax.vmap(lambda policy, x, t: policy.velocity(x, t))(policies, x, t)
    return velocity, experiment.teacher.velocity(frozen)(x, t, batch["cond"])

  own, teachers = both(frozen)
  assert float(jax.numpy.linalg.norm(own - teachers) / jax.numpy.linalg.norm(teachers)) < 1e-5


def test_images_beside_prompts_are_cached_as_latents(journey, tmp_path):
  model, root, _ = journey
  pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), np.uint8)
  for i, picture in enumerate(pixels):
    Image.fromarray(picture).save(tmp_path / f"{i}.png")
  lines = [json.dumps({"prompt": f"cat {i}", "image": f"{i}.png"}) for i in range(len(pixels))]
  (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
  args = ["cache", "--prompts", tmp_path / "prompts.jsonl", "--model", model, "--encoders", root / "pipeline"]
  args += ["--out", tmp_path / "out", "--max_length", 12, "--images", "image", "--height", 12, "--width", 16]
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    main([*map(str, args)])
    codec = load_autoencoder(root / "pipeline")
    expected = codec.read([tmp_path / "1.png"], (12, 16))[0]
  dataset = data.load(f"prompts:{tmp_path / 'out'}")
  assert dataset.shape == expected.shape == (12 // codec.factor, 16 // codec.factor, 16)
  records = [dataset.records.source.read(i) for i in range(3)]
  found = next(record for prompt, record in records if prompt == "cat 1")
  np.testing.assert_allclose(found["x0"], expected, atol=2e-3 * np.abs(expected).max())


def test_every_process_asks_for_the_step(monkeypatch, tmp_path):
  """The step is agreed by all processes: one that asked for it alone would wait for ever."""
  asked, settings = [], Settings.of(quick("flux", "gm_data_free", tmp_path))
  for name in ("build", "layout_of", "ask", "evaluations"):
    monkeypatch.setattr(text_to_image, name, mock.MagicMock())
  monkeypatch.setattr(text_to_image, "draw", lambda *args: (None, None))
  monkeypatch.setattr(text_to_image, "newest_step", asked.append)
  monkeypatch.setattr(text_to_image, "is_first", lambda: False)
  sample_prompts(settings, tmp_path / "run", ["a cat"])
  assert asked == [f"{tmp_path}/run/checkpoints"]
  assert list(tmp_path.iterdir()) == []
