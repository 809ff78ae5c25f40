"""The computations of the page: samples of all rows from the same noise, their times, and their ways from noise."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import data
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.text_to_image import ask, family_of
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.files.foreign import shown
from pflow_jax.mesh.sharding import to_host
from pflow_jax.page.rows import Program, Row
from pflow_jax.training.sample import draw_noise, sample_keys

MAX_NFE = 1000  # of a row
MAX_SEED = 2**32 - 2  # JAX takes 32 bits, and a sample's keys come from the next seed
MAX_PROMPT = 2000  # letters
MOST = 4  # batches of a row
LONG_ENOUGH, MOST_RUNS = 0.1, 15  # seconds of runs that time a fast program, and their number
KEPT = 64  # compiled programs; the one that was used longest ago goes first
POINTS, WAYS = 2048, 48  # points of a panel, and those whose ways are drawn


@dataclasses.dataclass(frozen=True)
class Wish:
  """Settings of a drawing.

  Attributes:
    nfe: network evaluations of every row.
    label: class by number or name; None for each in turn.
    prompt: of a run on texts.
    seed: of the first column; column i has seed + i. Points have this one alone.
    columns: pictures of a row.
    temperature: of policies; None for that of each run.
  """

  nfe: tuple[int, ...]
  label: int | str | None = None
  prompt: str = ""
  seed: int = 0
  columns: int = 8
  temperature: float | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Samples of a row.

  Attributes:
    x0: (columns, *space, C); (POINTS, 2) for points.
    evaluations: of the network for a sample.
    seconds: a sample, without compilation; the median of several runs of fast programs.
    batch_size: samples at a time.
    compiled: seconds of the compilation, 0 where the program was there.
  """

  x0: np.ndarray
  evaluations: int
  seconds: float
  batch_size: int
  compiled: float


@dataclasses.dataclass(frozen=True)
class Way:
  """States of some samples from noise to data.

  Attributes:
    times: flow times (steps + 1,).
    states: (steps + 1, n, *space, C).
    nfe: network evaluations, each of as many steps.
  """

  times: np.ndarray
  states: np.ndarray
  nfe: int


class Studio:
  """The rows of a page. Calls from several threads wait for each other, so that each is timed alone.

  Args:
    rows: the models, on data of one shape and with the same conditions.
    batch_size: samples at a time; programs are compiled for it alone.
    pipeline: folder of a published model, for the text encoders of a run on prompts.
    autoencoder: folder of the autoencoder that shows latents as pictures; by default that of the pipeline or the data.

  Raises:
    ValueError: the rows do not fit together, or the autoencoder does not fit them.
  """

  def __init__(
    self,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    pipeline: str | os.PathLike | None = None,
    autoencoder: str | os.PathLike | None = None,
  ):
    self.rows, self.batch_size, self._pipeline, self._autoencoder = tuple(rows), batch_size, pipeline, autoencoder
    first, *others = rows
    for other in others:
      for name, (mine, its) in _told_apart(first.dataset, other.dataset).items():
        if mine != its:
          raise ValueError(
            f"workdir: expected runs on data of one kind, got {name} {mine} ({first.name}) and {its} ({other.name}); "
            "open a page for each"
          )
    self._programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    self._encoders: dict[str, Any] = {}
    self._lock = threading.Lock()
    if self.has_prompts:
      family = family_of(rows[0].settings)  # raises where nothing embeds texts
      if family.autoencoder is not None and pipeline is None:
        raise ValueError("pipeline: expected the folder of the published model, for its text encoders and autoencoder")
      if family.autoencoder is not None and autoencoder is None:
        self._autoencoder = pipeline
    if self._autoencoder is not None:
      codec_of(self.dataset)  # raises where it does not fit

  @property
  def dataset(self) -> data.Dataset:
    """Shapes and names of the data of all rows."""
    one = next((row.dataset for row in self.rows if row.dataset.class_names), self.rows[0].dataset)
    own = self._autoencoder
    return one if own is None else dataclasses.replace(one, autoencoder=os.fspath(own))

  @property
  def has_prompts(self) -> bool:
    """Returns whether the rows are conditioned on texts."""
    return self.dataset.embedding is not None

  @property
  def has_points(self) -> bool:
    """Returns whether samples are points of the plane, not pictures."""
    return self.dataset.shape == (2,)

  @property
  def nfe(self) -> tuple[int, ...]:
    """Network evaluations of the rows to begin with."""
    return tuple(row.nfe for row in self.rows)

  def draw(self, wish: Wish) -> list[Drawn]:
    """Draws the samples of every row; column i of all rows starts from the same noise.

    A picture depends on its seed, its class or prompt and its row alone: `pflow sample --num 1` draws the same.

    Raises:
      ValueError: a wish that cannot be fulfilled.
    """
    self.check(wish)
    with self._lock:
      dataset, noise, cond, keys = self._start(wish, range(wish.columns))
      return [self._draw_row(i, wish, dataset, noise, cond, keys) for i in range(len(self.rows))]

  def ways(self, wish: Wish, column: int) -> list[Way]:
    """Draws the way of a column's sample in every row; of points, `column` is one of POINTS and others follow it.

    Args:
      wish: that of a drawing.
      column: of it.

    Raises:
      ValueError: a wish that cannot be fulfilled.
    """
    self.check(wish)
    if not 0 <= column < (POINTS if self.has_points else wish.columns):
      raise ValueError(f"column: expected one of the drawing, got {column}")
    with self._lock:
      if self.has_points:
        dataset, *whole = self._start(wish, range(1))
        chosen = np.r_[column, np.delete(np.arange(POINTS), column)[: WAYS - 1]]
        noise, cond = jax.tree.map(lambda a: a[chosen], whole[:2])
      else:
        dataset, noise, cond, _ = self._start(wish, range(column, column + 1))
      return [self._way(i, wish, dataset, noise, cond) for i in range(len(self.rows))]

  def described(self, wish: Wish, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """Describes a drawing in plain JSON, so that it can be made again."""
    names, label = self.dataset.class_names, wish.label
    count = 1 if self.has_points else wish.columns
    told: dict[str, Any] = {"seeds": [wish.seed + i for i in range(count)], "temperature": wish.temperature}
    if self.has_prompts:
      told["prompt"] = wish.prompt
    elif self.dataset.num_classes:
      told["class"] = names[label] if names and isinstance(label, int) else label
    rows = zip(self.rows, wish.nfe, drawn, strict=True)
    told["rows"] = [
      {"name": row.name, "nfe": nfe, "evaluations": one.evaluations, "seconds_a_sample": float(f"{one.seconds:.4g}")}
      for row, nfe, one in rows
    ]
    return told

  def pictures(self, x0: np.ndarray) -> np.ndarray:
    """Turns samples (n, h, w, c) into pictures (n, H, W, 1 or 3) in about [-1, 1]."""
    return as_pictures(self.dataset, x0)

  def check(self, wish: Wish) -> None:
    """Raises ValueError for a wish that cannot be fulfilled."""
    if len(wish.nfe) != len(self.rows):
      raise ValueError(f"expected the evaluations of {len(self.rows)} rows, got {len(wish.nfe)}")
    for row, nfe in zip(self.rows, wish.nfe, strict=True):
      if not _is_whole(nfe) or not 1 <= nfe <= MAX_NFE:
        raise ValueError(f"Evaluations of {row.name}: expected a whole number from 1 to {MAX_NFE:,}, got {_said(nfe)}")
    if not _is_whole(wish.columns) or not 1 <= wish.columns <= MOST * self.batch_size:
      raise ValueError(f"Seeds side by side: expected 1 to {MOST * self.batch_size}, got {wish.columns}")
    most = MAX_SEED + 1 - wish.columns
    if not _is_whole(wish.seed) or not 0 <= wish.seed <= most:
      raise ValueError(f"Seed: expected a whole number from 0 to {most:,}, got {_said(wish.seed)}")
    if wish.temperature is not None and not 0 <= wish.temperature <= 1:
      raise ValueError(f"Temperature: expected a number from 0 to 1, got {wish.temperature}")
    if self.has_prompts and not wish.prompt.strip():
      raise ValueError("Prompt: expected a text, got nothing")
    if len(wish.prompt) > MAX_PROMPT:
      raise ValueError(f"Prompt: expected at most {MAX_PROMPT:,} letters, got {len(wish.prompt):,}")

  def _start(self, wish: Wish, columns: range) -> tuple[data.Dataset, np.ndarray, Any, jax.Array]:
    """Returns the data, and noise, conditions and keys of columns."""
    labels = None if wish.label is None else [wish.label]
    if self.has_points:
      return self.dataset, *draw_noise(self.dataset, POINTS, wish.seed, labels), sample_keys(POINTS, wish.seed)
    seeds = [wish.seed + i for i in columns]
    keys = jnp.concatenate([sample_keys(1, seed) for seed in seeds])
    if not self.has_prompts:
      one = lambda i, seed: draw_noise(self.dataset, 1, seed, labels or [i % max(self.dataset.num_classes, 1)])
      drawn = [one(i, seed) for i, seed in zip(columns, seeds, strict=True)]
      return self.dataset, *jax.tree.map(lambda *parts: np.concatenate(parts), *drawn), keys
    settings = self.rows[0].settings
    # Of some guidance, whichever: it asks for the empty prompt too.
    guided = dataclasses.replace(settings, sample=dataclasses.replace(settings.sample, guidance=1.0))
    asked = ask(guided, [wish.prompt], self._pipeline, kept=self._encoders)
    dataset = asked.dataset or self.dataset
    assert dataset.embedding is not None
    dataset = dataclasses.replace(dataset, embedding=dataclasses.replace(dataset.embedding, null=asked.null))
    first = lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), (1, *dataset.shape))
    noise = np.concatenate([np.asarray(first(seed), np.float32) for seed in seeds])
    return dataset, noise, jax.tree.map(lambda a: np.repeat(a, len(seeds), axis=0), asked.cond), keys

  def _draw_row(self, index: int, wish: Wish, dataset, noise, cond, keys) -> Drawn:
    row, nfe = self.rows[index], wish.nfe[index]
    size = self._rounded(row, POINTS if self.has_points else self.batch_size)
    temperature, compiled = self._temperature(row, wish, nfe), 0.0
    parts: list[np.ndarray] = []
    seconds: list[float] = []
    with row.layout.context():
      for start in range(0, len(noise), size):
        rows = np.arange(start, start + size) % len(noise)  # the last batch wraps and is cut
        part = jax.tree.map(lambda a, rows=rows: row.layout.spread(a[rows]), (noise, cond, keys))
        arguments = (row.params, *part, temperature)
        program, took = self._compiled((index, "draw", nfe), lambda: row.sampler(dataset, nfe), arguments)
        if took:  # the first call of a program is slower than the others
          compiled = took
          jax.block_until_ready(program(*arguments))
        x0, took = _timed(program, arguments)
        seconds.append(took)
        parts.append(to_host(x0))
      while sum(seconds) < LONG_ENOUGH and len(seconds) < MOST_RUNS:
        seconds.append(_timed(program, arguments)[1])
    took = float(np.median(seconds)) / size
    return Drawn(np.concatenate(parts)[: len(noise)], nfe * row.branches, took, size, compiled)

  def _way(self, index: int, wish: Wish, dataset, noise, cond) -> Way:
    row, nfe, count = self.rows[index], wish.nfe[index], len(noise)
    rows = np.arange(self._rounded(row, count)) % count
    with row.layout.context():
      part = jax.tree.map(lambda a: row.layout.spread(a[rows]), (noise, cond))
      arguments = (row.params, *part, self._temperature(row, wish, nfe))
      program, _ = self._compiled((index, "way", nfe), lambda: row.walk(dataset, nfe), arguments)
      states = to_host(program(*arguments))[:, :count]
    return Way(row.times(nfe, len(states) - 1), states, nfe)

  def _temperature(self, row: Row, wish: Wish, nfe: int) -> np.ndarray:
    own = row.settings.sample.temperature_at(nfe)
    return np.asarray(own if wish.temperature is None else wish.temperature, np.float32)

  def _rounded(self, row: Row, size: int) -> int:
    """Returns a size of batches that the devices split evenly."""
    return -(-size // row.layout.batch_parts) * row.layout.batch_parts

  def _compiled(self, key, make, arguments) -> tuple[Any, float]:
    """Returns the compiled program of a key and of shapes, and the seconds that it took; 0 where it was there."""
    key = (*key, *(leaf.shape for leaf in jax.tree.leaves(arguments[1:])))
    took = 0.0
    if key not in self._programs:
      begin = time.perf_counter()
      self._programs[key] = jax.jit(make()).lower(*arguments).compile()
      took = time.perf_counter() - begin
      if len(self._programs) > KEPT:
        self._programs.popitem(last=False)
    self._programs.move_to_end(key)
    return self._programs[key], took


def _told_apart(one: data.Dataset, other: data.Dataset) -> dict[str, tuple[Any, Any]]:
  """Returns what must be the same of the data of two rows."""
  pair = (one, other)
  found = {name: tuple(getattr(d, name) for d in pair) for name in ("shape", "num_classes")}
  return found | {"conditions": tuple(jax.tree.map(lambda a: a.shape, d.cond_shapes(1)) for d in pair)}  # type: ignore[return-value]


def _timed(program: Program, arguments: tuple[Any, ...]) -> tuple[Any, float]:
  begin = time.perf_counter()
  return jax.block_until_ready(program(*arguments)), time.perf_counter() - begin


def _said(value: Any) -> str:
  return "nothing" if value is None else shown(value, 20)


def _is_whole(number: Any) -> bool:
  return isinstance(number, (int, np.integer)) and not isinstance(number, bool)
