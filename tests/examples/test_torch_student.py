"""The PyTorch reader of exported students: against the releases' numbers, and against this package's own sampler."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pflow_jax.core.policies import ArcPolicy, DXPolicy, GMFlowPolicy
from pflow_jax.core.rollout import RELEASES
from pflow_jax.core.samplers import sample_student
from pflow_jax.networks.lora import adapted
from tests.examples.student_folders import (
  ADAPTED,
  RELEASE,
  SAMPLING,
  SEGMENT,
  SHIFT,
  WEIGHTS,
  inputs,
  make,
  make_adapter,
  write_model,
)
from tests.golden_layout import assert_close, released
from tests.programs import ROOT, load_module

reader = load_module(ROOT / "examples" / "torch_student.py")

# Relative to the largest number; float32 near the data is compared as data, see `assert_same_field`.
PRECISION = [("", 1e-9), ("_f32", 1e-5)]


def arrays_of(file, *names):
  """Arrays of a golden file, whose layout the reader shares."""
  return [torch.from_numpy(file[name]) for name in names]


def assert_same_field(got, want, x, t, rtol):
  """Compares velocities at x and t: as x0 too in float32, where they are differences of nearly equal numbers over t."""
  assert got.dtype == x.dtype
  if x.dtype == torch.float32:
    got, want = (x - max(t, 1e-6) * torch.as_tensor(v) for v in (got, want))
  assert_close(got, np.asarray(want), rtol)


@pytest.mark.parametrize(("suffix", "rtol"), PRECISION)
def test_gmflow_has_the_releases_velocity(golden, suffix, rtol):
  file = golden(f"gm_policy{suffix}")
  x_s, x, *outputs = arrays_of(file, "in_x_src", "in_x_t", "in_means", "in_logweights", "in_logstds")
  for i, t_s in enumerate(map(float, file["in_sigma_src"])):
    policy = reader.GMFlow(x_s[i, None], t_s, *(a[i, None] for a in outputs))
    points = [(policy, x_s if k == 0 else x, frac * t_s, f"out_u_{k}") for k, frac in enumerate(file["in_frac"])]
    points += [(policy.temper(value), x, 0.3 * t_s, f"out_u_temp{value}") for value in (0.3, 0.7)]
    for policy_at, at, t, name in points:
      got = policy_at.velocity(at[i, None], float(t))
      assert_same_field(got[0], file[name][i], at[i], t, rtol)


@pytest.mark.parametrize(("suffix", "rtol"), PRECISION)
@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_dx_has_the_releases_velocity(golden, mode, n, shift, suffix, rtol):
  file = golden(f"dx_{mode}_n{n}_shift{shift}{suffix}")
  x_s, x, coefficients = arrays_of(file, "in_x_src", "in_x_t", "in_do")
  for i, t_s in enumerate(map(float, file["in_sigma_src"])):
    options = dict(segment_size=float(file["in_segment_size"]), shift=float(file["in_shift"]), mode=mode)
    policy = reader.DX(x_s[i, None], t_s, coefficients[i, None], **options)
    for k, frac in enumerate(map(float, file["in_frac"])):
      got = policy.velocity(x[i, None], frac * t_s)
      assert_same_field(got[0], file[f"out_u_{k}"][i], x[i], frac * t_s, rtol)


@pytest.mark.parametrize(("suffix", "rtol"), PRECISION)
def test_arcflow_has_the_releases_velocity_and_end(golden, suffix, rtol):
  file = golden(f"arc_policy{suffix}")
  x, *outputs = arrays_of(file, "in_x", "in_means", "in_logweights", "in_loggammas")
  times = zip(
    *(map(float, file[f"in_{name}"].ravel()) for name in ("sigma_src", "sigma_a", "raw_a", "raw_b")), strict=True
  )
  for i, (t_s, t, r, r_end) in enumerate(times):
    policy = reader.ArcFlow(x[i, None], t_s, *(a[i, None] for a in outputs))
    assert_close(policy.velocity(x[i, None], t)[0], file["out_velocity"][i], rtol)
    # The release replaces small arguments of its exponential integral by 1e-4.
    end = reader.rollout(policy, x[i, None], r, r_end, float(file["in_shift"]))
    assert_close(end[0], file["out_x_end"][i], 5e-5)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("kind", ["GM", "DX"])
def test_rollouts_end_where_the_releases_do(golden, kind, shift, release):
  file = released(golden, f"rollout_{kind}_shift{shift}", release)
  (x,) = arrays_of(file, "in_x_src")
  student = toy_student(file, "GM" if kind == "GM" else "DXgrid")
  for i, (r, r_end) in enumerate(zip(map(float, file["in_raw_start"]), map(float, file["in_raw_end"]), strict=True)):
    policy = student(x[i, None], reader.shift_time(r, shift))
    end = reader.rollout(policy, x[i, None], r, r_end, shift, release=release)
    assert_close(end[0], file["out_x_end"][i], 1e-9)


def toy_student(file, kind):
  """The network of the golden files, see golden/README.md."""
  means, logits, log_std, log_gammas = arrays_of(file, *(f"in_param_{name}" for name in ("means", "lw", "ls", "lg")))

  def student(x, t, cond=None):
    velocities, weights = means + 0.5 * x[:, None] + 0.25 * t, (logits * (1 + t)).expand(len(x), -1, -1, -1, -1)
    if kind == "GM":
      return reader.GMFlow(x, t, velocities, weights, log_std, eps=1e-4 if x.dtype == torch.float32 else 1e-6)
    if kind == "Arc":
      return reader.ArcFlow(x, t, velocities, weights, log_gammas.expand(len(x), -1, -1, -1, -1))
    segment = 1 / 3.5 if kind == "DXgrid" else 1.0
    return reader.DX(x, t, velocities, segment_size=segment, shift=3.2, mode=kind[2:])

  return student


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
  ("name", "kind", "nfe", "final_scale", "temperature"),
  [
    ("sample_GM_temp1.0", "GM", 4, 0.5, 1.0),
    ("sample_GM_temp0.3", "GM", 4, 0.5, 0.3),
    ("sample_GM_temp0.3", "GM", 4, 0.5, "auto"),
    ("sample_DXgrid_temp1.0", "DXgrid", 4, 0.5, "auto"),
    ("sample_DXpolynomial_temp1.0", "DXpolynomial", 4, 0.5, 1.0),
  ],
)
def test_samples_are_the_releases(golden, name, kind, nfe, final_scale, temperature, release):
  file = released(golden, name, release)
  (noise,) = arrays_of(file, "in_noise")
  x0 = reader.sample(toy_student(file, kind), noise, None, nfe, final_scale, 3.2, temperature, release=release)
  assert_close(x0, file["out_x0"], 1e-5)


@pytest.mark.parametrize("release", RELEASES)
def test_arcflows_samples_are_its_releases(golden, release):
  """Whatever π-Flow's version: ArcFlow's own has a closed form."""
  file = golden("arc_sample_2nfe")
  x0 = reader.sample(toy_student(file, "Arc"), *arrays_of(file, "in_noise"), None, 2, 1.0, 3.2, release=release)
  assert_close(x0, file["out_x0"], 1e-5)


def test_segments_have_the_substeps_of_the_newest_release(golden):
  file = golden("lakonlab-0.2/substeps")
  counts = []

  class Counts:
    temper = lambda self, temperature: self

    def velocity(self, x, t):
      counts[-1] += 1
      return x

  def student(x, t, cond):
    counts.append(0)
    return Counts()

  grids = zip(*(file[f"in_{name}"].tolist() for name in ("nfe", "final_scale", "shift", "h")), strict=True)
  for (*grid, h), wanted in zip(grids, file["out_substeps"].tolist(), strict=True):
    if h == 0:
      counts.clear()
      reader.sample(student, torch.zeros(1), None, *grid)
      assert counts == wanted[: grid[0]], grid


def test_a_student_without_a_release_is_read_as_when_it_was_written(tmp_path):
  """By pflow_jax, before it told, as π-Flow 0.1; by a release, as the newest."""
  folder = write_model(tmp_path, "dit", "gmflow", make("dit", "gmflow")[1])
  tensors, policy = load_file(folder / WEIGHTS), {"policy_config": '{"type": "GMFlow"}'}
  for metadata, told in (({"sampling": json.dumps(SAMPLING)}, {"release": "piflow-0.1"} | SAMPLING), ({}, {})):
    save_file(tensors, folder / WEIGHTS, policy | metadata)
    assert reader.load_student(folder).sampling == told
  with pytest.raises(ValueError, match="release: expected one of .*got 'piflow-9'"):
    reader.sample(None, torch.zeros(1), None, 1, release="piflow-9")


def test_clean_polynomials_that_were_exported_before_are_read():
  x, d = np.random.default_rng(0).normal(size=(2, 3, 3)), np.random.default_rng(1).normal(size=(3, 2, 3, 3))
  ours = DXPolicy.create(x, 0.8, d, basis="polynomial", shift=3.2)
  theirs = reader.DX(torch.tensor(x)[None], 0.8, torch.tensor(d)[None], mode="polynomial", shift=3.2, compat=False)
  assert_close(theirs.velocity(torch.tensor(x)[None], 0.4)[0], np.asarray(ours.velocity(x, 0.4)), 1e-9)


@pytest.mark.parametrize("name", ["head_gmflux", "head_gmqwen", "head_dxflux", "head_dxqwen_grid", "head_arcflux"])
def test_rows_of_output_layers_are_the_releases(golden, name):
  """Rows given as tokens, in place of what the layers make of tokens."""
  file = golden(name)
  head = reader.Head("DX", False, {"out_channels": 24, "in_channels": 8}, width=6, channels=2, patch=2)
  head.rows = torch.nn.Identity()
  names = [key.removeprefix("in_tok") for key in file if key.startswith("in_tok")]
  assert names
  for suffix in names:
    maps, want = torch.from_numpy(file[f"in_tok{suffix}"]), file[f"out_unpatch{suffix}"]
    batch, count, _, *grid = maps.shape
    rows = maps.permute(0, 3, 4, 1, 2).reshape(batch, grid[0] * grid[1], -1)
    np.testing.assert_array_equal(head._maps("rows", count, want.shape[2], rows, tuple(grid)), want)


# ---- Whole samples ----

CREATE = {
  "gmflow": GMFlowPolicy.create,
  "gmflow_constant": GMFlowPolicy.create,
  "dx": functools.partial(DXPolicy.create, segment=SEGMENT, shift=SHIFT),
  "dx_polynomial": functools.partial(DXPolicy.create, segment=SEGMENT, shift=SHIFT, basis="polynomial", compat=True),
  "arc": ArcPolicy.create,
}


def jax_samples(module, params, policy, noise, cond, table=(), *, release, **sampling):
  """What this package's sampler draws by the method that has the release's name."""

  @jax.jit
  def run(params, noise, cond):
    def student(x, t, cond):
      with adapted(table):
        outputs = module.apply({"params": params}, x, t, cond)
      return jax.vmap(lambda x, t, out: CREATE[policy](x, t, **out))(x, t, outputs)

    return sample_student(student, noise, cond, method=release, **sampling)

  return np.asarray(run(params, noise, cond))


def torch_samples(student, noise, cond, **sampling):
  """What the reader's sampler draws."""
  noise, cond = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), (noise, cond))
  return reader.sample(student, noise.movedim(-1, 1), cond, **sampling).movedim(1, -1).numpy()


def assert_same_samples(got, want):
  """Both in float32."""
  assert got.dtype == want.dtype == np.float32
  assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


TEMPERED = SAMPLING | RELEASE | dict(temperature=0.3)
ONE = RELEASE | dict(nfe=1)


@pytest.mark.parametrize(
  ("backbone", "policy", "attributes", "sampling"),
  [
    ("dit", "gmflow", {}, TEMPERED),
    ("dit", "gmflow_constant", dict(time_scale=1.0), ONE),
    ("dit", "dx", dict(frequency_shift=1), TEMPERED),
    ("dit", "dx_polynomial", {}, ONE | dict(shift=3.2)),
    ("dit", "arc", {}, TEMPERED),
    ("flux", "gmflow", dict(guidance=None), TEMPERED | dict(nfe=4, release="piflow-0.1")),
    ("qwen_image", "arc", {}, TEMPERED | dict(final_scale=1.0)),
  ],
)
@pytest.mark.usefixtures("float32")
def test_samples_of_a_full_model_are_this_packages(tmp_path, backbone, policy, attributes, sampling):
  module, params = make(backbone, policy, **attributes)
  student = reader.load_student(write_model(tmp_path, backbone, policy, params, **attributes))
  noise, cond = inputs(backbone)
  want = jax_samples(module, params, policy, noise, cond, **sampling)
  assert_same_samples(torch_samples(student, noise, cond, **sampling), want)


@pytest.mark.parametrize(
  ("backbone", "policy", "prefix"),
  [
    ("flux", "gmflow", "transformer."),
    ("flux", "dx", ""),
    ("flux", "arc", ""),
    ("qwen_image", "gmflow", ""),
    ("qwen_image", "dx", "transformer."),
    ("qwen_image", "arc", ""),
  ],
)
@pytest.mark.usefixtures("float32")
def test_samples_of_an_adapter_are_this_packages(tmp_path, backbone, policy, prefix):
  module, params = make_adapter(tmp_path, backbone, policy, prefix)
  student = reader.load_student(tmp_path / "student", tmp_path / "base")
  noise, cond = inputs(backbone)
  want = jax_samples(module, params, policy, noise, cond, table=ADAPTED[backbone], **TEMPERED)
  assert_same_samples(torch_samples(student, noise, cond, **TEMPERED), want)
