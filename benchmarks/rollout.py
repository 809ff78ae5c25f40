"""Speed and memory of a GMFlow rollout, forward and gradient, against direct transcriptions of the formula.

    python benchmarks/rollout.py

Every repeat runs all programs in turn, so that other load on the machine meets all of them alike; medians are compared.
The transcriptions broadcast (K, H, W, C) arrays: "release" line by line as the PyTorch release writes it, "formula" as
the paper's posterior mean, keeping an axis of one for the channels.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import GMFlowPolicy, rollout

EPS = 1e-6


def release_mean(means, logits, variance, nu, zeta):
  denominator = jnp.maximum(variance * zeta + 1, EPS)
  component_means = (variance * nu[None] + means) / denominator
  delta = jnp.sum(means * (nu[None] - 0.5 * zeta * means), -1, keepdims=True) / denominator
  return jnp.sum(component_means * jax.nn.softmax(logits + delta, 0), 0)


def formula_mean(means, logits, variance, nu, zeta):
  denominator = jnp.maximum(variance * zeta + 1, EPS)
  squares = jnp.sum(means**2, -1, keepdims=True)
  delta = (jnp.sum(means * nu[None], -1, keepdims=True) - 0.5 * zeta * squares) / denominator
  return (variance * nu + jnp.sum(jax.nn.softmax(logits + delta, 0) * means, 0)) / denominator


def transcribed(mean, substeps):
  """Euler rollout from t_s = 1 to 0 of one sample: (x_s, means, logits, log_std) -> x."""

  def roll(x_s, velocities, logits, log_std):
    means, variance = x_s[None] - velocities, jnp.exp(2 * log_std)
    logits = jax.nn.log_softmax(logits, 0)[..., None]

    def step(x, i):
      t = 1 - i / substeps
      rho = (1 - t) / t
      x0 = mean(means, logits, variance, rho * x / t, rho**2)
      return x - (x - x0) / t / substeps, None

    return jax.lax.scan(step, x_s, jnp.arange(substeps, dtype=jnp.float32))[0]

  return roll


def ours(method, substeps):
  def roll(x_s, velocities, logits, log_std):
    policy = GMFlowPolicy.create(x_s, 1.0, velocities, logits, log_std)
    return rollout(policy, x_s, 1.0, 0.0, method=method, substeps=substeps)

  return roll


def forward(roll):
  return jax.jit(jax.vmap(roll))


def gradient(roll):
  """With respect to the network's outputs."""
  return jax.jit(jax.grad(lambda *a: jnp.sum(jax.vmap(roll)(*a) ** 2), argnums=(1, 2, 3)))


def interleaved(programs, arguments, repeats):
  """Median and smallest seconds of every program."""
  for program in programs.values():
    jax.block_until_ready(program(*arguments))
  seconds = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*arguments))
      seconds[name].append(time.perf_counter() - start)
  return {name: (float(np.median(s)), min(s)) for name, s in seconds.items()}


def report(title, seconds):
  print(f"\n{title:34s} {'median s':>10s} {'best s':>10s} {'x slower than euler':>21s}")
  for name, (median, best) in seconds.items():
    ratio, best_ratio = median / seconds["euler"][0], best / seconds["euler"][1]
    print(f"{name:34s} {median:10.4f} {best:10.4f} {ratio:12.2f} ({best_ratio:.2f})")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--components", type=int, default=32)
  parser.add_argument("--channels", type=int, default=4)
  parser.add_argument("--size", type=int, default=32)
  parser.add_argument("--substeps", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=9)
  args = parser.parse_args()

  space = (args.batch, args.size, args.size, args.channels)
  normal = np.random.default_rng(0).normal
  shapes = (space, (args.batch, args.components, *space[1:]), (args.batch, args.components, *space[1:-1]))
  arguments = [jnp.asarray(normal(size=shape), jnp.float32) for shape in shapes]
  arguments.append(jnp.full(args.batch, np.log(0.1), jnp.float32))
  print(f"{jax.devices()[0].device_kind}, {vars(args)}")

  rolls = {
    "euler": ours("euler", args.substeps),
    "auto": ours("auto", args.substeps),
    "transcribed formula": transcribed(formula_mean, args.substeps),
    "transcribed release": transcribed(release_mean, args.substeps),
  }
  ends = {name: forward(roll)(*arguments) for name, roll in rolls.items()}
  for name in ("transcribed formula", "transcribed release"):
    print(
      f"rms difference between euler and {name}: {float(jnp.sqrt(jnp.mean((ends[name] - ends['euler']) ** 2))):.1e}"
    )
  report("forward", interleaved({n: forward(r) for n, r in rolls.items()}, arguments, args.repeats))
  report("gradient", interleaved({n: gradient(r) for n, r in rolls.items()}, arguments, max(args.repeats // 3, 1)))

  state = arguments[0].nbytes / 2**20
  print(f"\ntemporary memory of the gradient, MiB (one state is {state:.2f} MiB)")
  print(f"{'substeps':>10s} {'euler':>10s} {'less states':>12s} {'auto':>10s} {'transcribed':>12s}")
  for n in (32, 64, 128, 256):
    sizes = []
    for roll in (ours("euler", n), ours("auto", n), transcribed(formula_mean, n)):
      analysis = gradient(roll).lower(*arguments).compile().memory_analysis()
      sizes.append(analysis.temp_size_in_bytes / 2**20)
    print(f"{n:10d} {sizes[0]:10.1f} {sizes[0] - n * state:12.1f} {sizes[1]:10.1f} {sizes[2]:12.1f}")


if __name__ == "__main__":
  main()
