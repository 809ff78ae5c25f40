"""Exports against the loaders that others published: what each asks of a student's files.

A rule names the lines that it restates, of these releases:

* LakonLab, π-Flow's: github.com/Lakonik/LakonLab at 84566d5, lakonlab/.
* ComfyUI-piFlow: github.com/Lakonik/ComfyUI-piFlow at 5aa606c.
* ArcFlow: github.com/pnotp/ArcFlow at 4294909, lakonlab/.
"""

import inspect
import json

import pytest
import torch
from diffusers import AutoModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors import safe_open

from pflow_jax.conversion import to_torch
from pflow_jax.conversion.program import convert
from pflow_jax.torch_io.tensors import WEIGHTS
from tests.conversion.folders import CLASSES, write_run

pytestmark = pytest.mark.usefixtures("float32")

BACKBONES = {"flux": FluxTransformer2DModel, "qwen_image": QwenImageTransformer2DModel}
# LakonLab pipelines/utils.py:34-39 and ArcFlow pipelines/arcflow_loader.py:30-33; any other class is diffusers' own.
OWN_CLASSES = {
  ("flux", "GMFlow"): "GMFluxTransformer2DModel",
  ("qwen_image", "GMFlow"): "GMQwenImageTransformer2DModel",
  ("flux", "ArcFlow"): "ArcFluxTransformer2DModel",
  ("qwen_image", "ArcFlow"): "ArcQwenImageTransformer2DModel",
}
# Arguments that the constructors have beside the backbone's: LakonLab gmflow/gmflux.py:29-45 and gmqwen.py:29-45,
# ArcFlow architecture/arcflow/arcflux.py:28-41 and arcqwen.py.
OWN_FIELDS = {
  "GMFlow": {"num_gaussians", "constant_logstd", "logstd_inner_dim", "gm_num_logstd_layers", "logweights_channels"},
  "ArcFlow": {"num_gaussians", "logweights_channels"},
  "DX": set(),
}
# Arguments of the policies' classes that a file may state: LakonLab models/diffusions/piflow_policies/gmflow.py:28-34
# and dx.py:23-31, ComfyUI-piFlow modules/piflow_policies/ the same, ArcFlow models/diffusions/policies/arcflow.py:25-31
ARGUMENTS = {
  "GMFlow": {"checkpointing", "eps"},
  "ArcFlow": {"checkpointing", "eps"},
  "DX": {"segment_size", "shift", "mode", "eps"},
}
TYPES = {"gmflow": "GMFlow", "constant": "GMFlow", "dx": "DX", "polynomial": "DX", "arc": "ArcFlow"}
ADAPTERS = [
  *(("flux", policy) for policy in TYPES),
  *(("qwen_image", policy) for policy in ("gmflow", "dx", "arc")),
]


def read(folder):
  """Config, shapes and metadata as a loader sees them: config.json and one file of weights.

  One file: LakonLab pipelines/utils.py:212-224, ArcFlow pipelines/arcflow_loader.py:184-197; ComfyUI-piFlow
  piflow_loader.py:154.
  """
  assert not list(folder.glob("*.index.json"))
  assert [path.name for path in folder.glob("*.safetensors")] == [WEIGHTS]
  with safe_open(folder / WEIGHTS, "pt") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = file.metadata()
  return AutoModel.load_config(folder), tensors, metadata


def backbone_of(kind, config):
  """The module of diffusers that a student's class extends, of the sizes in its config."""
  known = set(inspect.signature(BACKBONES[kind].__init__).parameters)
  with torch.device("meta"):
    return BACKBONES[kind](**{name: value for name, value in config.items() if name in known - {"out_channels"}})


def shapes_of_student(kind, policy_type, config):
  """Shapes of the tensors in a student's module."""
  width = config["num_attention_heads"] * config["attention_head_dim"]
  shapes = {name: tuple(tensor.shape) for name, tensor in backbone_of(kind, config).state_dict().items()}
  shapes = {name: shape for name, shape in shapes.items() if not name.startswith("proj_out.")}
  outputs = config["out_channels"] or config["in_channels"]
  if policy_type == "DX":  # LakonLab dxflow/dxflux.py:40, dxqwen.py:43: patch_size=1 and a wider layer
    assert config["patch_size"] == 1
    layers = {"proj_out": (outputs, width)}
  else:  # LakonLab gmflow/gmflux.py:89-105, gmqwen.py:81-97; ArcFlow arcflux.py:86-88
    count, sub_pixels = config["num_gaussians"], config["logweights_channels"]
    layers = {"proj_out_means": (count * outputs, width), "proj_out_logweights": (count * sub_pixels, width)}
    if policy_type == "ArcFlow":
      layers["proj_out_loggamma"] = ((count - 1) * sub_pixels, width)
    elif config["constant_logstd"] is None:
      assert config["gm_num_logstd_layers"] == 2
      inner = config["logstd_inner_dim"]
      layers |= {"proj_out_logstds.1": (inner, width), "proj_out_logstds.3": (1, inner)}
  return shapes | {
    f"{name}.{leaf}": shape[: 2 if leaf == "weight" else 1]
    for name, shape in layers.items()
    for leaf in ("weight", "bias")
  }


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teachers):
  """Returns a function: the folder of an adapter, or of a full student, of a kind and a policy."""
  made = {}

  def export(kind, policy, table=None):
    if (kind, policy, table) not in made:
      folder = tmp_path_factory.mktemp(f"{kind}_{policy}")
      write_run(folder / "run", kind, policy, teachers, table)
      convert(folder / "run", folder / "torch")
      made[kind, policy, table] = folder / "torch"
    return made[kind, policy, table]

  return export


@pytest.mark.parametrize(("kind", "policy"), ADAPTERS)
def test_lakonlab_and_arcflow_load_an_adapter(exported, teachers, kind, policy):
  config, tensors, metadata = read(exported(kind, policy))
  name = TYPES[policy]
  # The class is one that the loader maps, or diffusers' (pipelines/utils.py:186-205).
  assert config["_class_name"] == OWN_CLASSES.get((kind, name), BACKBONES[kind].__name__)
  # Its constructor takes every field (from_config, utils.py:327); any other is dropped with a warning.
  known = set(inspect.signature(BACKBONES[kind].__init__).parameters)
  assert {key for key in config if not key.startswith("_")} <= (known | OWN_FIELDS[name])
  # Names with "lora" in them are adapters, all others replace parameters, without or with "transformer." (265-270).
  lora = {key: tensor for key, tensor in tensors.items() if "lora" in key}
  whole = {key: tensor for key, tensor in tensors.items() if "lora" not in key}
  # A name that the module lacks would be passed over in silence (341-343), and a parameter that neither the file nor
  # the teacher has would stay without a value.
  shapes = shapes_of_student(kind, name, config)
  assert {key: tuple(tensor.shape) for key, tensor in whole.items()}.items() <= shapes.items()
  teacher = CLASSES[kind][0].from_pretrained(teachers / "torch" / kind)
  assert set(shapes) <= set(whole) | {key for key in teacher.state_dict() if not key.startswith("proj_out.")}
  # ArcFlow's loader does nothing, in silence, where there are no adapters (arcflow_loader.py:253-265).
  assert lora
  # peft takes every adapter, and multiplies none: W + B A (load_lora_adapter, utils.py:364).
  teacher.load_lora_adapter(dict(lora), prefix=None, adapter_name="student")
  layers = {key.split(".lora_")[0] for key in lora}
  modules = {key: module for key, module in teacher.named_modules() if hasattr(module, "lora_A")}
  assert set(modules) == layers
  for key, module in modules.items():
    assert torch.equal(module.lora_A["student"].weight, lora[f"{key}.lora_A.weight"])
    assert torch.equal(module.lora_B["student"].weight, lora[f"{key}.lora_B.weight"])
    assert module.scaling["student"] == 1
  # The policy's class takes what the metadata state (pipelines/pipeline_piflux.py:90-94).
  stated = json.loads(metadata["policy_config"])
  assert stated.pop("type") == name
  assert set(stated) <= ARGUMENTS[name]


@pytest.mark.parametrize(("kind", "policy"), [case for case in ADAPTERS if case[1] not in ("arc", "constant")])
def test_comfyui_reads_the_same_student_from_the_file_alone(exported, kind, policy):
  config, tensors, metadata = read(exported(kind, policy))
  stated = json.loads(metadata["policy_config"])  # modules/model_detection.py:101-102
  assert stated.pop("type") in ("GMFlow", "DX")  # modules/piflow_policies/__init__.py:5-8
  assert set(stated) <= ARGUMENTS[TYPES[policy]]  # modules/model_base.py:109-111
  # Whole tensors go by diffusers' own names, without a prefix (piflow_loader.py:79-90).
  assert not any(name.startswith("transformer.") for name in tensors)
  if policy != "gmflow":  # the sizes of the output layer (modules/model_detection.py:71-85)
    assert len(tensors["proj_out.weight"]) == config["out_channels"]
    return
  # Sizes of the mixture (modules/model_detection.py:13-35): patches of 2, and FLUX's channels counted by sub-pixels.
  components, rest = divmod(len(tensors["proj_out_logweights.weight"]), 4)
  assert (components, rest) == (config["num_gaussians"], 0)
  assert len(tensors["proj_out_means.weight"]) == components * config["out_channels"]
  # The layers of the log-std (38-61).
  layers = [n for n in tensors if n.startswith("proj_out_logstds.") and n.endswith(".weight")]
  assert len(layers) == config["gm_num_logstd_layers"]
  assert next(len(tensors[n]) for n in layers if len(tensors[n]) != 1) == config["logstd_inner_dim"]
  # A FLUX.1 student has guidance, without which no class fits (modules/supported_models.py:67-71).
  assert kind != "flux" or config["guidance_embeds"]


def test_a_constant_log_std_is_what_comfyui_cannot_read(exported):
  """It takes a mixture without layers for one of log-std -inf (modules/model_detection.py:48-50), as the page says."""
  config, tensors, _ = read(exported("flux", "constant"))
  assert config["constant_logstd"] == -3
  assert not any(name.startswith("proj_out_logstds.") for name in tensors)


@pytest.mark.parametrize("policy", ["dx", "polynomial"])
def test_diffusers_reads_a_full_student_of_its_own_class(exported, policy):
  folder = exported("flux", policy, ())
  model, info = FluxTransformer2DModel.from_pretrained(folder, output_loading_info=True)
  assert not any(info.values())
  assert model.proj_out.out_features == 3 * 16


def test_a_full_dit_has_the_tensors_of_lakonlabs_class(exported):
  """LakonLab models/architectures/gmflow/gmdit_v2.py:25-119: one embedding `emb`, and heads for whole patches."""
  config, tensors, _ = read(exported("dit", "gmflow", ()))
  assert config["_class_name"] == "GMDiTTransformer2DModelV2"
  width, p2, count = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"] ** 2, 3
  want = {
    "proj_out_1": 2 * width,
    "proj_out_means": p2 * count * config["out_channels"],
    "proj_out_logweights": p2 * count,
  }
  assert {name: tuple(tensors[f"{name}.weight"].shape) for name in want} == {k: (n, width) for k, n in want.items()}
  assert any(name.startswith("emb.") for name in tensors)
  assert not any(".norm1.emb." in name for name in tensors)


def test_a_policy_is_one_file_however_large_and_a_teacher_is_not(tmp_path, teachers, monkeypatch):
  monkeypatch.setattr(to_torch, "SHARD_BYTES", 10_000)
  write_run(tmp_path / "run", "flux", "gmflow", teachers)
  convert(tmp_path / "run", tmp_path / "one")
  assert (tmp_path / "one" / WEIGHTS).stat().st_size > 10_000
  convert(tmp_path / "run", tmp_path / "several", max_shard_gb=1e-5)
  convert(teachers / "run" / "flux", tmp_path / "teacher")
  for name in ("several", "teacher"):
    assert (tmp_path / name / f"{WEIGHTS}.index.json").exists()
