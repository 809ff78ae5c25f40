"""What is wrong with a teacher is named, and the code that is given for it makes it right.

The right teacher is a closed form: the posterior velocity of the digits themselves, E[eps - x0 | x, class].
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pflow_jax as pf

pytestmark = pytest.mark.usefixtures("float32")
CLASSES, FEW = 10, dict(num=64, batch_size=32)


@pytest.fixture(scope="module")
def digits():
  return pf.data.load("digits")


def posterior(dataset, a=1.0, b=0.0):
  """The best velocity of data a x0 + b; the label CLASSES is the empty condition."""
  x0 = jnp.asarray(dataset.records.x0).reshape(dataset.num_records, -1) * a + b
  label = jnp.asarray(dataset.records.label)

  def velocity(x, t, cond):
    flat, s = x.reshape(len(x), -1), t.reshape(-1, 1)
    distance = jnp.sum((flat[:, None] - (1 - s[:, None]) * x0[None]) ** 2, -1)
    known = (cond[:, None] == label[None]) | (cond[:, None] == CLASSES)
    weights = jax.nn.softmax(jnp.where(known, -distance / (2 * s**2), -jnp.inf))
    return ((flat - weights @ x0) / s).reshape(x.shape)

  return velocity


@pytest.fixture(scope="module")
def right(digits):
  return posterior(digits)


def s(t):
  return t.reshape(-1, 1, 1, 1)


def guided(v, w):
  return pf.guided(v, CLASSES, scale=w)


def test_a_right_teacher_is_ok(right, digits):
  for teacher in (right, pf.Teacher(right), guided(right, 2.0), guided(right, 5.0)):
    report = pf.check_teacher(teacher, digits, **FEW)
    assert report.ok, report
    assert min(report.errors.values()) < 0.5
  settings = pf.TeacherSettings(guidance=5.0)
  report = pf.check_teacher(pf.Teacher(right, settings=settings), digits, **FEW)
  assert report.ok, report
  assert "guidance 5) on digits, errors without guidance: ok" in repr(report)
  assert max(report.errors.values()) < 0.6, "guidance would cost more"


ORDER = np.array([*range(1, CLASSES), 0], np.int32)
# kind -> a function that is wrong so, made of the right one; the code that is told must mend it.
MENDED = {
  "sign": lambda v: lambda x, t, c: -v(x, t, c),
  "time direction": lambda v: lambda x, t, c: v(x, 1 - t, c),
  "time direction and sign": lambda v: lambda x, t, c: -v(x, 1 - t, c),
  "time scale": lambda v: lambda x, t, c: v(x, t / 1000, c),
  "time scale and time direction and sign": lambda v: lambda x, t, c: -v(x, 1 - t / 1000, c),
  "time scale and prediction": lambda v: lambda x, t, c: x + (1 - s(t) / 1000) * v(x, t / 1000, c),
  "velocity scale": lambda v: lambda x, t, c: 0.1 * v(x, t, c),
  "labels": lambda v: lambda x, t, c: v(x, t, jnp.asarray(ORDER)[c]),
  "finite": lambda v: lambda x, t, c: jnp.where(s(t) == 1, jnp.nan, v(x, t, c)),
}


def denoiser(v):
  """EDM's: E[x0 | y], y = x0 + sigma eps."""

  def run(y, sigma, cond):
    t = sigma / (1 + sigma)
    x = y / (1 + s(sigma))
    return x - s(t) * v(x, t, cond)

  return run


PREDICTIONS = {
  "noise": (lambda v: lambda x, t, c: x + (1 - s(t)) * v(x, t, c), "it is a prediction of the noise"),
  "data": (lambda v: lambda x, t, c: x - s(t) * v(x, t, c), "it is a prediction of x0"),
  "denoiser": (denoiser, "it is a denoiser of EDM"),
}


def mended(problem, velocity):
  names = dict(velocity=velocity, jnp=jnp, jax=jax, np=np, pf=pf)
  exec(problem.fix, names)
  return names["teacher"]


@pytest.mark.parametrize("kind", MENDED)
def test_a_convention_is_named_and_mended(kind, right, digits):
  wrong = MENDED[kind](right)
  report = pf.check_teacher(wrong, digits, **FEW)
  assert [one.kind for one in report.problems] == [kind], report
  assert not report.ok
  again = pf.check_teacher(mended(report.problems[0], wrong), digits, **FEW)
  assert again.ok, again


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_is_named_and_mended(name, right, digits):
  make, text = PREDICTIONS[name]
  wrong = make(right)
  (problem,) = pf.check_teacher(wrong, digits, **FEW).problems
  assert problem.kind == "prediction"
  assert problem.text.startswith(text)
  again = pf.check_teacher(mended(problem, wrong), digits, **FEW)
  assert again.ok, again


@pytest.mark.parametrize(
  ("a", "b", "code"), [(0.5, 0.5, "(x0 + 1) / 2"), (127.5, 127.5, "127.5 * (x0 + 1)"), (1.32, 0.51, "(x0 +0.3")]
)
def test_the_scale_of_data_is_named_and_mended(a, b, code, digits):
  own = posterior(digits, a, b)
  (problem,) = pf.check_teacher(own, digits, **FEW).problems
  assert problem.kind == "data scale"
  assert code in problem.text
  names = dict(pf=pf, x0=digits.records.x0, label=digits.records.label)
  exec(problem.fix, names)
  again = pf.check_teacher(own, names["data"], **FEW)
  assert again.ok, again


def random(v):
  calls = iter(range(1000))
  draw = lambda: np.float32(next(calls))
  return lambda x, t, c: v(x, t, c) + jax.pure_callback(draw, jax.ShapeDtypeStruct((), np.float32))


@pytest.mark.parametrize(
  ("kind", "make", "text"),
  [
    ("call", lambda v: lambda x, t, c: v(x, t), "raises TypeError: .*missing 1 required positional argument"),
    (
      "shape",
      lambda v: lambda x, t, c: v(x, t, c)[..., 0],
      r"expected one array float32\[32, 8, 8, 1\], .* float32\[32, 8, 8\]",
    ),
    ("shape", lambda v: lambda x, t, c: v(x, t, c) * t, r"got float32\[32, 8, 8, 32\]"),
    ("shape", lambda v: lambda x, t, c: (v(x, t, c),), "got a tuple of 1"),
    ("dtype", lambda v: lambda x, t, c: v(x, t, c).astype(int), "got int32"),
    ("finite", lambda v: lambda x, t, c: v(x, t, c) / (s(t) > 0.5), "of 64 examples at t from 0.2 to 0.8"),
    ("random", random, "other values"),
    ("batch", lambda v: lambda x, t, c: v(x, t, c) - v(x, t, c).mean(0), "depends on the others"),
    ("batch", lambda v: lambda x, t, c: v(x, jnp.full_like(t, t[0]), c), "or on their flow times"),
    ("condition", lambda v: lambda x, t, c: v(x, t, jnp.full_like(c, CLASSES)), "the condition changes nothing"),
    ("traced", lambda v: lambda x, t, c: np.asarray(v(jnp.asarray(np.asarray(x)), t, c)), "JAX cannot trace it"),
  ],
)
def test_other_mistakes_are_named(kind, make, text, right, digits):
  report = pf.check_teacher(make(right), digits, **FEW)
  assert [one.kind for one in report.problems] == [kind], report
  assert report.problems[0].fix
  assert re.search(text, report.problems[0].text)


def test_what_knows_no_more_than_a_gaussian_does_not_fit(digits):
  def normal(x, t, cond):  # of x0 that are standard normal
    return x * (2 * s(t) - 1) / (s(t) ** 2 + (1 - s(t)) ** 2)

  for velocity in (normal, lambda x, t, c: 0 * x):
    assert [one.kind for one in pf.check_teacher(velocity, digits, **FEW).problems] == ["condition", "fit"]


@pytest.mark.parametrize(("size", "num"), [(2, 16), (16, 64), (256, 256)])
def test_the_truth_of_normal_data_fits_though_no_better_than_their_gaussian(size, num):
  x0 = np.random.default_rng(0).standard_normal((2000, size), np.float32)

  def normal(x, t, cond):
    t = t[:, None]
    return x * (2 * t - 1) / (t**2 + (1 - t) ** 2)

  for seed in range(5):
    report = pf.check_teacher(normal, pf.data.from_arrays(x0), num=num, seed=seed)
    assert report.ok, report


def test_labels_that_tell_little_are_in_no_other_order_by_chance():
  rng = np.random.default_rng(0)
  label = rng.integers(0, 2, 2000)
  mean = np.array([[0.2, 0.2], [-0.2, -0.2]], np.float32)
  data = pf.data.from_arrays((mean[label] + rng.standard_normal((2000, 2))).astype(np.float32), label)

  def right(x, t, cond):
    t = t[:, None]
    m = jnp.asarray(mean)[cond]
    return (x - m - (1 - t) / ((1 - t) ** 2 + t**2) * (x - (1 - t) * m)) / t

  for seed in range(8):
    report = pf.check_teacher(right, data, num=16, seed=seed)
    assert report.ok, report
  (problem,) = pf.check_teacher(lambda x, t, c: right(x, t, 1 - c), data).problems
  assert problem.kind == "labels"


def test_guidance_of_an_interval_beyond_the_times_that_are_looked_at_is_no_problem(right, digits):
  settings = pf.TeacherSettings(guidance=2.0, interval=(0.9, 1.0))
  report = pf.check_teacher(pf.Teacher(right, settings=settings), digits, **FEW)
  assert report.ok, report


def test_guidance_needs_an_empty_condition_that_the_teacher_knows(right, digits):
  settings = pf.TeacherSettings(guidance=2.0)
  clipped = pf.Teacher(lambda x, t, c: right(x, t, jnp.minimum(c, CLASSES - 1)), settings=settings)
  (problem,) = pf.check_teacher(clipped, digits, **FEW).problems
  assert problem.kind == "condition"
  assert "label 10, gives the velocity of the last class" in problem.text


def test_a_run_and_points_are_checked(teacher_run):
  report = pf.check_teacher(pf.load(teacher_run), **FEW)
  assert {one.kind for one in report.problems} <= {"fit", "condition"}, "three steps teach little, and break nothing"
  points = pf.data.load("checkerboard")
  report = pf.check_teacher(lambda x, t, c: x, points, **FEW)
  assert "fit" in [one.kind for one in report.problems]


def test_few_examples_of_one_class_are_enough_to_see_the_condition(digits):
  few = pf.data.from_arrays(digits.records.x0[:5], np.full(5, 3))
  velocity = posterior(few)
  known = lambda x, t, c: velocity(x, t, jnp.full_like(c, 3)) * (1 + c.reshape(-1, 1, 1, 1) % 2) / 2
  assert pf.check_teacher(known, few).ok


def test_the_report_is_short_and_escapes_text(right, digits):
  report = pf.check_teacher(lambda x, t, c: -right(x, t, c), digits, **FEW)
  assert len(repr(report).splitlines()) < 12
  page = report._repr_html_()
  assert "return -velocity(x, t, cond)" in page
  assert "&lt;lambda&gt;" in page
  assert "<lambda>" not in page


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda v, d: pf.check_teacher(3, d), "Teacher: expected a function"),
    (lambda v, d: pf.check_teacher(v, "digits"), "data: expected what pf.data.load"),
    (lambda v, d: pf.check_teacher(v, d, num=2), "expected at least 16 examples"),
    (lambda v, d: pf.check_teacher("/nowhere", d), "there is no file or folder /nowhere"),
  ],
)
def test_wrong_arguments_are_told(call, message, right, digits):
  with pytest.raises(ValueError, match=message):
    call(right, digits)
