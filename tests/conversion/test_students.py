"""Students in PyTorch's form and ours: adapters on a teacher, full models, and what the releases' files may lack."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.conversion.program import convert
from pflow_jax.families.metadata import sampling_of
from pflow_jax.torch_io.table import same_bits
from pflow_jax.torch_io.tensors import WEIGHTS
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from tests.conversion.folders import POLICIES, SAMPLING, assert_same_tensors, metadata_of, write_run
from tests.programs import ROOT, load_module

pytestmark = pytest.mark.usefixtures("float32")


def assert_same(got, want):
  assert all(jax.tree.leaves(jax.tree.map(same_bits, got, want)))


CASES = [("flux", policy) for policy in POLICIES] + [("qwen_image", "gmflow"), ("qwen_image", "dx"), ("dit", "arc")]


@pytest.mark.parametrize(("kind", "policy"), CASES)
def test_an_adapter_goes_to_pytorch_and_comes_back(tmp_path, teachers, kind, policy):
  params, ema = write_run(tmp_path / "run", kind, policy, teachers)
  convert(tmp_path / "run", tmp_path / "torch")
  convert(tmp_path / "run", tmp_path / "params", which="params")
  assert any("lora_A" in name for name in load_file(tmp_path / "torch" / WEIGHTS))
  assert not any("attn.norm" in name for name in load_file(tmp_path / "torch" / WEIGHTS))
  base = teachers / "run" / kind
  convert(tmp_path / "torch", tmp_path / "back", base=base)
  convert(tmp_path / "params", tmp_path / "params_back", base=base)
  for which in ("params", "ema"):
    assert_same(load_params(tmp_path / "back" / workdir.CHECKPOINTS, which=which), ema)
    assert_same(load_params(tmp_path / "params_back" / workdir.CHECKPOINTS, which=which), params)
  before, after = workdir.load_config(tmp_path / "run"), workdir.load_config(tmp_path / "back")
  assert after.head.to_dict() == POLICIES[policy] | after.head.to_dict()
  assert {key: after.objective[key] for key in SAMPLING} == SAMPLING
  assert after.sample.temperature == before.sample.temperature == 0.7
  assert (after.teacher.workdir, after.teacher.step) == (str(base), 0)
  assert tuple(after.data.shape)[-1] == 4
  # It is a run: all of its parameters are there, in the shapes of the one that was trained.
  whole = [build(config).load(folder) for config, folder in ((before, tmp_path / "run"), (after, tmp_path / "back"))]
  assert_same(*(jax.tree.map(np.asarray, params) for params in whole))
  # And it goes out again as it came.
  convert(tmp_path / "back", tmp_path / "again")
  assert_same_tensors(tmp_path / "again", tmp_path / "torch")
  assert metadata_of(tmp_path / "again") | {"source": ""} == metadata_of(tmp_path / "torch") | {"source": ""}
  assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "torch" / "config.json").read_text()


@pytest.mark.parametrize(
  ("kind", "policy", "name", "stated", "fields"),
  [
    ("flux", "gmflow", "GMFluxTransformer2DModel", {"type": "GMFlow"}, dict(num_gaussians=3, logweights_channels=4)),
    ("flux", "constant", "GMFluxTransformer2DModel", {"type": "GMFlow"}, dict(num_gaussians=2, constant_logstd=-3.0)),
    (
      *("flux", "dx", "FluxTransformer2DModel"),
      {"type": "DX", "segment_size": 0.4, "shift": 2.5},
      dict(out_channels=48, in_channels=16, patch_size=1),
    ),
    (
      *("flux", "polynomial", "FluxTransformer2DModel"),
      {"type": "DX", "segment_size": 0.4, "shift": 2.5, "mode": "polynomial"},
      dict(out_channels=48),
    ),
    ("qwen_image", "arc", "ArcQwenImageTransformer2DModel", {"type": "ArcFlow"}, dict(num_gaussians=3)),
    ("dit", "gmflow", "GMDiTTransformer2DModelV2", {"type": "GMFlow"}, dict(out_channels=4, sample_size=8)),
  ],
)
def test_a_full_student_is_what_the_releases_read(tmp_path, teachers, kind, policy, name, stated, fields):
  _, ema = write_run(tmp_path / "run", kind, policy, teachers, table=())
  convert(tmp_path / "run", tmp_path / "torch")
  config = json.loads((tmp_path / "torch" / "config.json").read_text())
  assert config["_class_name"] == name
  assert {key: config[key] for key in fields} == fields
  assert json.loads(metadata_of(tmp_path / "torch")["policy_config"]) == stated
  convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / kind)
  assert_same(load_params(tmp_path / "back" / workdir.CHECKPOINTS), ema)
  assert workdir.load_config(tmp_path / "back").adapters.table == ()
  # The reader for PyTorch wants every tensor, and none besides.
  load_module(ROOT / "examples" / "torch_student.py").load_student(tmp_path / "torch")


@pytest.mark.parametrize("kind", ["flux", "qwen_image"])
def test_pytorch_draws_the_same_from_an_adapter(tmp_path, teachers, kind):
  reader = load_module(ROOT / "examples" / "torch_student.py")
  table = (("double_blocks/img_mlp_in", 4, 8.0), ("time_embed/.*", 4))  # alpha is twice the rank
  write_run(tmp_path / "run", kind, "gmflow", teachers, table)
  convert(tmp_path / "run", tmp_path / "torch")
  student = reader.load_student(tmp_path / "torch", teachers / "torch" / kind)
  rng = np.random.default_rng(1)
  x, text = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 4), (2, 6, 12)))
  other = {"pooled": rng.normal(size=(2, 10)).astype(np.float32)} if kind == "flux" else {"mask": np.ones((2, 6), bool)}
  cond = {"text": text} | other
  experiment = build(workdir.load_config(tmp_path / "run"))
  outputs = experiment.network(experiment.load(tmp_path / "run"), x, np.array([0.6, 0.6], np.float32), cond)
  with torch.inference_mode():
    policy = student(torch.from_numpy(x).movedim(-1, 1), 0.6, {k: torch.from_numpy(v) for k, v in cond.items()})
  means = np.moveaxis((torch.from_numpy(x).movedim(-1, 1)[:, None] - policy.means).numpy() / 0.6, 2, -1)
  assert np.abs(means - outputs["means"]).max() < 1e-4 * np.abs(means).max()


def test_what_a_release_lacks(tmp_path, teachers):
  """A prefix, no metadata of ours, the last block's text MLP without adapters, one more layer that is replaced."""
  _, ema = write_run(tmp_path / "run", "qwen_image", "gmflow", teachers)
  convert(tmp_path / "run", tmp_path / "torch")
  release = tmp_path / "gmqwen_k3_piid_8step"
  shutil.copytree(tmp_path / "torch", release)
  tensors = load_file(release / WEIGHTS)
  kept = {
    f"transformer.{name}": t for name, t in tensors.items() if not name.startswith("transformer_blocks.1.txt_mlp")
  }
  kept["transformer.txt_norm.weight"] = torch.arange(12.0)
  save_file(kept, release / WEIGHTS, {"policy_config": '{"type": "GMFlow"}'})
  convert(release, tmp_path / "back", base=teachers / "run" / "qwen_image")
  back = load_params(tmp_path / "back" / workdir.CHECKPOINTS)
  for leaf in ("lora_a", "lora_b"):
    got, want = (tree["double_blocks"]["txt_mlp_in"][leaf] for tree in (back, ema))
    np.testing.assert_array_equal(got[0], want[0])
    assert not got[1].any()
  np.testing.assert_array_equal(back["txt_norm"]["scale"], np.arange(12))
  config = workdir.load_config(tmp_path / "back")
  assert config.objective.nfe == 8
  assert (config.objective.final_scale, config.objective.shift) == (0.5, 3.2)
  assert build(config).load(tmp_path / "back")["txt_norm"]["scale"][3] == 3
  convert(tmp_path / "back", tmp_path / "again")
  again = load_file(tmp_path / "again" / WEIGHTS)
  assert {f"transformer.{name}" for name in again} == set(kept)
  assert all(torch.equal(again[name], kept[f"transformer.{name}"]) for name in again)


def test_polynomials_of_a_release_are_read_as_it_does(tmp_path, teachers):
  write_run(tmp_path / "run", "flux", "polynomial", teachers)
  convert(tmp_path / "run", tmp_path / "torch")
  tensors = load_file(tmp_path / "torch" / WEIGHTS)
  stated = {"type": "DX", "mode": "polynomial", "shift": 3.2}
  save_file(tensors, tmp_path / "torch" / WEIGHTS, {"policy_config": json.dumps(stated)})
  convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / "flux")
  assert workdir.load_config(tmp_path / "back").head.compat
  convert(tmp_path / "back", tmp_path / "again")
  assert "compat" not in json.loads(metadata_of(tmp_path / "again")["policy_config"])


def test_a_polynomial_that_no_release_reads_stays_here(tmp_path, teachers, monkeypatch):
  monkeypatch.setitem(POLICIES["polynomial"], "compat", False)
  write_run(tmp_path / "run", "flux", "polynomial", teachers)
  with pytest.raises(ValueError, match=r"config\.head\.compat: expected True .*train it with compat=True"):
    convert(tmp_path / "run", tmp_path / "torch")
  assert not (tmp_path / "torch").exists()


@pytest.mark.parametrize(
  ("method", "release"),
  [("auto", "lakonlab-0.2"), ("lakonlab-0.2", "lakonlab-0.2"), ("piflow-0.1", "piflow-0.1"), ("euler", "piflow-0.1")],
)
def test_files_and_the_printed_line_tell_whose_samples_the_reader_draws(tmp_path, teachers, capsys, method, release):
  """A run's own method where it is a release's, else the newest; and it comes back as it went."""
  write_run(tmp_path / "run", "dit", "gmflow", teachers, (), method=method)
  convert(tmp_path / "run", tmp_path / "torch")
  assert f"pflow sample --config.sample.method={release}\n" in capsys.readouterr().out
  reader = load_module(ROOT / "examples" / "torch_student.py")
  assert reader.load_student(tmp_path / "torch").sampling["release"] == release
  convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / "dit")
  config = workdir.load_config(tmp_path / "back")
  assert config.sample.method == ("piflow-0.1" if release == "piflow-0.1" else "auto")
  convert(tmp_path / "back", tmp_path / "again")
  assert metadata_of(tmp_path / "again")["sampling"] == metadata_of(tmp_path / "torch")["sampling"]


def spoil(tensors, change):
  name = "transformer_blocks.0.ff.net.2.lora_B.weight"
  if change == "no B":
    del tensors[name]
  elif change == "rank":
    tensors[name] = torch.zeros(32, 3)
  elif change == "unknown":
    tensors["transformer_blocks.0.ff.net.3.lora_A.weight"] = torch.zeros(4, 8)
  elif change == "no head":
    del tensors["proj_out_means.bias"]
  elif change == "half":
    del tensors["norm_out.linear.bias"]  # the teacher's, then
    tensors["transformer_blocks.1.attn.to_q.bias"] = torch.zeros(32)
  return tensors


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("no B", r"1 missing: transformer_blocks\.0\.ff\.net\.2\.lora_B\.weight"),
    ("rank", r"lora_B\.weight \(expected \(32, 4\), got \(32, 3\)"),
    ("unknown", r"1 unexpected: transformer_blocks\.0\.ff\.net\.3\.lora_A\.weight \(near: "),
    ("no head", r"1 missing: proj_out_means\.bias"),
    ("half", r"1 missing: transformer_blocks\.0\.attn\.to_q\.bias"),
  ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, teachers, change, message):
  write_run(tmp_path / "run", "flux", "gmflow", teachers)
  convert(tmp_path / "run", tmp_path / "torch")
  metadata = metadata_of(tmp_path / "torch")
  tensors = spoil(load_file(tmp_path / "torch" / WEIGHTS), change)
  save_file(tensors, tmp_path / "torch" / WEIGHTS, metadata)
  with pytest.raises(ValueError, match=message):
    convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / "flux")
  assert not (tmp_path / "back").exists()


def test_an_adapter_wants_its_own_teacher(tmp_path, teachers):
  write_run(tmp_path / "run", "flux", "gmflow", teachers)
  convert(tmp_path / "run", tmp_path / "torch")
  with pytest.raises(ValueError, match="give --base"):
    convert(tmp_path / "torch", tmp_path / "back")
  with pytest.raises(ValueError, match="is a dit, the student a flux"):
    convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / "dit")
  with pytest.raises(ValueError, match="expected a teacher"):
    convert(tmp_path / "torch", tmp_path / "back", base=tmp_path / "run")
  config = json.loads((tmp_path / "torch" / "config.json").read_text())
  (tmp_path / "torch" / "config.json").write_text(json.dumps(config | {"num_layers": 3, "guidance_embeds": False}))
  with pytest.raises(ValueError, match=r"depth: the teacher has 2, the student 3; guidance: the teacher has 3.5"):
    convert(tmp_path / "torch", tmp_path / "back", base=teachers / "run" / "flux")
  assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
  ("metadata", "want"),
  [
    ({}, {}),
    ({"policy_config": '{"type": "GMFlow"}'}, {}),
    (
      {"policy_config": '{"type": "DX", "segment_size": 0.2857142857142857, "shift": 3.2}'},
      dict(nfe=4, final_scale=0.5, shift=3.2),
    ),
    ({"policy_config": '{"type": "DX", "segment_size": 1.0}'}, dict(nfe=1, final_scale=1.0, shift=1.0)),
    (
      {"sampling": '{"nfe": 2, "final_scale": 1, "shift": 3}'},
      dict(nfe=2, final_scale=1.0, shift=3.0),
    ),
    (
      {"sampling": '{"nfe": 2, "final_scale": 1, "shift": 3, "temperature": "auto"}'},
      dict(nfe=2, final_scale=1.0, shift=3.0, temperature="auto"),
    ),
    (
      {"sampling": '{"nfe": 2, "final_scale": 1, "shift": 3, "release": "piflow-0.1"}'},
      dict(nfe=2, final_scale=1.0, shift=3.0, release="piflow-0.1"),
    ),
  ],
)
def test_what_files_tell_of_the_training(metadata, want):
  assert sampling_of(metadata) == want


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"sampling": "{}"}, "metadata sampling: nfe: field required"),
    ({"sampling": "[1]"}, "metadata sampling: "),
    ({"sampling": '{"nfe": 0, "final_scale": 1, "shift": 3}'}, "nfe: .* got 0"),
    ({"sampling": '{"nfe": 1000000000, "final_scale": 1, "shift": 3}'}, "nfe: .* got 1000000000"),
    ({"sampling": '{"nfe": 2, "final_scale": NaN, "shift": 3}'}, "expected a finite number, got 'NaN'"),
    ({"sampling": '{"nfe": 2, "final_scale": 1, "shift": "3"}'}, "shift: .* got '3'"),
    ({"sampling": '{"nfe": 2, "final_scale": 1, "shift": 3, "temperature": "hot"}'}, "temperature.* got 'hot'"),
    ({"sampling": '{"nfe": 2, "final_scale": 1, "shift": 3, "release": "piflow-9"}'}, "release: .* got 'piflow-9'"),
    ({"policy_config": '{"type": "Other"}'}, "metadata policy_config: type: .* got 'Other'"),
    ({"policy_config": '{"type": ["DX"]}'}, "policy_config: type"),
    ({"policy_config": '{"type": "DX", "segment_size": 0}'}, "segment_size: .* got 0"),
    ({"policy_config": '{"type": "DX", "segment_size": 1e-300}'}, "segment_size: .* got 1e-300"),
    ({"policy_config": '{"type": "DX", "segment_size": "1"}'}, "segment_size: .* got '1'"),
    ({"policy_config": '{"type": "DX", "mode": "cubic"}'}, "mode: .* got 'cubic'"),
    ({"policy_config": "[" * 10**5}, "policy_config: cannot be read as JSON"),
  ],
)
def test_metadata_of_other_types_are_refused(metadata, message):
  with pytest.raises(ValueError, match=message) as error:
    sampling_of(metadata)
  assert "\n" not in str(error.value)
