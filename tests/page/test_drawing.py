"""What the page computes: the samples that `pflow sample` draws, their ways, their times, and what is refused."""

import concurrent.futures
import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest

import pflow_jax as pf
from pflow_jax.commands import demo
from pflow_jax.commands.demo import studio_of
from pflow_jax.data import registry
from pflow_jax.data.prompts.dataset import with_embeddings
from pflow_jax.families import text
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.page import drawing
from pflow_jax.page.drawing import Wish
from tests.encoders import StubEncoder
from tests.programs import quick, write_random
from tests.prompt_folders import write as write_prompts

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def loaded(teacher_run, student_run):
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return pf.load(teacher_run), pf.load(student_run)


@pytest.fixture(scope="module")
def studio(teacher_run, student_run):
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return studio_of([teacher_run, student_run])


def test_a_column_is_what_the_command_line_draws_and_changes_compile_nothing(studio, loaded):
  teacher, student = loaded
  assert [(row.name[:7], row.nfe, row.is_teacher) for row in studio.rows] == [
    ("teacher", 128, True),
    ("student", 1, False),
    ("teacher", 4, True),
  ]
  wish = Wish(nfe=(3, 2, 1))
  drawn = studio.draw(wish)
  assert [one.evaluations for one in drawn] == [3, 2, 1]
  assert all(one.compiled > 0 and one.seconds > 0 for one in drawn)
  wish = dataclasses.replace(wish, label=7, seed=5, temperature=0.2)
  again = studio.draw(wish)
  assert [one.compiled for one in again] == [0, 0, 0]
  for column in (0, 7):
    options = dict(num=1, labels=[7], seed=5 + column)
    for row, run, sampling in ((0, teacher, {}), (1, student, {"temperature": 0.2})):
      own = run.sample(nfe=wish.nfe[row], **options, **sampling)
      np.testing.assert_allclose(again[row].x0[column], own[0], atol=1e-5)
  other = studio.draw(dataclasses.replace(wish, temperature=None))
  assert np.abs(other[1].x0 - again[1].x0).max() > 1e-4
  in_turn = studio.draw(Wish(nfe=wish.nfe, seed=5))
  own = student.sample(1, labels=[3], seed=8, nfe=2)
  np.testing.assert_allclose(in_turn[1].x0[3], own[0], atol=1e-5, err_msg="column 3: class 3, seed 8")


def test_a_way_ends_at_the_sample(studio):
  wish = Wish(nfe=(3, 2, 1), label=1, seed=3, temperature=0.2)
  drawn, ways = studio.draw(wish), studio.ways(wish, 6)
  gap = lambda one: np.abs(ways[1].states[-1, 0] - one[1].x0[6]).mean()
  assert gap(drawn) < 0.5 * gap(studio.draw(dataclasses.replace(wish, temperature=None))), "at its temperature"
  for one, way in zip(drawn, ways, strict=True):
    np.testing.assert_allclose(way.states[-1, 0], one.x0[6], atol=5e-3)
    np.testing.assert_allclose(way.times[[0, -1]], [1, 0], atol=1e-7)
    assert (np.diff(way.times) < 0).all()
    every = (len(way.times) - 1) // way.nfe
    np.testing.assert_allclose(way.times[::every], np.linspace(1, 0, way.nfe + 1), atol=1e-7)
    np.testing.assert_allclose(np.diff(way.times, 2), 0, atol=1e-7, err_msg="even, as the shift is 1")
  np.testing.assert_allclose(ways[0].states[0], ways[1].states[0], err_msg="the same noise")


def test_two_visitors_get_their_own(studio):
  wishes = [Wish(nfe=(1, nfe, 1), label=label, seed=label) for nfe, label in ((1, 0), (2, 4)) * 3]
  alone = [studio.draw(wish) for wish in wishes]
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    together = list(pool.map(studio.draw, wishes))
  for one, other in zip(alone, together, strict=True):
    for mine, theirs in zip(one, other, strict=True):
      np.testing.assert_array_equal(mine.x0, theirs.x0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(nfe=(0, 1, 1)), "Evaluations of teacher.*from 1 to 1,000, got 0"),
    (dict(nfe=(1, 10**9, 1)), "Evaluations of student.*got 1000000000"),
    (dict(nfe=(1, None, 1)), "Evaluations of student.*got nothing"),
    (dict(nfe=(1, 2.5, 1)), "got 2.5"),
    (dict(nfe=(1,)), "the evaluations of 3 rows, got 1"),
    (dict(seed=-1), "Seed: expected a whole number from 0 to 4,294,967,287, got -1"),
    (dict(seed=2**32), "Seed: .*got 4294967296"),
    (dict(seed=10**300), "Seed: .*got a number of more than 20 digits"),
    (dict(seed=None), "Seed: .*got nothing"),
    (dict(columns=10**6), "Seeds side by side: expected 1 to 32, got 1000000"),
    (dict(columns=0), "Seeds side by side"),
    (dict(temperature=-0.1), "Temperature: expected a number from 0 to 1"),
    (dict(temperature=float("nan")), "Temperature"),
    (dict(label=99), r"labels: expected classes in \[0, 10\), got \[99\]"),
    (dict(label="cat"), "there is no class 'cat'"),
    (dict(prompt="x" * 10**5), "Prompt: expected at most 2,000 letters, got 100,000"),
  ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused(studio, change, message):
  with pytest.raises(ValueError, match=message):
    studio.draw(dataclasses.replace(Wish(nfe=(1, 1, 1)), **change))


def test_a_column_that_was_not_drawn_has_no_way(studio):
  for column in (-1, 8):
    with pytest.raises(ValueError, match="column: expected one of the drawing"):
      studio.ways(Wish(nfe=(1, 1, 1)), column)


def test_few_programs_are_kept(studio, monkeypatch):
  monkeypatch.setattr(drawing, "KEPT", 3)
  monkeypatch.setattr(studio, "_programs", type(studio._programs)())
  wish = Wish(nfe=(1, 1, 2))
  studio.draw(wish)
  studio.ways(wish, 0)
  assert [key[:2] for key in studio._programs] == [(0, "way"), (1, "way"), (2, "way")]


def test_a_student_brings_its_teacher_and_an_export_has_none(student_run, loaded, tmp_path, caplog):
  teacher, student = loaded
  own = studio_of([student_run])
  assert [row.name for row in own.rows][::2] == ["teacher", "teacher, few steps"]
  drawn = own.draw(Wish(nfe=(2, 1, 1), seed=4))
  np.testing.assert_allclose(drawn[0].x0[0], teacher.sample(1, labels=[0], seed=4, nfe=2)[0], atol=1e-5)
  pf.convert(student_run, tmp_path / "torch")
  export = studio_of([tmp_path / "torch"])
  assert [row.name for row in export.rows] == ["torch"]
  assert "the teacher is not shown" in caplog.text
  x0 = export.draw(Wish(nfe=(1,), label=3, seed=2))[0].x0
  np.testing.assert_allclose(x0[0], student.sample(1, labels=[3], seed=2)[0], atol=1e-5)
  in_memory = studio_of([student, tmp_path / "torch", student_run])
  assert len({row.name for row in in_memory.rows}) == len(in_memory.rows) == 5


def test_points_have_their_ways(tmp_path):
  write_random(quick("checkerboard", "teacher"), tmp_path / "board")
  board = studio_of([tmp_path / "board"])
  assert board.has_points
  wish = Wish(nfe=(5,), seed=3, columns=1)
  (drawn,) = board.draw(wish)
  assert drawn.x0.shape == (drawing.POINTS, 2)
  (way,) = board.ways(wish, 100)
  assert way.states.shape == (6, drawing.WAYS, 2)
  np.testing.assert_allclose(way.states[-1, 0], drawn.x0[100], atol=1e-5)
  np.testing.assert_allclose(way.states[-1, 1:], drawn.x0[: drawing.WAYS - 1], atol=1e-5)


def tiny_autoencoder(folder, channels):
  """Folder of an autoencoder with random weights, which doubles the side."""
  sizes = dict(encoder_widths=(4, 4), encoder_depths=(1, 1), decoder_widths=(4, 4), decoder_depths=(1, 1))
  module = TinyAutoencoder(latent_channels=channels, **sizes)
  params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 2, 2, 3), np.float32))["params"]
  pf.Codec(module, params).save(folder)
  return folder


def test_prompts_are_embedded_and_latents_decoded(tmp_path, monkeypatch):
  def load_encoder(model, folder, *, max_length=None, dtype=None):
    return StubEncoder(model, 12)

  def emoji(*, split="train", size=32, embeddings=None):
    dataset = pf.data.from_arrays(np.zeros((3, 8, 8, 4)), texts=("a", "bb", "a cat"), name="emoji")
    return with_embeddings(dataset, embeddings)

  monkeypatch.setattr(text, "load_encoder", load_encoder)
  monkeypatch.setitem(registry._SOURCES, "emoji", functools.wraps(registry.emoji)(emoji))
  config = quick("emoji", "teacher")
  config.data = dict(name="emoji", embeddings=write_prompts(tmp_path / "prompts", "minilm", shape=None))
  config.sample.guidance = 2.0
  run = pf.load(write_random(config, tmp_path / "run"))
  studio = studio_of([run])
  wish = Wish(nfe=(2,), prompt="a cat", seed=6)
  (drawn,) = studio.draw(wish)
  assert drawn.evaluations == 4, "two a step: it is guided"
  own = run.pictures(["a cat"], seed=7, nfe=2)
  np.testing.assert_allclose(studio.pictures(drawn.x0)[1], own[0], atol=1e-4)
  assert studio.described(wish, [drawn])["prompt"] == "a cat"
  assert studio.pictures(drawn.x0).shape == (8, 8, 8, 3), "the first channels"
  decoded = studio_of([run], preview_autoencoder=tiny_autoencoder(tmp_path / "tiny", channels=4))
  assert decoded.pictures(drawn.x0).shape == (8, 16, 16, 3)
  with pytest.raises(ValueError, match="makes latents of 5 channels"):
    studio_of([run], preview_autoencoder=tiny_autoencoder(tmp_path / "other", channels=5))
  with pytest.raises(ValueError, match="Prompt: expected a text"):
    studio.draw(dataclasses.replace(wish, prompt=" "))


def test_runs_that_do_not_fit_together_are_refused(teacher_run, tmp_path):
  write_random(quick("checkerboard", "teacher"), tmp_path / "board")
  with pytest.raises(ValueError, match=r"runs on data of one kind, got shape \(8, 8, 1\).* \(2,\) \(board\)"):
    studio_of([teacher_run, tmp_path / "board"])
  with pytest.raises(ValueError, match=r"workdir: there is no folder .*/none"):
    studio_of([teacher_run, tmp_path / "none"])
  with pytest.raises(ValueError, match="workdir: expected at least one run"):
    studio_of([])
  with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
    studio_of([teacher_run], batch_size=0)


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  monkeypatch.setenv("GRADIO_TEMP_DIR", "nowhere")
  monkeypatch.delitem(sys.modules, "pflow_jax.page.layout", raising=False)
  with pytest.raises(ImportError, match=r"pip install 'pflow-jax\[demo\]'"):
    demo.open_page(["nowhere"])
