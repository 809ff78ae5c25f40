"""Published DiTs of ImageNet: recognised without a config.json, there and back to the bit, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.conversion import from_torch, models
from pflow_jax.conversion.from_torch import open_source
from pflow_jax.conversion.program import convert
from pflow_jax.networks.dit import DIT_SIZES
from pflow_jax.torch_io.table import read_layer, same_bits
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from tests import authors
from tests.authors import checkpoint, per_block, publish, released, tensors
from tests.conversion.folders import assert_same_tensors, metadata_of, write_run
from tests.programs import ROOT, load_module, quick

pytestmark = pytest.mark.usefixtures("float32")

SIT, REPA, FLOW = ((1.0, True), (1.0, False), (1000.0, False))  # time_scale and flip_time


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  publish(monkeypatch)


def states(golden, kind):
  return tensors(golden(f"authors_{kind}"))


def save(folder, name, content):
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / name
  if path.suffix == ".safetensors":
    save_file(content, path)
  else:
    torch.save(content, path)
  return path


def times_of(folder):
  model = workdir.load_config(folder).model
  return model.time_scale, model.flip_time


def params_of(folder):
  return load_params(folder / workdir.CHECKPOINTS, which="params")


def last_layer(folder):
  return np.asarray(params_of(folder)["head"]["proj_out"]["kernel"]).T


# Files, as (name, golden file, its change), with the time that is recognised and what is said of it.
FILES = {
  "repa's": (
    "last.pt",
    "repa",
    lambda state: state,
    REPA,
    "taken for repa by its projectors: time from data, 0, to noise",
  ),
  "repa's checkpoint": ("0400000.pt", "repa", lambda s: checkpoint(s, "repa"), REPA, "repa by the arguments of its"),
  "repa's early": ("last.pt", "repa", lambda s: early(s), REPA, "repa by its projectors"),
  "sit's": (
    "SiT-XL-2-256.pt",
    "sit",
    lambda state: state,
    SIT,
    "sit by its name, SiT-XL-2-256: .*velocity x0 - eps, which",
  ),
  "sit's checkpoint": (
    "0400000.pt",
    "sit",
    lambda s: checkpoint(s, "sit"),
    SIT,
    "sit by the arguments of its training",
  ),
  "the release's repa": (
    "repa_imagenet.pth",
    "repa",
    lambda s: released(s, "repa"),
    REPA,
    "repa by its name, repa_imag",
  ),
  "the release's repa, in a dict": (
    *("repa_imagenet.pth", "repa", lambda s: {"state_dict": released(s, "repa"), "meta": {"iter": 3}}),
    *(REPA, "repa by its name"),
  ),
  "the release's with an embedding a block": (
    *("repa_imagenet.pth", "repa", lambda s: per_block(released(s, "repa")), REPA, "repa by its name"),
  ),
  "the release's flow": ("flowdit_imagenet.pth", "repa", lambda s: released(s, "repa"), FLOW, "flowdit by its name"),
  "the release's flow, a mixture of one": (
    *("flowdit_imagenet.pth", "repa", lambda s: mixture(released(s, "repa")), FLOW, "outputs the first 4 are kept"),
  ),
  "the release's sit": ("sit_imagenet.safetensors", "sit", lambda s: released(s, "sit"), SIT, "sit by its name"),
}


def early(state):
  """REPA's first code had two lists of blocks."""
  return {name.replace("blocks.1.", "decoder_blocks.0."): tensor for name, tensor in state.items()}


def mixture(state):
  """GMFlow's DiT of one component, with its weight among the outputs and its width beside (LakonLab gmdit.py)."""
  for end in ("weight", "bias"):
    x = state[f"proj_out_2.{end}"]
    x = x.reshape(4, 4, *x.shape[1:])
    state[f"proj_out_2.{end}"] = torch.cat([x, torch.ones_like(x[:, :1])], 1).flatten(0, 1)
  return state | {"gm_out.logstd_layers.1.weight": torch.ones(8, 16), "gm_out.logstd_layers.1.bias": torch.ones(8)}


def recognised(path, **options):
  """What is found of files, and the output layer as it is read."""
  source = models.recognise(open_source(path, **options))
  model = models.model_of_torch(source.config, source.tensors.metadata, source.tensors)
  (row,) = (row for row in model.rows if row.flax == "head/proj_out/kernel")
  return source, model.attributes, read_layer(row, source.tensors.read).T


@pytest.mark.parametrize("case", FILES)
def test_files_are_recognised_without_a_config(tmp_path, golden, case):
  name, kind, change, times, said = FILES[case]
  state = states(golden, kind)
  source, found, layer = recognised(save(tmp_path / "files", name, change(dict(state))))
  notes = "; ".join(source.notes)
  assert re.search(said, notes), notes
  assert (found["time_scale"], found["flip_time"]) == times
  assert (found["num_classes"], found["channels"], found["num_heads"]) == (5, 4, 2)
  assert found["norm_eps"] == (1e-5 if "release" in case else 1e-6)
  # Its velocity is eps - x0: SiT's own files alone have the other sign; what was for a variance is left out.
  want = state["final_layer.linear.weight"].numpy()
  want = want.reshape(4, -1, 16)[:, :4].reshape(16, 16) * (-1 if kind == "sit" else 1)
  np.testing.assert_array_equal(layer, want)
  assert ("left out: projectors, 6 tensors" in notes) == case.startswith("repa's")
  assert ("'ema' is taken" in notes) == ("checkpoint" in case)


@pytest.mark.parametrize(("classes", "known"), [(1000, {}), (5, {"latent_shift": 0.0, "latent_scale": 0.18215})])
def test_a_teacher_of_imagenet_tells_the_scale_of_its_latents(tmp_path, golden, monkeypatch, classes, known):
  monkeypatch.setattr(from_torch, "_IMAGENET", classes)
  path = save(tmp_path / "files", "sit_imagenet.safetensors", released(states(golden, "sit"), "sit"))
  convert(path, tmp_path / "run")
  source = workdir.load_settings(tmp_path / "run").source
  assert {key: value for key, value in source.items() if key.startswith("latent_")} == known


def test_outputs_for_a_variance_that_nothing_was_learned_for_are_sits(tmp_path, golden, monkeypatch):
  """The loss of SiT never sees them, and they keep the zeros of the start; a DiT of noise has learned them."""
  monkeypatch.setitem(DIT_SIZES, "tiny", authors.TINY | {"width": 32})
  source, found, _ = recognised(save(tmp_path, "ema.pt", states(golden, "sit_trained")))
  assert "taken for sit by the outputs for a variance that nothing was learned for" in source.notes[-1]
  assert (found["time_scale"], found["flip_time"]) == SIT


@pytest.mark.parametrize("kind", ["sit", "repa"])
def test_there_and_back_is_exact_in_both_formats(tmp_path, golden, kind):
  """The authors' file, the release's class, and the authors' names again: every bit, of both signs."""
  state = {name: tensor for name, tensor in states(golden, kind).items() if not name.startswith("projectors.")}
  if kind == "sit":  # as SiT's class without a variance has it
    for end in ("weight", "bias"):
      x = state[f"final_layer.linear.{end}"]
      state[f"final_layer.linear.{end}"] = x.reshape(4, 8, *x.shape[1:])[:, :4].flatten(0, 1).contiguous()
  path = save(tmp_path / "files", "model.safetensors", state)
  convert(path, tmp_path / "run", convention=kind)
  convert(tmp_path / "run", tmp_path / "release")
  convert(tmp_path / "release", tmp_path / "run2")
  convert(tmp_path / "run2", tmp_path / "timm", format="timm")
  assert_same_tensors(tmp_path / "timm", path)
  save_file(released(state, kind), tmp_path / "files" / "wanted.safetensors")
  assert_same_tensors(tmp_path / "release", tmp_path / "files" / "wanted.safetensors")
  config = json.loads((tmp_path / "timm" / "config.json").read_text())
  assert (config["_class_name"], config["flip_model_timesteps"]) == ("SiT", kind == "sit")
  assert "state dict of its `SiT`" in (tmp_path / "timm" / "README.md").read_text()
  convert(tmp_path / "timm", tmp_path / "run3")
  assert workdir.load_config(tmp_path / "run3").model == workdir.load_config(tmp_path / "run").model
  np.testing.assert_array_equal(last_layer(tmp_path / "run3"), last_layer(tmp_path / "run"))


def test_halves_and_brain_floats_go_there_and_back(tmp_path, golden):
  state = {name: tensor.bfloat16() for name, tensor in states(golden, "repa").items()}
  state = {name: tensor for name, tensor in state.items() if not name.startswith("projectors.")}
  convert(save(tmp_path, "model.safetensors", state), tmp_path / "run", convention="sit")
  convert(tmp_path / "run", tmp_path / "timm", format="timm", dtype="bfloat16")
  assert_same_tensors(tmp_path / "timm", tmp_path / "model.safetensors")


# Shapes of π-Flow's class of the student, LakonLab architectures/gmflow/gmdit_v2.py:61-117 and diffusers/dit.py:31-42,
# of width 16 and depth 2, with 3 components: what its loader finds by name (gmdit_v2.py:init_weights).
STUDENT = {
  "pos_embed.proj.weight": (16, 4, 2, 2),
  "emb.timestep_embedder.linear_1.weight": (16, 256),
  "emb.timestep_embedder.linear_2.weight": (16, 16),
  "emb.class_embedder.embedding_table.weight": (6, 16),
  **{
    f"transformer_blocks.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {
      **{"norm1.linear": (96, 16), "ff.net.0.proj": (64, 16), "ff.net.2": (16, 64)},
      **dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), (16, 16)),
    }.items()
  },
  "proj_out_1.weight": (32, 16),
  "proj_out_means.weight": (48, 16),
  "proj_out_logweights.weight": (12, 16),
  "proj_out_logstds.1.weight": (8, 16),
  "proj_out_logstds.3.weight": (1, 8),
}


def test_a_student_of_repas_file_is_one_of_the_release_to_the_bit(tmp_path, golden, capsys):
  """Exported as the release's class, read by name, and taken in again without its config.json."""
  convert(save(tmp_path / "files", "last.pt", states(golden, "repa")), tmp_path / "run" / "dit")
  _, ema = write_run(tmp_path / "student", "dit", "gmflow", tmp_path, table=())
  convert(tmp_path / "student", tmp_path / "gmrepa_k32_imagenet_piid_1step")
  folder = tmp_path / "gmrepa_k32_imagenet_piid_1step"
  config = json.loads((folder / "config.json").read_text())
  assert (config["_class_name"], config["num_timesteps"]) == ("GMDiTTransformer2DModelV2", 1)
  found = load_file(folder / "diffusion_pytorch_model.safetensors")
  biases = {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in STUDENT.items() if "table" not in name}
  assert {name: tuple(tensor.shape) for name, tensor in found.items()} == STUDENT | biases
  np.testing.assert_array_equal(found["proj_out_means.weight"].numpy(), ema["head"]["proj_out_means"]["kernel"].T)
  q = found["transformer_blocks.1.attn1.to_q.weight"].numpy()
  np.testing.assert_array_equal(q, ema["blocks"]["qkv"]["kernel"][1, :, :16].T)
  reader = load_module(ROOT / "examples" / "torch_student.py").load_student(folder)
  assert reader.time_scale == 1
  save_file(found, folder / "diffusion_pytorch_model.safetensors")  # as published: no metadata, and no config.json
  (folder / "config.json").unlink()
  capsys.readouterr()
  convert(folder, tmp_path / "back")
  assert "taken for repa by its name, gmrepa_k32_imagenet_piid_1step" in capsys.readouterr().out
  back = workdir.load_config(tmp_path / "back")
  assert (back.head.kind, back.head.num_components, back.objective.nfe) == ("gmflow", 3, 1)
  assert times_of(tmp_path / "back") == REPA
  for which in ("params", "ema"):
    params = load_params(tmp_path / "back" / workdir.CHECKPOINTS, which=which)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, params, ema)))
  convert(tmp_path / "back", tmp_path / "again")
  assert_same_tensors(tmp_path / "again", folder)
  assert json.loads(metadata_of(tmp_path / "again")["policy_config"]) == {"type": "GMFlow"}


def test_a_student_takes_its_time_from_its_teacher(tmp_path, golden):
  convert(save(tmp_path / "files", "last.pt", states(golden, "repa")), tmp_path / "run" / "dit")
  write_run(tmp_path / "student", "dit", "gmflow", tmp_path, table=())
  convert(tmp_path / "student", tmp_path / "mine")
  (tmp_path / "mine" / "config.json").write_text('{"norm_eps": 1e-6}')
  with pytest.raises(ValueError, match="do not tell how the network is given the time; give --convention: repa"):
    convert(tmp_path / "mine", tmp_path / "back")
  convert(tmp_path / "mine", tmp_path / "back", base=tmp_path / "run" / "dit")
  assert times_of(tmp_path / "back") == REPA


def test_the_recipe_of_the_release_is_not_taken_for_a_teacher_of_another_epsilon(tmp_path, golden):
  """REPA's own network has 1e-6 where the release reads its weights with 1e-5: that is told, and can be set."""
  convert(save(tmp_path / "files", "last.pt", states(golden, "repa")), tmp_path / "run")
  config = quick("imagenet", "gmrepa_1nfe", tmp_path / "run")
  config.data.num_classes = 5
  with pytest.raises(ValueError, match="model.norm_eps: the teacher has 1e-06, the student 1e-05$"):
    build(config)
  config.model.norm_eps = 1e-6
  (own,) = build(config).teacher.parts.values()
  assert own.network.module.norm_eps == 1e-6


def test_a_students_file_tells_its_evaluations_as_its_folder_does(tmp_path, golden):
  convert(save(tmp_path / "files", "last.pt", states(golden, "repa")), tmp_path / "run" / "dit")
  write_run(tmp_path / "student", "dit", "gmflow", tmp_path, table=())
  convert(tmp_path / "student", tmp_path / "torch")
  tensors = load_file(tmp_path / "torch" / "diffusion_pytorch_model.safetensors")
  path = save(tmp_path / "got", "gmrepa_k32_imagenet_piid_2step.safetensors", tensors)
  (tmp_path / "got" / "config.json").write_text('{"norm_eps": 1e-6}')
  convert(path, tmp_path / "back")
  assert workdir.load_config(tmp_path / "back").objective.nfe == 2
  assert times_of(tmp_path / "back") == REPA


NOISE = "predicts the noise of 1000 discrete steps .DDPM., {}, and not a velocity, so it is no teacher"


def without(*names):
  return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def with_args(kind, **args):
  def change(state):
    made = checkpoint(state, kind)
    vars(made["args"]).update(args)
    return made

  return change


def lengthened(state):
  return state | {"pos_embed": state["pos_embed"] + torch.linspace(0, 1e-3, 16)}


REFUSED = {
  "dit's": ("DiT-XL-2-256x256.pt", "dit", lambda s: s, NOISE.format("by its name, DiT-XL-2-256x256")),
  "dit's checkpoint": ("1.pt", "dit", lambda s: checkpoint(s, "dit"), NOISE.format("by the arguments of its training")),
  "either": (
    "model.pt",
    "dit",
    lambda s: s,
    r"model.pt: its tensors do not tell .*sit \(time from noise, 0, to data, 1, ve",
  ),
  "sit or repa": (
    "SiT-B-2.pt",
    "repa",
    without(*(f"projectors.0.{i}.{e}" for i in (0, 2, 4) for e in ("weight", "bias"))),
    ("do not tell how the network is given the time"),
  ),
  "the release's, renamed": (
    "teacher.pth",
    "repa",
    lambda s: released(s, "repa"),
    r"repa \(time from data.*eps - x0\), sit",
  ),
  "noise of sit's code": (
    "1.pt",
    "sit",
    with_args("sit", prediction="noise"),
    "prediction = 'noise'; expected a velocity",
  ),
  "another path": (
    "1.pt",
    "sit",
    with_args("sit", path_type="GVP"),
    "path_type = 'GVP' .*expected a velocity on the linear",
  ),
  "other positions": ("SiT-XL-2-256.pt", "sit", lengthened, "pos_embed is not the fixed table of sines and cosines"),
  "a tensor missing": (
    "last.pt",
    "repa",
    without("blocks.1.mlp.fc1.weight"),
    r"1 missing: blocks\.1\.mlp\.fc1\.weight",
  ),
  "a block missing": (
    *("last.pt", "repa", lambda s: {n: t for n, t in s.items() if not n.startswith("blocks.0.attn")}),
    "4 missing: blocks.0.attn.qkv.weight",
  ),
  "no classes": (
    "last.pt",
    "repa",
    without("y_embedder.embedding_table.weight"),
    "y_embedder.embedding_table.weight with 2 a",
  ),
  "queries normalised": (
    *("last.pt", "repa", lambda s: s | {f"blocks.{i}.attn.q_norm.weight": torch.ones(8) for i in range(2)}),
    r"2 unexpected: blocks\.\{0-1\}\.attn\.q_norm\.weight",
  ),
  "wrong size": (
    *("last.pt", "repa", lambda s: s | {"blocks.0.attn.proj.weight": torch.zeros(16, 8)}),
    r"blocks\.0\.attn\.proj\.weight \(expected \(16, 16\), got \(16, 8\)\)",
  ),
  "odd outputs": (
    "last.pt",
    "repa",
    lambda s: s | {"final_layer.linear.weight": torch.zeros(18, 16)},
    "multiple of 4 rows",
  ),
  "another network": (
    "vit.pth",
    "repa",
    lambda s: {"patch_embed.proj.weight": torch.zeros(3)},
    "known by their tensors, and",
  ),
  "a flux": (
    "f.pth",
    "repa",
    lambda s: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)},
    "expected config.json",
  ),
  "code": ("last.pt", "repa", lambda s: {"ema": s, "args": ROOT}, "holds more than tensors.*can run any code"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_teacher_or_does_not_tell_is_refused_before_anything_is_written(tmp_path, golden, case):
  name, kind, change, message = REFUSED[case]
  path = save(tmp_path / "files", name, change(dict(states(golden, kind))))
  with pytest.raises(ValueError, match=message) as error:
    convert(path, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_a_file_cut_short_is_refused(tmp_path, golden):
  for name in ("last.pt", "last.safetensors"):
    path = save(tmp_path, name, states(golden, "repa"))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut short|no intact safetensors file"):
      convert(path, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_heads_of_an_unpublished_size_are_asked_for(tmp_path, golden, monkeypatch):
  monkeypatch.delitem(DIT_SIZES, "tiny")
  path = save(tmp_path / "files", "last.pt", states(golden, "repa"))
  with pytest.raises(ValueError, match="width 16 with depth 2 is no published size; put .*num_attention_heads"):
    convert(path, tmp_path / "run")
  for heads in (3, 0, True, "2"):
    (tmp_path / "files" / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    with pytest.raises(ValueError, match="num_attention_heads"):
      recognised(path)
  (tmp_path / "files" / "config.json").write_text('{"num_attention_heads": 4}')
  assert recognised(path)[1]["num_heads"] == 4


def test_a_config_beside_an_authors_file_says_its_time(tmp_path, golden):
  path = save(tmp_path / "files", "model.pt", states(golden, "sit"))
  (tmp_path / "files" / "config.json").write_text('{"flip_model_timesteps": true}')
  _, found, layer = recognised(path)
  assert (found["time_scale"], found["flip_time"]) == SIT
  want = states(golden, "sit")["final_layer.linear.weight"].reshape(4, 8, 16)[:, :4].reshape(16, 16)
  np.testing.assert_array_equal(layer, -want)


def test_a_convention_is_only_for_what_leaves_it_open(tmp_path, golden, teachers):
  with pytest.raises(ValueError, match=r"convention: expected one of \['repa', 'sit', 'flowdit'\], got 'dit'"):
    convert(tmp_path, tmp_path / "out", convention="dit")
  with pytest.raises(
    ValueError, match="convention: only the files of a DiT leave it open, this is a FluxTransformer2DM"
  ):
    convert(teachers / "torch" / "flux", tmp_path / "out", convention="repa")
  with pytest.raises(ValueError, match="base, mesh, convention: expected a model of PyTorch"):
    convert(teachers / "run" / "dit", tmp_path / "out", convention="repa")
  with pytest.raises(ValueError, match="format: expected a run"):
    convert(teachers / "torch" / "dit", tmp_path / "out", format="timm")
  with pytest.raises(
    ValueError, match="format: the code of SiT and REPA has no other than time_scale 1, got 1000, freq"
  ):
    convert(teachers / "run" / "dit", tmp_path / "out", format="timm")
  with pytest.raises(ValueError, match=r"format: expected one of \['diffusers'\] for a flux, got 'timm'"):
    convert(teachers / "run" / "flux", tmp_path / "out", format="timm")
  assert not (tmp_path / "out").exists()
