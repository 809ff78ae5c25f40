"""`pflow convert` of full models: bit by bit there and back, the same function, and what it refuses."""

import contextlib
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pflow_jax.checkpoints import stream as checkpoint_stream
from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.checkpoints.stream import open_leaves, place_leaves
from pflow_jax.commands.cli import main
from pflow_jax.conversion import leaves, models
from pflow_jax.conversion.program import convert
from pflow_jax.families.registry import sharding_rules
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.table import flat_shapes, same_bits
from pflow_jax.torch_io.tensors import WEIGHTS, open_tensors
from pflow_jax.training import workdir
from pflow_jax.training.network import make_network
from tests.conversion.folders import CLASSES, assert_same_tensors, edit, make_torch, write_torch
from tests.programs import pflow

pytestmark = pytest.mark.usefixtures("float32")

KINDS = ["flux", "qwen_image", "dit"]
CHECKPOINTS = workdir.CHECKPOINTS


def params_of(folder):
  return load_params(folder / CHECKPOINTS, which="params")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_exact(tmp_path, kind, dtype, capsys):
  write_torch(tmp_path / "torch", kind, dtype)
  assert convert(tmp_path / "torch", tmp_path / "run")
  assert convert(tmp_path / "run", tmp_path / "back", max_shard_gb=5e-5)
  assert_same_tensors(tmp_path / "back", tmp_path / "torch")
  assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
  assert max(file.stat().st_size for file in (tmp_path / "back").glob("*.safetensors")) < 60_000
  name = str(dtype).removeprefix("torch.")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params_of(tmp_path / "run"))} == {name}
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["model"]["dtype"] == name
  shift = 1.0 if kind == "dit" else 3.2
  assert (config["head"], config["objective"]["kind"]) == ({"kind": "velocity"}, "pretrained")
  assert config["objective"]["shift"] == shift
  assert (config["source"]["class"], config["source"]["folder"]) == (CLASSES[kind][0].__name__, "torch")
  # As PyTorch reads it.
  cls = CLASSES[kind][0]
  model, info = cls.from_pretrained(tmp_path / "back", torch_dtype=dtype, output_loading_info=True)
  assert not any(info.values()), info
  before = {key: value for key, value in make_torch(kind).config.items() if not key.startswith("_")}
  after = {key: value for key, value in model.config.items() if not key.startswith("_")}
  differing = {key for key in before if before[key] != after.get(key) and before[key] is not None}
  assert differing <= {"axes_dims_rope"}  # a tuple became a list
  # A second time there is nothing to do.
  capsys.readouterr()
  assert not convert(tmp_path / "torch", tmp_path / "run")
  assert not convert(tmp_path / "run", tmp_path / "back", max_shard_gb=5e-5)
  assert capsys.readouterr().out.count("holds this model already") == 2


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
  write_torch(tmp_path / "torch", "dit")
  for source, out in (("torch", "run"), ("run", "back")):
    with Lock(tmp_path / out, "pflow convert"), pytest.raises(ValueError, match="is being written by 'pflow convert'"):
      convert(tmp_path / source, tmp_path / out)
    assert list((tmp_path / out).iterdir()) == []
    assert convert(tmp_path / source, tmp_path / out)


def network_of(folder):
  config = workdir.load_config(folder)
  model = models.model_of_run(Settings.of(config, converted=True), flat_shapes(params_of(folder)), {"sample_size": 8})
  return make_network(Choice.of(config.model), Choice.of(config.head), model._dataset())


def test_a_converted_model_is_sampled(tmp_path, capsys):
  """By its command: one Euler step is the noise less its velocity, guided away from the class that is none."""
  write_torch(tmp_path / "torch", "dit")
  convert(tmp_path / "torch", tmp_path / "run")
  drawn = {}
  for guidance in (1, 3):
    flags = [f"--workdir={tmp_path}/run", "--num=4", "--nfe=1", f"--config.sample.guidance={guidance}"]
    main(["sample", *flags, f"--out={tmp_path}/{guidance}"])
    with np.load(tmp_path / f"{guidance}.npz") as file:
      drawn[guidance] = dict(file)
  network, params = network_of(tmp_path / "run"), params_of(tmp_path / "run")
  noise, label = drawn[1]["noise"], drawn[1]["label"]
  velocity = lambda label: np.asarray(network(params, noise, np.ones(4, np.float32), label))
  v, v_null = velocity(label), velocity(np.full_like(label, workdir.load_config(tmp_path / "run").data.num_classes))
  assert np.abs(v - v_null).max() > 0.01
  np.testing.assert_allclose(drawn[1]["x0_nfe1"], noise - v, atol=1e-5)
  np.testing.assert_allclose(drawn[3]["x0_nfe1"], noise - v_null - 3 * (v - v_null), atol=1e-5)
  capsys.readouterr()
  with pytest.raises(SystemExit):
    main(["evaluate", f"--workdir={tmp_path}/run"])
  assert "has no data to compare with" in capsys.readouterr().err
  # One of before.
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  del config["data"]
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  with pytest.raises(SystemExit):
    main(["sample", f"--workdir={tmp_path}/run"])
  assert "convert it again" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_computes_what_pytorch_does(tmp_path, kind):
  model = make_torch(kind)
  model.save_pretrained(tmp_path / "torch")
  convert(tmp_path / "torch", tmp_path / "run")
  rng = np.random.default_rng(0)
  x, t = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), np.array([0.3, 0.9], np.float32)
  text = rng.normal(size=(2, 6, 12)).astype(np.float32)
  if kind == "dit":
    cond = np.array([1, 5])
    with torch.no_grad():
      want = model(torch.tensor(x).movedim(-1, 1), torch.tensor(1000 * t), torch.tensor(cond)).sample.movedim(1, -1)
  else:
    tokens = torch.tensor(x).reshape(2, 4, 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 16)
    named = dict(hidden_states=tokens, encoder_hidden_states=torch.tensor(text), timestep=torch.tensor(t))
    cond = {"text": text}
    if kind == "flux":
      cond["pooled"] = rng.normal(size=(2, 10)).astype(np.float32)
      ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
      named |= dict(pooled_projections=torch.tensor(cond["pooled"]), img_ids=ids, txt_ids=torch.zeros(6, 3))
      named["guidance"] = torch.full((2,), 3.5)
    else:
      named["img_shapes"] = [[(1, 4, 4)]] * 2
      named["encoder_hidden_states_mask"] = torch.ones(2, 6, dtype=torch.bool)
      cond["mask"] = np.ones((2, 6), bool)
    with torch.no_grad():
      out = model(**named).sample
    want = out.reshape(2, 4, 4, 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(2, 8, 8, 4)
  got = network_of(tmp_path / "run")(params_of(tmp_path / "run"), jnp.asarray(x), jnp.asarray(t), cond)
  assert np.abs(np.asarray(got) - want.numpy()).max() < 1e-4 * np.abs(want.numpy()).max()


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_have_the_tensors_of_pytorchs_class(kind):
  cls = CLASSES[kind][0]
  fields = {"guidance_embeds": True} if kind == "flux" else {}
  with torch.device("meta"):
    want = cls(**fields).state_dict()
  want = {name: tuple(tensor.shape) for name, tensor in want.items() if name != "pos_embed.pos_embed"}
  assert models.model_of_torch({"_class_name": cls.__name__, **fields}, {}).torch_shapes() == want


@pytest.mark.parametrize(
  ("config", "metadata", "shapes"),
  [
    (
      dict(_class_name="GMFluxTransformer2DModel", num_gaussians=8, guidance_embeds=True),
      {"policy_config": '{"type": "GMFlow"}'},
      {"proj_out_means": (512, 3072), "proj_out_logweights": (32, 3072), "proj_out_logstds.1": (1024, 3072)},
    ),
    (
      dict(_class_name="ArcFluxTransformer2DModel", num_gaussians=16, guidance_embeds=True),
      {},
      {"proj_out_means": (1024, 3072), "proj_out_logweights": (64, 3072), "proj_out_loggamma": (60, 3072)},
    ),
    (
      dict(_class_name="QwenImageTransformer2DModel", patch_size=1, in_channels=64, out_channels=640),
      {"policy_config": '{"segment_size": 0.2857, "shift": 3.2, "type": "DX"}'},
      {"proj_out": (640, 3072)},
    ),
    (
      dict(_class_name="GMDiTTransformer2DModelV2", num_gaussians=32),
      {},
      {
        "proj_out_means": (512, 1152),
        "proj_out_logweights": (128, 1152),
        "emb.timestep_embedder.linear_1": (1152, 256),
      },
    ),
    (dict(_class_name="DiTTransformer2DModelMod"), {}, {"proj_out_2": (16, 1152), "pos_embed.proj": (1152, 4, 2, 2)}),
  ],
)
def test_output_layers_have_the_shapes_of_the_releases(config, metadata, shapes):
  got = models.model_of_torch(config, metadata).torch_shapes()
  assert {name: got[f"{name}.weight"] for name in shapes} == shapes


def test_embeddings_that_differ_among_the_blocks_are_refused(tmp_path):
  write_torch(tmp_path / "torch", "dit", shard="1GB")
  name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
  edit(tmp_path / "torch", lambda tensors: tensors[name][2, 3].add_(1e-3))
  with pytest.raises(ValueError, match="expected the same tensor"):
    convert(tmp_path / "torch", tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
  assert not workdir.has_checkpoint(tmp_path / "run")


def test_of_a_learned_variance_the_first_channels_are_kept(tmp_path, capsys):
  write_torch(tmp_path / "torch", "dit", shard="1GB", out_channels=8)
  with pytest.raises(ValueError, match="predicts the noise of 1000 discrete steps .*--convention flowdit"):
    convert(tmp_path / "torch", tmp_path / "run")
  assert not (tmp_path / "run").exists()
  convert(tmp_path / "torch", tmp_path / "run", convention="flowdit")
  assert "of every sub-pixel's 8 outputs the first 4 are kept" in capsys.readouterr().out
  before = load_file(tmp_path / "torch" / WEIGHTS)["proj_out_2.weight"].numpy()
  kept = before.reshape(4, 8, 32)[:, :4].reshape(16, 32)
  np.testing.assert_array_equal(params_of(tmp_path / "run")["head"]["proj_out"]["kernel"], kept.T)
  convert(tmp_path / "run", tmp_path / "back")
  np.testing.assert_array_equal(load_file(tmp_path / "back" / WEIGHTS)["proj_out_2.weight"].numpy(), kept)
  assert CLASSES["dit"][0].from_pretrained(tmp_path / "back").config.out_channels == 4


class Stop(Exception):
  pass


def test_a_stopped_import_goes_on_where_it_was(tmp_path, monkeypatch):
  write_torch(tmp_path / "torch", "dit")
  monkeypatch.setattr(checkpoint_stream, "CHUNK_BYTES", 2048)
  count = []

  def failing(row, read, index=None):
    if len(count) == 10:
      raise Stop
    count.append(row.flax)
    return leaves_read(row, read, index)

  leaves_read = leaves.read_layer
  monkeypatch.setattr(leaves, "read_layer", failing)
  with pytest.raises(Stop):
    convert(tmp_path / "torch", tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
  assert not workdir.has_checkpoint(tmp_path / "run")
  count.clear()
  monkeypatch.setattr(leaves, "read_layer", lambda row, *args: count.append(row.flax) or leaves_read(row, *args))
  convert(tmp_path / "torch", tmp_path / "run")
  rows = models.model_of_torch(json.loads((tmp_path / "torch" / "config.json").read_text()), {}).rows
  assert 0 < len(count) <= sum(2 if row.stacked else 1 for row in rows) - 9
  monkeypatch.undo()
  convert(tmp_path / "torch", tmp_path / "whole")
  same = jax.tree.map(same_bits, params_of(tmp_path / "run"), params_of(tmp_path / "whole"))
  assert all(jax.tree.leaves(same))


def test_a_stopped_export_goes_on_where_it_was(tmp_path, monkeypatch):
  write_torch(tmp_path / "torch", "dit")
  convert(tmp_path / "torch", tmp_path / "run")
  made, make = [], leaves.Exporter.tensor

  def until(count):
    def tensor(self, name, dtype):
      if len(made) == count:
        raise Stop
      made.append(name)
      return make(self, name, dtype)

    return tensor

  monkeypatch.setattr(leaves.Exporter, "tensor", until(20))
  with pytest.raises(Stop):
    convert(tmp_path / "run", tmp_path / "back", max_shard_gb=2e-5)
  assert not list((tmp_path / "back").glob("*.safetensors"))
  made.clear()
  monkeypatch.setattr(leaves.Exporter, "tensor", until(99))
  convert(tmp_path / "run", tmp_path / "back", max_shard_gb=2e-5)
  assert 44 - 20 <= len(made) < 40
  assert_same_tensors(tmp_path / "back", tmp_path / "torch")


def test_an_output_that_is_something_else_is_left_alone(tmp_path):
  write_torch(tmp_path / "torch", "dit")
  convert(tmp_path / "torch", tmp_path / "run")
  shutil.copytree(tmp_path / "torch", tmp_path / "other")
  for source, options in (("other", {}), ("torch", {"dtype": "bfloat16"}), ("torch", {"mesh": {"fsdp": 2}})):
    with pytest.raises(ValueError, match="holds a run that was not made from this source"):
      convert(tmp_path / source, tmp_path / "run", **options)
  with pytest.raises(ValueError, match="holds a model that was not made from this source"):
    convert(tmp_path / "run", tmp_path / "torch")
  (tmp_path / "part").mkdir()
  (tmp_path / "part" / "source.json").write_text('{"source": "another"}')
  with pytest.raises(ValueError, match="holds part of another model"):
    convert(tmp_path / "torch", tmp_path / "part")


def test_dtypes_are_cast_on_the_way(tmp_path):
  write_torch(tmp_path / "torch", "qwen_image")
  convert(tmp_path / "torch", tmp_path / "run", dtype="bfloat16")
  convert(tmp_path / "run", tmp_path / "back", dtype="float32")
  before, after = open_tensors(tmp_path / "torch"), open_tensors(tmp_path / "back")
  for name in before.places:
    rounded = torch.tensor(before.read(name)).bfloat16().float().numpy()
    np.testing.assert_array_equal(after.read(name), rounded)


def test_tensors_of_one_leaf_have_one_dtype(tmp_path):
  write_torch(tmp_path / "torch", "dit", shard="1GB")
  name = "transformer_blocks.1.ff.net.2.weight"
  edit(tmp_path / "torch", lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
  with pytest.raises(ValueError, match="blocks/mlp_out/kernel.*give --dtype"):
    convert(tmp_path / "torch", tmp_path / "run")
  convert(tmp_path / "torch", tmp_path / "run", dtype="float32")


def test_the_checkpoint_may_be_laid_out_for_a_mesh(tmp_path, monkeypatch):
  write_torch(tmp_path / "torch", "flux", torch.bfloat16)
  mesh = {"fsdp": 4, "tensor": 2}
  monkeypatch.setattr(checkpoint_stream, "CHUNK_BYTES", 1024)
  convert(tmp_path / "torch", tmp_path / "run", mesh=mesh | {"min_size": 2**8})
  stored = open_leaves(tmp_path / "run" / CHECKPOINTS, which="params")
  assert stored["double_blocks/img_q/kernel"].chunk == (2, 8, 16)  # of 512 bytes: both layers
  assert stored["double_blocks/img_mlp_in/kernel"].chunk == (1, 8, 64)
  layout = make_layout(mesh, sharding_rules("flux"), min_size=2**8)
  placed = load_params(tmp_path / "run" / CHECKPOINTS, which="params", layout=layout)
  assert placed["double_blocks"]["img_mlp_in"]["kernel"].sharding.shard_shape((2, 32, 128)) == (2, 8, 64)
  convert(tmp_path / "run", tmp_path / "back")
  assert_same_tensors(tmp_path / "back", tmp_path / "torch")


@pytest.mark.parametrize(
  "leaf", ["blocks/qkv/kernel", "blocks/mlp_in/kernel", "patch_embed/kernel", "blocks/adaln/bias"]
)
def test_devices_read_the_rows_of_tensors_that_they_hold(tmp_path, monkeypatch, leaf):
  write_torch(tmp_path / "torch", "dit", shard="1GB")
  tensors = open_tensors(tmp_path / "torch")
  model = models.model_of_torch(json.loads((tmp_path / "torch" / "config.json").read_text()), tensors.metadata)
  row = next(row for row in model.rows if row.flax == leaf)
  lazy = leaves.TensorLeaf(row, tensors, model.shapes()[leaf], np.dtype(np.float32))
  whole = np.stack([lazy.layer(i) for i in range(2)]) if row.stacked else lazy.layer(None)
  sizes, read = [], Tensors.read

  def noting(self, name, rows=slice(None)):
    sizes.append(len(read(self, name, rows)) / self.places[name].shape[0])
    return read(self, name, rows)

  monkeypatch.setattr(Tensors, "read", noting)
  layout = make_layout(dict(tensor=8), ((".*", ("tensor",)),), min_size=1)
  placed = place_leaves({"x": lazy}, layout)["x"]
  np.testing.assert_array_equal(np.asarray(placed), whole)
  assert placed.sharding.shard_shape(placed.shape)[-1] == placed.shape[-1] // 8
  if row.layout == "linear":  # an eighth of a leaf, which of three joined ones is three eighths at most
    assert max(sizes) <= len(row.names) / 8


def test_a_state_dict_of_the_releases_teacher_is_read(tmp_path):
  """A .pth with one embedding for all blocks, a prefix, and the class's sizes in a config.json beside it."""
  model = make_torch("dit")
  state = {}
  for name, tensor in model.state_dict().items():
    block, _, rest = name.partition(".norm1.emb.")
    if not rest or block == "transformer_blocks.0":
      state[f"transformer.emb.{rest}" if rest else f"transformer.{name}"] = tensor
  state.pop("transformer.pos_embed.pos_embed", None)
  torch.save({"state_dict": state, "meta": {"step": 3}}, tmp_path / "teacher.pth")
  fields = {"_class_name": "DiTTransformer2DModelMod", "num_timesteps": 1, "sample_size": 8}
  fields |= dict(num_layers=2, num_attention_heads=2, attention_head_dim=16, num_embeds_ada_norm=5)
  with pytest.raises(ValueError, match="put .*num_attention_heads.* in a config.json"):
    convert(tmp_path / "teacher.pth", tmp_path / "run")
  (tmp_path / "config.json").write_text(json.dumps(fields))
  convert(tmp_path / "teacher.pth", tmp_path / "run")
  config = workdir.load_config(tmp_path / "run")
  assert config.model.time_scale == 1
  assert "frequency_shift" not in config.model
  convert(tmp_path / "run", tmp_path / "back")
  back = load_file(tmp_path / "back" / WEIGHTS)
  assert {f"transformer.{name}" for name in back} == set(state)
  assert all(torch.equal(back[name], state[f"transformer.{name}"]) for name in back)
  after = json.loads((tmp_path / "back" / "config.json").read_text())
  assert {key: after[key] for key in fields} == fields


def test_the_command_takes_a_pipelines_folder_and_says_what_it_does(tmp_path, capsys):
  write_torch(tmp_path / "pipeline" / "transformer", "dit")
  (tmp_path / "pipeline" / "model_index.json").write_text("{}")
  run = pflow("convert", "--source", tmp_path / "pipeline", "--out", tmp_path / "run", "--mesh=fsdp=2")
  assert "DiTTransformer2DModel: 44 tensors, 0.24 MB" in run.stdout
  assert (tmp_path / "run" / "config.json").exists()
  with pytest.raises(SystemExit) as exit_:
    main(["convert", f"--source={tmp_path}/run", f"--out={tmp_path}/run"])
  assert exit_.value.code == 2
  assert "give another --out" in capsys.readouterr().err


@contextlib.contextmanager
def files_of_at_most(size):
  """As on a disk that is full beyond that."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_no_mistake_and_the_same_command_goes_on(tmp_path):
  """Either way; a leaf of 32 x 192 float32 is the largest."""
  write_torch(tmp_path / "torch", "dit")
  with files_of_at_most(10_000), pytest.raises(OSError, match=r"run/checkpoints cannot be written|File too large"):
    convert(tmp_path / "torch", tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
  convert(tmp_path / "torch", tmp_path / "run")
  with files_of_at_most(60_000), pytest.raises(OSError, match=r"back: .*File too large.*the same command goes on"):
    convert(tmp_path / "run", tmp_path / "back")
  convert(tmp_path / "run", tmp_path / "back")
  assert_same_tensors(tmp_path / "back", tmp_path / "torch")


def test_a_mark_that_was_cut_short_is_gone_on_with(tmp_path):
  """The first thing that a conversion writes; of a run that is there it must be whole."""
  write_torch(tmp_path / "torch", "dit")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "source.json").write_text('{"sou')
  convert(tmp_path / "torch", tmp_path / "run")
  mark = tmp_path / "run" / "source.json"
  mark.write_bytes(mark.read_bytes()[:-9])
  with pytest.raises(ValueError, match="was not made from this source"):
    convert(tmp_path / "torch", tmp_path / "run")
