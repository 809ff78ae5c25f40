"""Every config: two steps, save, restore, a third step; and nothing in it that nobody reads."""

import json

import jax
import pytest

from pflow_jax import data
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from tests.programs import CONFIGS, ROOT, load_module, quick, write_pretrained

TEACHERS = ("teacher", "flow_teacher")
CASES = [(path.stem, variant) for path in CONFIGS for variant in load_module(path).VARIANTS]


def to_train():
  """The cases, without those whose quicktest is another's but for how many evaluations, of more than one, it is for."""
  found = {}
  for case in CASES:
    values = quick(*case).to_dict()
    if "nfe" in values["objective"]:
      values["objective"]["nfe"] = min(values["objective"]["nfe"], 2)
    found.setdefault(json.dumps(values, sort_keys=True), case)
  return list(found.values())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
  """Workdir of the three-step teacher that fits a variant, None for a teacher."""
  folders = {}

  def get(config, variant):
    if variant in TEACHERS:
      return None
    if not any(name in TEACHERS for other, name in CASES if other == config):
      if config not in folders:  # its teacher is converted, not trained
        folders[config] = write_pretrained(quick(config, variant), tmp_path_factory.mktemp(config))
      return folders[config]
    scale = quick(config, variant).model.get("time_scale")
    fitting = next(name for name in TEACHERS if quick(config, name).model.get("time_scale") == scale)
    if (config, fitting) not in folders:
      folders[config, fitting] = tmp_path_factory.mktemp(config)
      train(quick(config, fitting), folders[config, fitting])
    return folders[config, fitting]

  return get


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("config", "variant"), to_train())
def test_config_trains_saves_restores_and_goes_on(config, variant, teachers, tmp_path):
  values = quick(config, variant, teachers(config, variant), steps=2)
  values.optimizer.schedule = "constant"  # a cosine run keeps its number of steps
  train(values, tmp_path)
  values.train.steps = 3
  state = train(values, tmp_path)
  assert int(state.step) == 3
  assert all(bool(jax.numpy.all(jax.numpy.isfinite(x))) for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize(("config", "variant"), CASES)
def test_full_size_config_is_read_whole(config, variant, tmp_path, monkeypatch):
  """The real config, not its quicktest: sections fit their owners and the network has a shape."""
  values = load_module(ROOT / "configs" / f"{config}.py").get_config(variant)
  if not values.data.name.startswith("prompts:"):  # whose shapes are known without the data
    monkeypatch.setattr(data, "load", lambda **kw: quick_dataset(config, variant))
  if variant not in TEACHERS:
    from pflow_jax.training import experiment

    monkeypatch.setattr(experiment, "load_teacher", lambda *_, **__: None)
    values.teacher.workdir = "a teacher"
  made = build(values)
  x = jax.ShapeDtypeStruct((2, *made.dataset.shape), "float32")
  t = jax.ShapeDtypeStruct((2,), "float32")
  shapes = jax.eval_shape(made.network.module.init, jax.random.key(0), x, t, made.dataset.cond_shapes(2))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1000


def quick_dataset(config, variant):
  values = quick(config, variant).data.to_dict()
  return data.registry.load(**values)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_unknown_variant_is_refused(path):
  with pytest.raises(ValueError, match="expected one of"):
    load_module(path).get_config("no-such-variant")
  assert load_module(path).__doc__
