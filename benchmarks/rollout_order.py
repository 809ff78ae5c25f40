"""Work and precision of the rollout methods on random GMFlow policies, in float64.

    python benchmarks/rollout_order.py [--plot docs/images/work_precision.png]

It prints the error against evaluations of the policy with the measured order of convergence, and draws it. Then it
compares "auto" to 128 Euler substeps for several choices of the substeps that one of its steps stands for, over
segments and over the few substeps of a window.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from pflow_jax import GMFlowPolicy, rollout, segment_grid, shift_time  # noqa: E402
from pflow_jax.core.rollout import SAVING  # noqa: E402
from pflow_jax.evaluation import figures  # noqa: E402
from pflow_jax.evaluation.figures.canvas import drawing  # noqa: E402
from pflow_jax.evaluation.figures.palette import COLOURS, GRID, MUTED  # noqa: E402

STDS, SHIFTS = (0.05, 0.1, 0.3), (1.0, 3.2)
EVALUATIONS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
METHODS = {"euler": "Euler", "ab2": "two-step, order 2", "auto": "three-step, order 3 (auto)"}
COLORS = {"euler": MUTED, "ab2": COLOURS[4], "auto": COLOURS[0]}


def random_policies(seed, count, t_s, std, k=8, space=(64,), c=4):
  """Draws states (count, *space, c) at t_s and mixtures over them, with clean samples as far apart as t_s allows."""
  normal = np.random.default_rng(seed).normal
  centre = (1 - t_s) * normal(size=(count, *space, c))
  x = centre + t_s * normal(size=centre.shape)
  x0 = centre[:, None] + t_s * normal(size=(count, k, *space, c))
  velocities, logits = (x[:, None] - x0) / t_s, normal(size=(count, k, *space))
  return x, jax.vmap(GMFlowPolicy.create, in_axes=(0, None, 0, 0, None))(x, t_s, velocities, logits, np.log(std))


@functools.partial(jax.jit, static_argnames=("method", "substeps", "max_length"))
def roll(policy, x, r_start, r_end, shift, **options):
  return jax.vmap(lambda p, x: rollout(p, x, r_start, r_end, shift=shift, **options))(policy, x)


def errors(policy, x, r_start, r_end, shift):
  """Returns (method, substeps) -> RMS error of every policy, against thousands of steps of the best method."""
  length = float(r_start - r_end)
  run = functools.partial(roll, policy, x, r_start, r_end, shift, max_length=length)
  exact = run(method="auto", substeps=12_000)
  return lambda method, n: np.asarray(jnp.sqrt(jnp.mean((run(method=method, substeps=n) - exact) ** 2, (1, 2))))


def substeps_for(method, evaluations):
  """`substeps` of a rollout over [1, 0] that costs `evaluations`; multistep methods need one more to start."""
  return {"euler": evaluations, "ab2": evaluations - 1, "auto": (evaluations - 1) * SAVING}[method]


def work_precision(count):
  """Median error over whole rollouts, {(shift, std, method): one for each of EVALUATIONS}, printed with its slope."""
  curves = {}
  print(f"median RMS error at the data, over {count} policies\n{'evaluations':>32s}", end="")
  print("".join(f"{n:9d}" for n in EVALUATIONS), "    order")
  for shift in SHIFTS:
    for std in STDS:
      x, policy = random_policies(0, count, 1.0, std)
      error = errors(policy, x, 1.0, 0.0, shift)
      for method in METHODS:
        curve = [float(np.median(error(method, substeps_for(method, n)))) for n in EVALUATIONS]
        slope = -np.polyfit(np.log(EVALUATIONS[-4:]), np.log(curve[-4:]), 1)[0]
        curves[shift, std, method] = curve
        label = f"shift {shift}  std {std:<4}  {method}"
        print(f"{label:>32s}" + "".join(f"{e:9.1e}" for e in curve) + f"{slope:9.2f}", flush=True)
  return curves


def compare_savings(count, savings=(2, 3, 4, 6)):
  """Error of the third-order scheme relative to 128 Euler substeps, at 128 / saving steps a unit of schedule time."""
  print(f"\nerror relative to Euler's with 128 substeps, over segments; {count} policies of each std {STDS}")
  print("each entry: pooled RMS / median / share of policies with the smaller error")
  print(f"{'segment':>26s}" + "".join(f"{f'128 / {s} steps':>22s}" for s in savings))
  for shift in SHIFTS:
    for nfe in (1, 2, 4):
      grid = segment_grid(nfe)
      for i in sorted({0, nfe - 1}):
        t_s = float(shift_time(grid[i], shift))
        euler, auto = [], {s: [] for s in savings}
        for seed, std in enumerate(STDS):
          x, policy = random_policies(10 + seed, count, t_s, std)
          error = errors(policy, x, grid[i], grid[i + 1], shift)
          euler.append(error("euler", 128))
          for s in savings:
            auto[s].append(error("auto", round(128 * SAVING / s)))
        euler = np.concatenate(euler)
        cells = []
        for s in savings:
          mine = np.concatenate(auto[s])
          pooled = np.sqrt(np.mean(mine**2) / np.mean(euler**2))
          cells.append(f"{pooled:.2f} / {np.median(mine / euler):.3f} / {np.mean(mine <= euler):4.0%}")
        print(f"{f'shift {shift}  nfe {nfe}  no. {i + 1}':>26s}" + "".join(f"{c:>22s}" for c in cells), flush=True)


def compare_short(count, lengths=(2, 3, 4, 6, 8, 12, 18)):
  """Error of "auto" relative to Euler's over a few substeps of 128, from anywhere on a policy's own trajectory."""
  print(f"\nerror of auto relative to Euler's over a few substeps; {count} policies of each std {STDS}")
  print(f"{'substeps':>26s}{'pooled RMS / median / share of policies with the smaller error':>70s}")
  uniform = np.random.default_rng(0).uniform
  for substeps in lengths:
    length, euler, auto = substeps / 128, [], []
    for shift, nfe, (seed, std) in itertools.product(SHIFTS, (1, 4), enumerate(STDS)):
      grid = segment_grid(nfe)
      for i in sorted({0, nfe - 1}):
        x, policy = random_policies(20 + seed, count, float(shift_time(grid[i], shift)), std)
        r = float(grid[i] - uniform() * (grid[i] - grid[i + 1] - length))
        x = roll(policy, x, grid[i], r, shift, method="auto", substeps=1200, max_length=1.0)
        error = errors(policy, x, r, max(r - length, 0.0), shift)
        euler.append(error("euler", 128))
        auto.append(error("auto", 128))
    mine, theirs = np.concatenate(auto), np.concatenate(euler)
    pooled = np.sqrt(np.mean(mine**2) / np.mean(theirs**2))
    cell = f"{pooled:.2f} / {np.median(mine / theirs):.3f} / {np.mean(mine <= theirs):4.0%}"
    print(f"{substeps:26d}{cell:>70s}", flush=True)


def draw(curves):
  with drawing(10.5, 6.2) as figure:
    _draw(figure, curves)
  return figure


def _draw(figure, curves):
  axes = figure.subplots(len(SHIFTS), len(STDS), sharex=True, sharey=True)
  for row, shift in zip(axes, SHIFTS, strict=True):
    for axis, std in zip(row, STDS, strict=True):
      for method, label in METHODS.items():
        curve = curves[shift, std, method]
        axis.loglog(EVALUATIONS, curve, color=COLORS[method], marker="o", markersize=3.5, linewidth=1.6, label=label)
      euler = curves[shift, std, "euler"][EVALUATIONS.index(128)]
      axis.axhline(euler, color=COLORS["euler"], linestyle=":", linewidth=1)
      axis.plot(128, euler, marker="o", markersize=9, markerfacecolor="none", color=COLORS["euler"])
      default = 1 + int(np.ceil(128 / SAVING))
      at = np.exp(np.interp(np.log(default), np.log(EVALUATIONS), np.log(curves[shift, std, "auto"])))
      axis.plot(default, at, marker="o", markersize=9, markerfacecolor="none", color=COLORS["auto"])
      axis.set_title(f"shift {shift:g}, component std {std:g}", fontsize=10)
      axis.grid(True, which="major", color=GRID, linewidth=0.7)
      axis.set_axisbelow(True)
      axis.spines[["top", "right"]].set_visible(False)
      axis.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
      axis.minorticks_off()
  for axis in axes[-1]:
    axis.set_xlabel("evaluations of the policy")
  for axis in axes[:, 0]:
    axis.set_ylabel("RMS error at t = 0 (lower is better)")
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False)
  figure.text(
    0.5, 0.008, 'rings: 128 Euler substeps, and what method="auto" takes in their place', ha="center", fontsize=9
  )
  figure.tight_layout(rect=(0, 0.025, 1, 0.95))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--plot", default="docs/images/work_precision.png")
  parser.add_argument("--policies", type=int, default=32)
  args = parser.parse_args()
  figures.save(draw(work_precision(args.policies)), args.plot)
  print(f"\nwrote {args.plot}")
  compare_savings(args.policies)
  compare_short(args.policies)


if __name__ == "__main__":
  main()
