"""Every config, small and as it is: nothing in it that nobody reads, and a step that can be traced; eight are run."""

import functools
import shutil

import jax
import numpy as np
import pytest

from pflow_jax.data import registry
from pflow_jax.evaluation.sample import sample
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.optim import make_ema_decay, make_schedule
from pflow_jax.training.step import make_program
from pflow_jax.training.train import train
from pflow_jax.training.workdir import CHECKPOINTS, load_config
from tests.families.test_edm2 import NVIDIAS
from tests.programs import CONFIGS, ROOT, load_module, quick, write_pretrained, write_random

TEACHERS = ("teacher", "flow_teacher", "classes_teacher")
CASES = [(path.stem, variant) for path in CONFIGS for variant in load_module(path).VARIANTS]
# Between them every policy, the kinds of objective, adapters, classes, texts and points, with and without data, guided
# and not. The recipes that differ from one of these by numbers alone are traced; an adversary's runs are those of
# tests/training/test_adversary.py.
RUN = [
  ("emoji", "teacher"),
  pytest.param("imagenet", "gmrepa_1nfe", marks=pytest.mark.slow),
  ("checkerboard", "dx"),
  pytest.param("digits", "arc_adapters", marks=pytest.mark.slow),
  ("digits", "ayf_emd"),
  ("digits", "improved_mean_flow"),
  ("digits", "free_flow"),
  pytest.param("flux", "gm_data_free", marks=pytest.mark.slow),
]

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
  """Workdir of a random teacher that fits a variant, as its own config makes one; None for a teacher."""

  @functools.cache
  def write(config, teacher):
    folder = tmp_path_factory.mktemp(config)
    if teacher in TEACHERS:
      return write_random(quick(config, teacher), folder)
    return write_pretrained(quick(config, teacher), folder)  # its teacher is converted, not trained

  def get(config, variant):
    own = [name for other, name in CASES if other == config and name in TEACHERS]
    if variant in TEACHERS:
      return None
    kind = lambda name: [quick(config, name).model.get("time_scale"), quick(config, name).data.name]
    fitting = [name for name in own if kind(name) == kind(variant)]
    return write(config, fitting[0] if own else next(name for other, name in CASES if other == config))

  return get


@pytest.mark.parametrize(("config", "variant"), RUN)
def test_config_trains_goes_on_in_the_same_bits_and_samples(config, variant, teachers, tmp_path):
  values = quick(config, variant, teachers(config, variant))
  if "nfe" in values.objective:
    values.objective.nfe = min(values.objective.nfe, 2)  # more are a longer program of the same
  whole = train(values, tmp_path)
  shutil.rmtree(tmp_path / CHECKPOINTS / "3")  # as if it had been stopped after the step before
  parts = train(values, tmp_path)
  assert int(parts.step) == 3
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.device_get(parts.params)))
  own = load_config(tmp_path)
  nfe = own.objective.get("nfe", 1)
  with np.load(sample(own, tmp_path, num=2, nfe=nfe).with_suffix(".npz")) as drawn:
    assert drawn[f"x0_nfe{nfe}"].shape == (2, *build(values).dataset.shape)
    assert np.isfinite(drawn[f"x0_nfe{nfe}"]).all()


def check_trace(experiment, devices=None):
  """Traces the step over a mesh: shapes, tables and batch fit, and the state comes out as it went in."""
  program = make_program(experiment, devices and layout_of(experiment.settings, devices))
  state, metrics = program.trace().out_info
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(state) == shapes(program.state)
  assert metrics["loss"].shape == ()


@pytest.mark.parametrize(("config", "variant"), CASES)
def test_quicktest_fits_its_teacher_and_traces(config, variant, teachers):
  values = quick(config, variant, teachers(config, variant))
  if values.head.kind == "denoiser" and values.teacher.guidance != 1:  # EDM2's know no empty condition
    values.teacher.weak_workdir = values.teacher.workdir
  check_trace(build(values))


@pytest.fixture
def no_download(monkeypatch):
  """Latents of emoji without their pictures, with embeddings of the size of MiniLM's."""

  @functools.wraps(registry.latents)  # the keys are its own
  def latents(path, *, embeddings=None, **given):
    if path != "runs/emoji_latents":
      return registry.latents(path, **given)
    if embeddings is None:
      return registry.synthetic(shape=(8, 8, 32), num_classes=1910)
    return registry.synthetic_prompts(model="minilm", shape=(8, 8, 32), pooled=384)

  monkeypatch.setitem(registry._OPEN_SOURCES, "latents:<path>", latents)


# Configs whose full size is their quicktest's but for numbers; and EDM2's, whose objectives are traced there: a U-Net
# that is no scan over layers takes long to trace.
SMALL = ("digits", "checkerboard", "mnist_latents")
EDM2 = {"imagenet64": ("ayf_emd",), "imagenet512": ("ayf_emd_adversarial",)}


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(("config", "variant"), CASES)
def test_full_size_config_is_read_whole_and_traces(config, variant):
  """The real config on 16 devices, billions of parameters too: nothing is made, nor is the teacher looked for."""
  values = load_module(ROOT / "configs" / f"{config}.py").get_config(variant)
  experiment = build(values, abstract=True)
  layout_of(experiment.settings, 16)
  if config not in SMALL and variant in EDM2.get(config, (variant,)):
    check_trace(experiment, devices=16)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_keys_that_nobody_reads_are_refused(path):
  """What makes the tests above say that every key is read."""
  values = load_module(path).get_config()
  for section in values:
    if section != "seed":
      changed = values.copy_and_resolve_references().to_dict()
      changed[section]["no_such_key"] = 1
      with pytest.raises(ValueError, match="no_such_key"):
        build(changed, abstract=True)


# Of configs/piflow_imagenet/*_8gpus.py of LakonLab v0.2.0: guidance, interval, steps, evaluations, factor on the time.
PUBLISHED = {
  "gmrepa_1nfe": (3.2, (0.0, 0.7), 140_000, 1, 1.0),
  "gmrepa_2nfe": (2.8, (0.0, 0.7), 24_000, 2, 1.0),
  "gmdit_1nfe": (2.7, (0.0, 0.6), 140_000, 1, 1000.0),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_recipes_of_imagenet_are_those_published(variant):
  settings = Settings.of(load_module(ROOT / "configs" / "imagenet.py").get_config(variant))
  teacher, objective, train = settings.teacher, settings.objective, settings.train
  told = teacher.guidance, teacher.interval, train.steps, objective.nfe, settings.model.get("time_scale")
  assert told == PUBLISHED[variant]
  assert (teacher.orthogonal, teacher.dtype, settings.model.get("dtype"), train.batch_size) == (
    *(0, "bfloat16", "bfloat16"),
    4096,
  )
  assert dict(settings.head.options) == {"num_components": 32, "logstd_inner_dim": 1024}
  assert (objective.num_states, objective.dropout, objective.substeps, objective.loss_scale) == (2, 0.05, 128, 3.0)
  assert (objective.window, objective.shift, objective.ratio_decay, objective.data_free) == (0, 1, 0, False)
  o = settings.optimizer
  assert (o.b1, o.b2, o.weight_decay, o.clip_norm, o.clip_start, o.schedule) == (0.9, 0.95, 0, 50, 400, "constant")
  rate, kept = make_schedule(o, train.steps), make_ema_decay(settings.ema)
  steps = (0, 399, 400, 401, train.steps - 1)
  np.testing.assert_allclose([rate(i) / 5e-5 for i in steps], [0.001, 0.9975025, 1, 1, 1], rtol=1e-6)
  np.testing.assert_allclose([kept(i) for i in steps[:4]], [0, 0, 0, 0.5**8], rtol=1e-6)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(build(settings, abstract=True).teacher.shapes))
  assert parameters == 674_816_272, "DiT-XL/2 with a position table of its own"


# Of generate_images.py and train_edm2.py of NVlabs/edm2: strength of the autoguided pair, channels; of Align Your Flow:
# mean and deviation of a jump's length.
PAIRS = {"imagenet64": (1.7, 3, (-0.6, 1.6)), "imagenet512": (2.1, 4, (-0.8, 1.0))}


@pytest.mark.parametrize("config", PAIRS)
def test_students_of_edm2_are_of_its_released_networks(config):
  settings = Settings.of(load_module(ROOT / "configs" / f"{config}.py").get_config())
  experiment = build(settings, abstract=True)
  objective, strength = settings.objective, settings.teacher.guidance
  channels = experiment.dataset.shape[-1]
  assert (strength, channels, (objective.time_mean, objective.time_std)) == PAIRS[config]
  assert (experiment.dataset.shape[:2], experiment.dataset.num_classes) == ((64, 64), 1000)
  assert (objective.guidance, objective.max_warmup, objective.normalisation) == ((1.0, 3.0), 0.99, "rms")
  assert (settings.sample.nfe, settings.evaluate.solvers) == ((1, 2, 4), ("edm",))
  shapes = dict(experiment.teacher.shapes["strong"])
  del shapes["fourier"]  # constants
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count + 128 == NVIDIAS["S"][channels - 3]  # NVIDIA's has a layer of 128 that estimates the loss


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_unknown_variant_is_refused(path):
  with pytest.raises(ValueError, match="expected one of"):
    load_module(path).get_config("no-such-variant")
  assert load_module(path).__doc__
