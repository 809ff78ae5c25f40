"""The loss by noise level: sums in the step, means over the steps of a row, and all methods that have times."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.training.noise_levels import NAMES, SUMS, averaged, means_by_time
from pflow_jax.training.train import train
from tests.programs import quick


def by_hand(t, loss):
  """Mean loss of the examples of each quarter, with a loop."""
  found = {}
  for time, value in zip(np.ravel(t), np.ravel(loss), strict=True):
    found.setdefault(NAMES[min(int(time * 4), 3)], []).append(value)
  return {name: np.mean(values) for name, values in found.items()}


@pytest.mark.parametrize("shape", [(40,), (10, 4)])
def test_means_are_those_of_the_examples_over_several_steps(shape):
  """A part without an example in one step has the other's; the weights are the numbers of examples."""
  rng = np.random.default_rng(0)
  times = [rng.uniform(0.3, 1.0, shape), rng.uniform(0.0, 0.8, shape)]
  losses = [rng.normal(size=shape) for _ in times]
  sums = []
  for t, loss in zip(times, losses, strict=True):
    told = averaged(loss.reshape(shape[0], -1).mean(1), {"t": t, "loss_at_t": loss, "other": jnp.ones(shape[0])})
    assert set(told) == {SUMS, "other"}
    sums.append(np.asarray(told[SUMS]))
  expected = by_hand(np.stack(times), np.stack(losses))
  assert means_by_time(sums).keys() == expected.keys()
  for name, value in means_by_time(sums).items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-12)


def test_the_ends_of_time_have_parts_and_empty_parts_have_no_mean():
  sums = averaged(jnp.array([1.0, 2.0, 4.0]), {"t": jnp.array([0.0, 1.0, 0.25])})[SUMS]
  assert means_by_time([np.asarray(sums)]) == {NAMES[0]: 1.0, NAMES[1]: 4.0, NAMES[3]: 2.0}


def test_a_loss_that_is_not_finite_spoils_its_own_part_alone():
  sums = averaged(jnp.array([1.0, jnp.nan]), {"t": jnp.array([0.1, 0.9])})[SUMS]
  assert means_by_time([np.asarray(sums)]) == {NAMES[0]: 1.0}


def test_metrics_without_times_are_means():
  """So are those of an objective of one's own whose t is another thing."""
  told = averaged(jnp.ones(4), {"t": jnp.array(3.0), "x": jnp.arange(4.0)})
  assert {name: float(value) for name, value in told.items()} == {"t": 3.0, "x": 1.5}


def rows_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_of_a_teacher_and_of_a_student_have_the_loss_by_noise_level(teacher_run, student_run):
  for row in (*rows_of(teacher_run), *rows_of(student_run)):
    parts = [row[name] for name in NAMES if name in row]
    assert len(parts) >= 2
    assert min(parts) <= row["loss"] <= max(parts)
    assert not {"t", "loss_at_t", SUMS} & set(row)


@pytest.mark.usefixtures("float32")
def test_rows_of_a_flow_map_with_micro_batches_have_it(tmp_path):
  config = quick("checkerboard", "mean_flow", steps=2, batch_size=64, accumulation=2, log_every=2)
  train(config, tmp_path)
  (row,) = rows_of(tmp_path)
  assert set(NAMES) <= set(row)
  assert min(row[name] for name in NAMES) <= row["loss"] <= max(row[name] for name in NAMES)


@pytest.mark.usefixtures("float32")
def test_a_students_loss_is_told_at_the_times_at_which_its_teacher_is_asked():
  """One evaluation starts from noise alone, t = 1; its loss is of states all along the segment."""
  import pflow_jax as pf

  def teacher(x, t, cond):
    return jnp.ones_like(x) * jnp.where(t < 0.5, 10.0, 0.0)[:, None]

  def student(x, t, cond):
    return jax.vmap(lambda x, t: pf.DXPolicy.create(x, t, x[None], segment=1.0))(x, t)

  settings = pf.Imitation(num_states=4, loss_scale=2.0)
  loss, told = pf.imitation_loss(student, teacher, jnp.zeros((64, 2)), None, jax.random.key(0), jnp.array(0), settings)
  assert told["t"].shape == told["loss_at_t"].shape == (64, 4)
  np.testing.assert_allclose(told["loss_at_t"].mean(1), loss, rtol=1e-6)
  means = means_by_time([np.asarray(averaged(loss, told)[SUMS])])
  assert set(means) == set(NAMES)
  assert min(means[NAMES[0]], means[NAMES[1]]) > 20 > 10 > max(means[NAMES[2]], means[NAMES[3]])


@pytest.mark.usefixtures("float32")
def test_without_data_the_states_of_all_segments_are_told():
  import pflow_jax as pf

  def student(x, t, cond):
    return jax.vmap(lambda x, t: pf.DXPolicy.create(x, t, x[None], segment=0.5))(x, t)

  args = lambda x, t, cond: -x, jnp.ones((8, 2)), None, jax.random.key(0), jnp.array(0)
  loss, told = pf.imitation_loss_data_free(student, *args, pf.Imitation(nfe=2, num_states=3))
  assert told["t"].shape == (8, 6)
  assert jnp.all((told["t"][:, :3] > 0.5) & (told["t"][:, 3:] <= 0.5)), "an example's own, one segment after the other"
  np.testing.assert_allclose(told["loss_at_t"].mean(1), loss, rtol=1e-5)  # segments of one length
