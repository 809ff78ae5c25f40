"""Speed and memory of a GMFlow rollout, forward and gradient, against transcriptions and the PyTorch release itself.

    python benchmarks/rollout.py
    taskset -c 0 python benchmarks/rollout.py --release LakonLab     # a checkout of LakonLab 0.2 or later; needs torch

Every repeat runs all programs in turn, so that other load on the machine affects all of them alike; ratios are taken
within a repeat, of wall seconds and of processor seconds. The transcriptions broadcast (K, H, W, C) arrays: "release"
line by line like the PyTorch release, "formula" as the paper's posterior mean, keeping an axis of one for the channels.
With --release the release's own code is imported from there and timed with one thread.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
import unittest.mock

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
  """Returns the gradient of a rollout with respect to the network's outputs."""
  return jax.jit(jax.grad(lambda *a: jnp.sum(jax.vmap(roll)(*a) ** 2), argnums=(1, 2, 3)))


def load_release(folder):
  """Imports (GMFlowPolicy, torch) from a LakonLab checkout, without the packages that its policies do not need."""
  import torch

  torch.set_num_threads(1)
  for name in ("lakonlab", "lakonlab.models", "lakonlab.models.diffusions", "lakonlab.ops", "lakonlab.ops.gmflow_ops"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{folder}/{name.replace('.', '/')}"]
  sys.modules["lakonlab.models.diffusions"].GaussianFlow = object
  absent = "mmcv", "lakonlab.models.builder", "lakonlab.models.architectures", "lakonlab.models.architectures.utils"
  sys.modules |= {name: unittest.mock.MagicMock() for name in (*absent, "lakonlab.models.diffusions.schedulers")}
  return importlib.import_module("lakonlab.models.diffusions.piflow_policies").GMFlowPolicy, torch


def released(folder, substeps, arguments):
  """The release's rollouts of `arguments`, forward and gradient, as functions that ignore their arguments."""
  policy_class, torch = load_release(folder)
  x_s, means, logits, log_std = (torch.from_numpy(np.array(a)) for a in arguments)
  x_s, means = x_s.movedim(-1, 1).contiguous(), means.movedim(-1, 2).contiguous()
  logits, log_std = logits[:, :, None], log_std.reshape(-1, 1, 1, 1, 1)
  outputs = means, logits, log_std
  r = torch.ones(len(x_s))
  t = r.reshape(-1, 1, 1, 1)
  sampler = types.SimpleNamespace(num_timesteps=1, warp_t=lambda r, seq_len=None: r)

  def roll(means, logits, log_std):
    policy = policy_class(dict(means=means, logweights=logits.log_softmax(1), logstds=log_std), x_s, t)
    return policy.integrate(x_s, t, r, 0 * r, sampler, total_substeps=substeps)[0]

  def forward(*_):
    with torch.no_grad():
      return roll(*outputs).movedim(1, -1).numpy()

  def gradient(*_):
    leaves = [a.clone().requires_grad_() for a in outputs]
    (roll(*leaves) ** 2).sum().backward()  # torch.autograd.grad does not go through its checkpoints
    return [leaf.grad.numpy() for leaf in leaves]

  return forward, gradient


def interleaved(programs, arguments, repeats):
  """Measures wall and processor seconds (repeats, 2) of every program."""
  for program in programs.values():
    jax.block_until_ready(program(*arguments))
  seconds = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      start = time.perf_counter(), time.process_time()
      jax.block_until_ready(program(*arguments))
      seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
  return {name: np.array(s) for name, s in seconds.items()}


def report(title, seconds):
  """Prints medians, and the median ratio within a repeat with the smallest and the largest."""
  columns = "median s", "best s", "x slower than euler", "in CPU s"
  print(f"\n{title:24s}" + "".join(f"{c:>{w}s}" for c, w in zip(columns, (10, 10, 26, 26), strict=True)))
  for name, own in seconds.items():
    ratios = [f"{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for r in (own / seconds["euler"]).T]
    print(f"{name:24s}{np.median(own[:, 0]):10.4f}{own[:, 0].min():10.4f}" + "".join(f"{r:>26s}" for r in ratios))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--components", type=int, default=32)
  parser.add_argument("--channels", type=int, default=4)
  parser.add_argument("--size", type=int, default=32)
  parser.add_argument("--substeps", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--release", help="folder of a LakonLab checkout, to be timed too")
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
  forwards, gradients = ({name: f(roll) for name, roll in rolls.items()} for f in (forward, gradient))
  if args.release:
    forwards["release"], gradients["release"] = released(args.release, args.substeps, arguments)
  euler = forwards["euler"](*arguments)
  for name in [name for name in forwards if name not in ("euler", "auto")]:
    error = np.sqrt(np.mean((np.asarray(forwards[name](*arguments)) - euler) ** 2))
    print(f"rms difference between euler and {name}: {error:.1e}")
  report("forward", interleaved(forwards, arguments, args.repeats))
  report("gradient", interleaved(gradients, arguments, max(args.repeats // 3, 1)))

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
