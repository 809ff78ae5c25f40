"""Growth of a uniform error with the number of steps: a consistency model's grows, a flow map's does not.

The data are a Gaussian, on which every number is known in closed form.

    python benchmarks/consistency_steps.py [--plot docs/images/consistency_steps.png]

Data N(0, c^2) with c = 0.5; the exact jump from t to u multiplies x by S(u) / S(t), S(t)^2 = t^2 + (1 - t)^2 c^2. Two
models are wrong by 2 %: a consistency model in its output, 1.02 x S(0) / S(t), and a flow map in its displacement,
x + 1.02 (u - t) F. The error is the standard deviation of the samples of n even steps, less c. It is known in closed
form (lines); the points are `sample_flow_map`'s samples, compared to the exact map's from the same noise.

Absolute error after 1, 4, 16, 64 steps: consistency model 0.010, 0.019, 0.048, 0.137; flow map 0.010, 0.008, 0.007,
0.007. 2 % of a short jump is little: the flow map's error tends to c - c^1.02. The consistency model adds its 2 % anew
in every step, and only the noise that renews the state washes it out: the error grows as n^(2/3) while it is small.

A consistency model has no jump short enough to be right, so the kind of its error is part of the reason. A flow map
that is sampled like one (gamma = 1) gets worse as well, more slowly (n^(1/3) in the end): its signed error is -0.010,
-0.001, 0.003, 0.009, and 0.032 after 1,024 steps.
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import sample_flow_map
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.figures.canvas import drawing
from pflow_jax.evaluation.figures.palette import GRID, styles

SPREAD, ERROR = 0.5, 0.02
STEPS = (1, 2, 4, 8, 16, 32, 64)


def exact(t, u):
  """Factor on x of the exact jump from t to u."""
  return ((u**2 + ((1 - u) * SPREAD) ** 2) / (t**2 + ((1 - t) * SPREAD) ** 2)) ** 0.5


def consistency(t, u):
  return (1 + ERROR) * exact(t, u)


def flow_map(t, u):
  return 1 + (1 + ERROR) * (exact(t, u) - 1)


def closed_form(factor, steps, gamma):
  """Error of the standard deviation after `steps`, with jumps that multiply x by factor(t, u)."""
  variance = 1.0
  for t, s in itertools.pairwise(np.linspace(1, 0, steps + 1)):
    # In x / (1 - t) the noise has the deviation t / (1 - t), of which a share sqrt(1 - gamma^2) is kept.
    kept = np.sqrt(1 - gamma**2) * s
    u = kept / (kept + 1 - s)
    variance = variance * factor(t, u) ** 2 * ((1 - s) / (1 - u)) ** 2 + (gamma * s) ** 2
  return np.sqrt(variance) - SPREAD


def sampled(factor, steps, gamma, count=2**17, width=256):
  """The same error, of `count` samples of `sample_flow_map` against the exact map's from the same noise."""
  noise = jax.random.normal(jax.random.key(0), (count // width, width))
  keys = jax.random.split(jax.random.key(1), len(noise))

  def deviation(factor):
    def average_velocity(x, t, s, cond):
      t, s = t[0], s[0]  # a step has one time for all samples
      return x * (1 - factor(t, s)) / (t - s)

    grid = np.linspace(1, 0, steps + 1).tolist()
    return float(jnp.std(sample_flow_map(average_velocity, noise, None, keys, grid=grid, gamma=gamma)))

  return deviation(factor) - deviation(exact)


def draw(curves, points):
  everywhere = np.arange(1, STEPS[-1] + 1)
  with drawing(6.4, 4.2) as figure:
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axis = figure.add_subplot()
    for name, place, label in (
      ("consistency 1", "consistency", "consistency model, output 2 % too large"),
      ("flow map 0", "AYF-EMD", "flow map, displacement 2 % too large"),
    ):
      look = styles([place])[place]
      axis.plot(everywhere, np.abs(curves[name]), color=look["color"], lw=1.6, label=label)
      axis.plot(STEPS, np.abs(points[name]), ls="", **look)
    axis.set(yscale="log", ylabel="|error| of the standard deviation (lower is better)", ylim=(0.004, 0.25))
    axis.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2], ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"])
    axis.set(xscale="log", xlabel="steps")
    axis.set_xticks(STEPS, [str(n) for n in STEPS])
    axis.minorticks_off()
    axis.grid(True, which="major", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left")
    axis.set_title(f"data N(0, {SPREAD}²); lines: closed form, points: sampled", loc="left")
  return figure


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--plot", default="docs/images/consistency_steps.png")
  args = parser.parse_args()
  models = {"consistency 1": (consistency, 1.0)} | {f"flow map {g:g}": (flow_map, g) for g in (0.0, 0.5, 1.0)}
  curves, points = {}, {}
  print(f"error of the standard deviation, closed form / sampled\n{'model, gamma':>16s}", end="")
  print("".join(f"{n:>19d}" for n in STEPS))
  for name, (factor, gamma) in models.items():
    curves[name] = np.array([closed_form(factor, n, gamma) for n in range(1, STEPS[-1] + 1)])
    points[name] = np.array([sampled(factor, n, gamma) for n in STEPS])
    cells = [f"{curves[name][n - 1]:9.4f} /{p:8.4f}" for n, p in zip(STEPS, points[name], strict=True)]
    print(f"{name:>16s}" + "".join(cells), flush=True)
  figures.save(draw(curves, points), args.plot)
  print(f"\nwrote {args.plot}")


if __name__ == "__main__":
  main()
