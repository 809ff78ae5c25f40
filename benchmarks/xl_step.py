"""Steps of DiT-XL/2 on an accelerator: their rate against the chip's, the share of the policy, and the sampling rate.

    python benchmarks/xl_step.py [--batch 16] [--minutes 9]
    python benchmarks/xl_step.py --variant gmrepa_1nfe --attention pallas --remat layers --residual_dtype bfloat16

It trains variants of configs/imagenet.py (bfloat16, float32 masters, 32 x 32 x 4 latents; π-ID with K = 32, M = 2 and a
guided teacher, and AYF-EMD) from random weights on random latents, over all devices; `--batch` is of one device.
Without flags these are π-ID by every attention that the devices have and AYF-EMD, which needs a forward derivative, by
XLA's; after `--minutes` no more are begun. It prints once

* the matrix rate: the chip's on bfloat16 products of 8192 x 8192, the best of a few,

and of every run

* the step: median seconds, operations (counted in the jaxpr, remat's recomputation included) a second of one device,
  and their ratio to the matrix rate. The goal is 50 %;
* the same without remat's recomputation, the model FLOP utilisation;
* of π-ID the policy alone: the gradient of the same loss in the student's outputs, with networks that cost nothing, as
  a share of the step. The goal is 1 %;
* of π-ID the sampling of the student: latents a second of all devices, as an evaluation draws them.

`--quick` shrinks all of it to run anywhere, and its numbers mean nothing. One GPU of 80 GiB takes --batch 32.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.batches import per_example
from pflow_jax.core.objectives.imitation import imitation_loss
from pflow_jax.core.policies import GMFlowPolicy
from pflow_jax.networks.attention import IMPLEMENTATIONS, PLATFORMS, supports_jvp
from pflow_jax.networks.layers import REMAT_POLICIES
from pflow_jax.settings.config_file import read_config_file
from pflow_jax.training import sample
from pflow_jax.training.experiment import build
from pflow_jax.training.flops import count_flops
from pflow_jax.training.step import make_program


def median_seconds(run, count: int) -> float:
  """Median seconds of `count` calls, each waited for, after one that compiles."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(count):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds))


def matrix_rate(size: int, count: int = 20) -> float:
  """Operations a second of one device in bfloat16 products, several in one program to hide the cost of its call."""
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

  @jax.jit
  def products(x):
    return jax.lax.scan(lambda y, _: ((y @ x) * (1 / size), None), x, length=count)[0]

  jax.block_until_ready(products(x))
  best = min(median_seconds(lambda: products(x), 1) for _ in range(5))
  return 2 * size**3 * count / best


def policy_seconds(program, batch, count: int) -> float:
  """Seconds of the gradient of the loss in the outputs of the student's last layer."""
  experiment, layout = program.experiment, program.layout
  x0, cond = batch["x0"], batch["cond"]
  params, frozen = program.state.params, program.frozen
  full = jax.eval_shape(experiment.complete, params, frozen)
  shapes = jax.eval_shape(lambda p: experiment.network(p, x0, jnp.ones(len(x0)), cond), full)
  rng = np.random.default_rng(0)
  outputs = jax.tree.map(lambda s: layout.spread(rng.normal(size=s.shape).astype(np.float32)), shapes)

  def loss(outputs, x0, cond, key):
    create = per_example(jax.vmap(lambda x, t, out: GMFlowPolicy.create(x, t, **out)))
    student = lambda x, t, cond: create(x, t, outputs)
    teacher = lambda x, t, cond: 0.5 * x
    return jnp.mean(imitation_loss(student, teacher, x0, cond, key, jnp.asarray(0), experiment.method.objective)[0])

  key = layout.everywhere(jax.random.key(1))
  with layout.context():
    gradient = jax.jit(jax.value_and_grad(loss)).lower(outputs, x0, cond, key).compile()
  return median_seconds(lambda: gradient(outputs, x0, cond, key), count)


def sampling_seconds(program, params, batch, count: int) -> float:
  """Seconds of sampling a batch from the student."""
  experiment, layout = program.experiment, program.layout
  keys = layout.spread(jax.random.split(jax.random.key(2), len(batch["x0"])))
  with layout.context():
    nfe = sample.evaluations(experiment.method, experiment.settings.sample)[0]
    run = sample.make_sampler(experiment.method, experiment.settings.sample, nfe)
    sampler = run.lower(params, batch["x0"], batch["cond"], keys).compile()
  return median_seconds(lambda: sampler(params, batch["x0"], batch["cond"], keys), count)


def run_step(variant: str, attention: str, args: argparse.Namespace, rate: float) -> None:
  """Measures the step of a variant, and prints it."""
  config = read_config_file(f"configs/imagenet.py:{variant}" + ",quicktest" * args.quick)
  config.data = dict(name="synthetic", shape=(32, 32, 4), num_classes=1000)
  config.model.update(remat=args.remat, attention=attention, residual_dtype=args.residual_dtype)
  config.mesh.fsdp = args.fsdp
  config.train.accumulation = args.accumulation
  size = config.train.batch_size = args.batch * args.accumulation * jax.device_count()
  experiment = build(config, abstract=True)
  program = make_program(experiment)
  layout = program.layout
  traced = program.trace()
  start = time.perf_counter()
  compiled = traced.lower().compile()
  compile_seconds = time.perf_counter() - start
  key = layout.everywhere(jax.random.key(0))
  shardings = jax.tree.map(lambda s: s.sharding, program.frozen)
  make = lambda key: jax.tree.map(lambda s: 0.02 * jax.random.normal(key, s.shape, s.dtype), experiment.frozen)
  with layout.context():
    frozen = jax.jit(make, out_shardings=shardings)(key)
  state = program.init(key, frozen)
  rng = np.random.default_rng(0)
  x0, label = rng.normal(size=(size, 32, 32, 4)).astype(np.float32), rng.integers(0, 1000, size, np.int32)
  rows = layout.local_rows(size)
  batch = layout.shard_batch({"x0": x0[rows], "cond": label[rows]}, size)

  def step():
    nonlocal state
    state, metrics = compiled(state, frozen, batch, key)
    return metrics

  seconds = median_seconds(step, args.steps)
  flops, devices = count_flops(traced.jaxpr), jax.device_count()
  config.model.remat = "none"
  useful = count_flops(make_program(build(config, abstract=True)).trace().jaxpr)
  achieved = flops / seconds / devices
  print(f"\n{variant}, batch {size}, accumulation {args.accumulation}, {layout.described()},")
  print(f"  attention {attention}, remat {args.remat}, residual stream in {args.residual_dtype}")
  peak = compiled.memory_analysis().peak_memory_in_bytes / 2**30
  print(f"compiled in {compile_seconds:.0f} s; peak {peak:.2f} GiB")
  print(f"step: {seconds * 1e3:.1f} ms, {flops / 1e12:.2f} TFLOP, {achieved / 1e12:.1f} TFLOP/s a device,")
  share, model = achieved / rate, useful / seconds / devices / rate
  print(f"  {share:.1%} of the matrix rate; {model:.1%} without remat's operations", flush=True)
  if experiment.method.has_policy:
    policy = policy_seconds(program, batch, args.steps)
    print(f"policy alone: {policy * 1e3:.1f} ms, {policy / seconds:.1%} of the step")
    drawn = sampling_seconds(program, experiment.complete(state.params, frozen), batch, args.steps)
    print(f"sampling: {size / drawn:,.0f} latents a second", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--variant", choices=("gmrepa_1nfe", "gmrepa_2nfe", "ayf_emd"), help="default: first and last")
  parser.add_argument("--attention", choices=sorted(IMPLEMENTATIONS), help="default: all that the devices have")
  parser.add_argument("--batch", type=int, default=16, help="examples a device and micro-batch")
  parser.add_argument("--accumulation", type=int, default=1)
  parser.add_argument("--remat", default="layers", choices=sorted(REMAT_POLICIES))
  parser.add_argument("--residual_dtype", default="bfloat16", choices=("float32", "bfloat16"))
  parser.add_argument("--fsdp", type=int, default=1)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--minutes", type=float, default=9.0, help="after which no more steps are begun")
  parser.add_argument("--quick", action="store_true")
  args = parser.parse_args()
  begun = time.perf_counter()
  platform = jax.devices()[0].platform
  rate = matrix_rate(512 if args.quick else 8192)
  print(f"{jax.devices()[0].device_kind} x {jax.device_count()}, jax {jax.__version__}")
  print(f"matrix rate: {rate / 1e12:.1f} TFLOP/s")
  able = [name for name in IMPLEMENTATIONS if platform in PLATFORMS.get(name, (platform,))]
  names = [args.attention] if args.attention else sorted(able, key=lambda name: name == "xla")  # the fastest first
  runs = [
    (variant, name)
    for variant in ([args.variant] if args.variant else ["gmrepa_1nfe", "ayf_emd"])
    for name in names
    if variant != "ayf_emd" or supports_jvp(name)
  ]
  for variant, name in runs:
    if time.perf_counter() - begun > 60 * args.minutes:
      print(f"\n{variant} with {name}: left out, {args.minutes:g} minutes are over")
      continue
    run_step(variant, name, args, rate)


if __name__ == "__main__":
  main()
