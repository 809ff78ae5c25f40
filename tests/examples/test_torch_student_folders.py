"""The PyTorch reader of exported students: what it reads, its command line, and what it refuses."""

import ast
import json
import pathlib
import sys

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.examples.student_folders import CHANNELS, SAMPLING, WEIGHTS, inputs, make, make_adapter, write, write_model
from tests.examples.test_torch_student import reader, torch_samples

pytestmark = pytest.mark.usefixtures("float32")
GMFLOW = {"policy_config": json.dumps(dict(type="GMFlow"))}


def test_the_reader_needs_no_jax():
  tree = ast.parse(pathlib.Path(reader.__file__).read_text())
  names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
  names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
  allowed = {"PIL", "diffusers", "numpy", "safetensors", "torch", *sys.stdlib_module_names}
  assert {name.split(".")[0] for name in names} <= allowed


@pytest.fixture
def dit_folder(tmp_path):
  """A student's folder, its tensors, and a function that writes others, and fields and metadata of its own."""
  _, params = make("dit", "gmflow")
  folder = write_model(tmp_path / "student", "dit", "gmflow", params)
  tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())

  def change(tensors=tensors, metadata=GMFLOW, **fields):
    return write(folder, config | fields, tensors, metadata)

  return folder, tensors, change


def test_a_dit_may_have_its_embedding_in_every_block_and_its_weights_in_shards(dit_folder):
  """As stock diffusers names and cuts them."""
  folder, tensors, _ = dit_folder
  run = lambda: torch_samples(reader.load_student(folder), *inputs("dit"), nfe=1, substeps=8)
  want = run()
  for name in [name for name in tensors if name.startswith("emb.")]:
    tensors |= {f"transformer_blocks.{i}.norm1.{name}": tensors[name] for i in range(2)}
    del tensors[name]
  shards = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
  for shard in set(shards.values()):
    save_file({name: tensor for name, tensor in tensors.items() if shards[name] == shard}, folder / shard, GMFLOW)
  (folder / WEIGHTS).unlink()
  (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(dict(weight_map=shards)))
  np.testing.assert_array_equal(run(), want)


@pytest.mark.parametrize("frequency_shift", [0, 1])
def test_a_dit_is_that_of_diffusers_but_for_its_frequencies(tmp_path, frequency_shift):
  size = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=CHANNELS, sample_size=8)
  torch.manual_seed(0)
  net = diffusers.DiTTransformer2DModel(**size, num_embeds_ada_norm=5).eval()
  tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
  config = size | dict(_class_name="DXDiTTransformer2DModel", num_embeds_ada_norm=5, out_channels=CHANNELS)
  metadata = {"policy_config": '{"type": "DX"}'}
  student = reader.load_student(write(tmp_path, config | dict(frequency_shift=frequency_shift), tensors, metadata))
  x, labels = torch.randn(2, CHANNELS, 8, 8), torch.tensor([1, 5])
  with torch.no_grad():
    want = x - 0.7 * net(x, torch.full((2,), 700.0), labels).sample
    got = student(x, 0.7, labels).posterior_mean(x, 0.7)
  assert torch.allclose(got, want, atol=1e-6) == bool(frequency_shift)


def test_another_depth_of_the_log_std_is_read(dit_folder):
  folder, tensors, change = dit_folder
  kept = {name: tensor for name, tensor in tensors.items() if "logstds" not in name}
  weight = np.full((1, 32), 0.01, np.float32)
  kept |= {"proj_out_logstds.1.weight": weight, "proj_out_logstds.1.bias": np.full(1, -1.5, np.float32)}
  change(kept, gm_num_logstd_layers=1)
  student = reader.load_student(folder)
  noise, labels = inputs("dit")
  policy = student(torch.from_numpy(noise).movedim(-1, 1), 0.5, torch.from_numpy(labels))
  log_std = -1.5 + 0.01 * torch.nn.functional.silu(student.embedding).sum(1)
  np.testing.assert_allclose(policy.variance.ravel(), np.exp(2 * log_std) * 0.25, rtol=1e-5)


def test_fields_of_config_json_may_be_given(dit_folder):
  """As num_timesteps, which the release's files do not tell."""
  folder, _, change = dit_folder
  run = lambda **fields: torch_samples(reader.load_student(folder, **fields), *inputs("dit"), nfe=1, substeps=8)
  given, default = run(num_timesteps=1), run()
  change(num_timesteps=1)
  np.testing.assert_array_equal(given, run())
  assert np.max(np.abs(given - default)) > 0.01


def test_the_backbone_may_compute_in_bfloat16(tmp_path):
  make_adapter(tmp_path, "flux", "gmflow")
  runs = {}
  for dtype in (torch.float32, torch.bfloat16):
    student = reader.load_student(tmp_path / "student", tmp_path / "base", dtype)
    assert {p.dtype for p in student.net.parameters()} == {dtype}
    assert {p.dtype for p in student.head.parameters()} == {torch.float32}
    runs[dtype] = torch_samples(student, *inputs("flux"), nfe=1, substeps=16)
  want, got = runs.values()
  assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


# ---- Command line ----


def tiny_vae(folder, backbone):
  """Writes a decoder for the latents of `inputs`; returns it: latents (B, C, H, W) -> pictures (B, 3, ., .)."""
  torch.manual_seed(0)
  if backbone == "qwen_image":
    size = dict(base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae = diffusers.AutoencoderKLQwenImage(**size, latents_mean=[0.5, -0.25, 0, 0.1], latents_std=[2.0, 1.5, 0.5, 1])
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    unscale = lambda x: (x * std + mean).unsqueeze(2)
  else:
    size = dict(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=CHANNELS, layers_per_block=1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    shift = 0.1 if backbone == "flux" else None
    vae = diffusers.AutoencoderKL(**size, **blocks, scaling_factor=0.4, shift_factor=shift)
    unscale = lambda x: x / 0.4 + (shift or 0)
  vae.eval().save_pretrained(folder)

  def decode(x):
    with torch.no_grad():
      pictures = vae.decode(unscale(x)).sample
    return pictures.squeeze(2) if pictures.ndim == 5 else pictures

  return decode


def forget_sampling(folder):
  """Drops from a student's metadata what the releases' files do not tell."""
  with safe_open(folder / WEIGHTS, "np") as file:
    metadata = {"policy_config": file.metadata()["policy_config"]}
  save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata)


@pytest.mark.parametrize(
  ("backbone", "stated", "given", "grid"),
  [
    ("dit", True, {}, SAMPLING),
    ("dit", False, dict(nfe=1), dict(nfe=1, final_scale=1.0, shift=1.0)),
    ("flux", False, dict(nfe=2), dict(nfe=2, final_scale=0.5, shift=3.2)),
    ("qwen_image", True, dict(nfe=3, shift=2.0), SAMPLING | dict(nfe=3, shift=2.0)),
  ],
)
def test_the_command_writes_samples_and_a_picture(tmp_path, backbone, stated, given, grid):
  noise, cond = inputs(backbone)
  np.save(tmp_path / "noise.npy", noise)
  args = [f"--{name}={tmp_path / name}" for name in ("student", "vae")]
  args += [f"--noise={tmp_path / 'noise.npy'}", f"--out={tmp_path / 'x0.npy'}"]
  args += [*(f"--{name}={value}" for name, value in given.items()), "--temperature=auto", "--substeps=16"]
  if backbone == "dit":
    write_model(tmp_path / "student", "dit", "gmflow", make("dit", "gmflow")[1])
    base = None
    args += ["--labels=3,4"]
  else:
    make_adapter(tmp_path, backbone, "gmflow")
    (tmp_path / "pipeline").mkdir()
    base = (tmp_path / "base").rename(tmp_path / "pipeline" / "transformer")
    # This package keeps embeddings in bfloat16, which NumPy reads as raw bytes.
    text = cond["text"].astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "cond.npz", **(cond | dict(text=text, other=noise)))
    cond = cond | dict(text=text.astype(np.float32))
    args += [f"--base={tmp_path / 'pipeline'}", f"--cond={tmp_path / 'cond.npz'}"]
  if not stated:
    forget_sampling(tmp_path / "student")
  decode = tiny_vae(tmp_path / "vae", backbone)
  reader.main(args)
  x0 = np.load(tmp_path / "x0.npy")
  student = reader.load_student(tmp_path / "student", base)
  want = torch_samples(student, noise, cond, **grid, temperature=0.1 * (grid["nfe"] - 1), substeps=16)
  np.testing.assert_array_equal(x0, want)
  picture = np.asarray(Image.open(tmp_path / "x0.png")).astype(float)
  assert np.ptp(picture) > 10
  pictures = decode(torch.from_numpy(x0).movedim(-1, 1)).permute(0, 2, 3, 1).clamp(-1, 1).numpy()
  np.testing.assert_allclose(picture, 127.5 * (1 + np.concatenate(pictures, axis=1)), atol=0.6)


# ---- Mistakes ----


def test_all_tensors_that_do_not_fit_are_named_at_once(dit_folder):
  folder, tensors, change = dit_folder
  del tensors["proj_out_means.bias"], tensors["transformer_blocks.1.ff.net.2.weight"]
  tensors["proj_out_logweights.bias"] = np.zeros(5, np.float32)
  tensors["proj_out_2.weight"] = np.zeros((3, 2), np.float32)
  tensors["pos_embed.proj.lora_B.weight"] = np.zeros((3, 2), np.float32)
  change(tensors)
  with pytest.raises(ValueError, match="5 tensors do not fit config.json") as error:
    reader.load_student(folder)
  assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
    "expected (12,): proj_out_logweights.bias (5,)",
    "missing: proj_out_means.bias (48,)",
    "missing: transformer_blocks.1.ff.net.2.weight (32, 128)",
    "unexpected: pos_embed.proj.lora_B.weight (3, 2)",
    "unexpected: proj_out_2.weight (3, 2)",
  ]


def test_folders_that_are_no_students_are_refused(dit_folder, tmp_path):
  folder, _, change = dit_folder

  def policy(**fields):
    return dict(metadata={"policy_config": json.dumps(fields)})

  wanted = "expected the metadata policy_config .*GMFlow.*got "
  for changes, message in (
    (dict(_class_name="SD3Transformer2DModel"), "expected a _class_name among .*GMDiT.*, got 'SD3Transformer2DModel'"),
    (dict(_class_name="DiTTransformer2DModel"), "expected a _class_name among .*, got 'DiTTransformer2DModel'"),
    (dict(metadata=None), f"{wanted}none: it is no student"),
    (policy(type="DX"), f'{wanted}{{"type": "DX"}}'),
    (policy(type="GMFlow", speed=2), f"{wanted}.*speed"),
    (dict(num_gaussians=None), "config.json: expected num_gaussians"),
  ):
    change(**changes)
    with pytest.raises(ValueError, match=message):
      reader.load_student(folder)
  with pytest.raises(ValueError, match="expected a folder with config.json"):
    reader.load_student(tmp_path / "nowhere")
  change()
  (folder / WEIGHTS).unlink()
  with pytest.raises(ValueError, match=f"expected the file {WEIGHTS}"):
    reader.load_student(folder)


def test_an_unknown_form_of_a_dx_policy_is_refused(tmp_path):
  _, params = make("dit", "dx")
  folder = write_model(tmp_path, "dit", "dx", params)
  save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"policy_config": '{"type": "DX", "mode": "spline"}'})
  student = reader.load_student(folder)
  with pytest.raises(ValueError, match="policy_config: expected the mode .*got 'spline'"):
    torch_samples(student, *inputs("dit"), nfe=1)


def test_an_adapter_wants_all_of_its_tensors_and_the_base_that_it_was_made_on(tmp_path):
  make_adapter(tmp_path, "flux", "gmflow")
  student, base = tmp_path / "student", tmp_path / "base"
  with pytest.raises(ValueError, match=r"do not fit config.json \(an adapter needs --base\)"):
    reader.load_student(student)
  tensors = load_file(student / WEIGHTS)
  del tensors["time_text_embed.timestep_embedder.linear_1.lora_B.weight"]
  save_file(tensors, student / WEIGHTS, GMFLOW)
  with pytest.raises(ValueError, match=r"1 tensors .*\n  missing: time_text_embed.*linear_1.lora_B.weight \(32, 4\)"):
    reader.load_student(student, base)
  weights = load_file(base / WEIGHTS)
  save_file({name: tensor for name, tensor in weights.items() if name != "x_embedder.bias"}, base / WEIGHTS)
  with pytest.raises(ValueError, match=r"its tensors are not those of its config.json.*x_embedder.bias"):
    reader.load_student(student, base)
  write_model(base, "qwen_image", "velocity", make("qwen_image", "velocity")[1])
  with pytest.raises(ValueError, match="expected a FluxTransformer2DModel, got a QwenImageTransformer2DModel"):
    reader.load_student(student, base)


def test_mistakes_on_the_command_line_end_with_one_line(dit_folder, tmp_path):
  folder, _, _ = dit_folder
  noise, _ = inputs("dit")
  for name, array in dict(noise=noise, wrong=noise[..., :3], odd=noise[:, :7], text=np.array("noise")).items():
    np.save(tmp_path / f"{name}.npy", array)
  (tmp_path / "cut").mkdir()
  (tmp_path / "cut" / "config.json").write_text((folder / "config.json").read_text())
  (tmp_path / "cut" / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
  write(tmp_path / "untold", json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS), GMFLOW)
  good = {"student": folder, "noise": tmp_path / "noise.npy", "labels": "1", "out": tmp_path / "x0.npy"}
  for changes, message in (
    (dict(labels="6"), r"error: --labels: expected classes in \[0, 5\].*got \[6\]"),
    (dict(labels=""), r"error: --labels: expected classes"),
    (dict(noise=tmp_path / "wrong.npy"), r"error: noise: expected \(4, H, W\) .*got \(3, 8, 12\)"),
    (dict(noise=tmp_path / "odd.npy"), r"error: noise: expected .* multiples of 2, got \(4, 7, 12\)"),
    (dict(noise=tmp_path / "none.npy"), "error: .*none.npy"),
    (dict(student=tmp_path / "none"), "error: .*none: expected a folder"),
    (dict(student=tmp_path / "untold"), "error: --nfe: expected a number of network evaluations"),
    (dict(student=tmp_path / "cut"), f"error: .*cut/{WEIGHTS}: "),
  ):
    with pytest.raises(SystemExit, match=message):
      reader.main([f"--{key}={value}" for key, value in (good | changes).items()])
  assert not (tmp_path / "x0.npy").exists()


def test_a_condition_that_does_not_fit_is_refused(tmp_path):
  make_adapter(tmp_path, "qwen_image", "gmflow")
  student = reader.load_student(tmp_path / "student", tmp_path / "base")
  path = tmp_path / "cond.npz"
  np.savez(path, text=np.zeros((3, 9, 12)), mask=np.ones((2, 9)))
  with pytest.raises(ValueError, match=r"--cond: expected text and mask of 2 samples, got .*'text': \(3, 9, 12\)"):
    reader.load_condition(student, 2, [], path)
  with pytest.raises(ValueError, match="--cond: expected text and mask of 2 samples, got none"):
    reader.load_condition(student, 2, [], None)
