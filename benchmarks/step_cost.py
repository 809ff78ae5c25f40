"""Cost of a training step: flow maps against flow matching, and π-ID's overhead beside its two networks.

    python benchmarks/step_cost.py [--only emd|pid|methods]

* emd: a step (loss, gradient, Adam) of AYF-EMD, AYF-LMD and MeanFlow relative to one of flow matching with the same
  DiT; the teacher of the first two is a DiT of the same size, unguided. Counted in forward passes these are 5, 5 and 4
  to 3, and guidance would add one.
* pid: the gradient of π-ID with a GMFlow student of DiT-B/2 size, against its networks' work alone (the student forward
  and backward, M teacher evaluations); the rest is overhead. A second estimate is the policy's work alone, from fixed
  outputs of the student and with a teacher that costs nothing.
* methods: the gradient of π-ID without data (4 segments, a window of 3 substeps, DiT 256 x 6) by the rollouts' default
  method against Euler, whole and the policy's work alone.

Every round runs all programs in turn, in changing order, so that other load affects all alike. It prints medians over
rounds of wall and processor seconds, of the ratio within a round, with the smallest and the largest, and the matrix
products' operations (`count_flops`). Other load still favours one or the other, so the machine should be idle.

Measured, 4 rounds on two cores of a shared machine, jax 0.10.2, medians of wall seconds: AYF-EMD 1.36 of a step of flow
matching on digits and 1.48 at DiT-S/2, MeanFlow 1.18 and 1.22. The policy alone is 1.5 % of π-ID's step at DiT-B/2; the
difference to the networks is within its noise of 5 %.
"""

from __future__ import annotations

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pflow_jax as pf
from pflow_jax.training.flops import count_flops

CLASSES = 10


def make_dit(head, channels, **size):
  return pf.DiT(channels=channels, patch_size=2, num_classes=CLASSES, head=head(channels, 2), **size)


def make_student(module, params):
  """Returns a network with GMFlow's head as (x, t, cond) -> policies."""
  create = jax.vmap(lambda x, t, out: pf.GMFlowPolicy.create(x, t, **out))
  return lambda x, t, cond: create(x, t, module.apply({"params": params}, x, t, cond))


def make_batch(batch, space, channels):
  """Makes data, labels and a key. They are arguments of every program, or XLA would compute with them ahead of time."""
  x0 = jax.random.normal(jax.random.key(1), (batch, *space, channels))
  return x0, jnp.arange(batch, dtype=jnp.int32) % CLASSES, jax.random.key(2)


def measure(programs, rounds):
  """Measures wall and processor seconds (rounds, 2) of every program."""
  for run in programs.values():
    run()
  seconds, names = {name: [] for name in programs}, list(programs)
  for i in range(rounds):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      wall, work = time.perf_counter(), time.process_time()
      programs[name]()
      seconds[name].append((time.perf_counter() - wall, time.process_time() - work))
  return {name: np.array(s) for name, s in seconds.items()}


def spread(ratios, form=".3f"):
  """Median (smallest to largest)."""
  median, low, high = (format(x, form) for x in (np.median(ratios), ratios.min(), ratios.max()))
  return f"{median} ({low} to {high})"


def report(title, seconds, flops, reference):
  names, widths = ("", "seconds", "CPU s", "ratio", "ratio of CPU s", "GFLOP", "ratio"), (14, 9, 9, 23, 23, 9, 7)
  print("\n" + title)
  print("".join(f"{name:>{width}s}" for name, width in zip(names, widths, strict=True)))
  for name, s in seconds.items():
    wall, work = (s / seconds[reference]).T
    cells = [name, *(f"{x:.3f}" for x in np.median(s, axis=0)), spread(wall), spread(work)]
    cells += [f"{flops[name] / 1e9:.2f}", f"{flops[name] / flops[reference]:.2f}"]
    print("".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True)))


def compare_objectives(title, space, channels, batch, rounds, **size):
  """Compares steps of the flow-map objectives with one of flow matching."""
  module = make_dit(pf.VelocityHead, channels, time_scale=1.0, **size)
  data = make_batch(batch, space, channels)
  ones = jnp.ones(batch)
  params = module.init(jax.random.key(0), data[0], ones, data[1], s=ones)["params"]
  optimizer = optax.adam(1e-4)

  def flow_matching(params, frozen, x0, cond, key):
    return pf.flow_matching_loss(lambda *inputs: module.apply({"params": params}, *inputs), x0, cond, key)[0]

  def flow_map(settings):
    def loss(params, frozen, x0, cond, key):
      def network(x, t, s, cond, guidance):
        return module.apply({"params": params}, x, t, cond, s=s)

      def teacher(x, t, cond, guidance):
        return module.apply({"params": frozen}, x, t, cond)

      return pf.flow_map_loss(network, teacher, x0, cond, key, jnp.asarray(0), settings)[0]

    return loss

  losses = {
    "flow matching": flow_matching,
    "AYF-EMD": flow_map(pf.ayf_emd()),
    "AYF-LMD": flow_map(pf.ayf_lmd()),
    "MeanFlow": flow_map(pf.mean_flow()),
  }

  def training_step(loss):
    def update(params, state, frozen, data):
      gradient = jax.grad(lambda params: jnp.mean(loss(params, frozen, *data)))(params)
      updates, state = optimizer.update(gradient, state, params)
      return optax.apply_updates(params, updates), state

    traced = jax.jit(update, donate_argnums=(0, 1)).trace(params, optimizer.init(params), params, data)
    compiled, flops = traced.lower().compile(), count_flops(traced.jaxpr)
    own = jax.tree.map(jnp.copy, (params, optimizer.init(params)))

    def run():
      nonlocal own
      own = jax.block_until_ready(compiled(*own, params, data))

    return run, flops

  programs, flops = {}, {}
  for name, loss in losses.items():
    programs[name], flops[name] = training_step(loss)
  report(title, measure(programs, rounds), flops, "flow matching")


def imitation_overhead(batch, rounds, components=32, space=(32, 32), channels=4):
  """Compares the gradient of π-ID at DiT-B/2 size with the work of its networks."""
  size = pf.DIT_SIZES["B"]
  teacher_module = make_dit(pf.VelocityHead, channels, **size)
  head = lambda channels, patch: pf.GMFlowHead(channels, patch, num_components=components)
  module = make_dit(head, channels, **size)
  x0, cond, _ = data = make_batch(batch, space, channels)
  ones = jnp.ones(batch)
  frozen = teacher_module.init(jax.random.key(0), x0, ones, cond)["params"]
  params = pf.student_params_from_teacher(frozen, module, jax.random.key(1))
  settings = pf.Imitation(nfe=1, num_states=2, dropout=0.05)
  outputs = jax.jit(lambda p: module.apply({"params": p}, x0, ones, cond))(params)
  states = jnp.stack([x0] * settings.num_states)

  def loss(student, teacher, x0, cond, key):
    return jnp.mean(pf.imitation_loss(student, teacher, x0, cond, key, jnp.asarray(0), settings)[0])

  def teacher(frozen):
    return lambda x, t, cond: teacher_module.apply({"params": frozen}, x, t, cond)

  def whole(params, frozen, outputs, states, data):
    def of_params(params):
      return loss(make_student(module, params), teacher(frozen), *data)

    return jax.value_and_grad(of_params)(params)

  def networks(params, frozen, outputs, states, data):
    x0, cond, _ = data
    values, backward = jax.vjp(lambda p: module.apply({"params": p}, x0, ones, cond), params)
    velocities = jax.lax.map(lambda x: teacher(frozen)(x, 0.5 * ones, cond), states)
    return values, backward(outputs), velocities  # any cotangent of the right shape costs the same

  def policy(params, frozen, outputs, states, data):
    def of_outputs(outputs):
      create = jax.vmap(lambda x, t, out: pf.GMFlowPolicy.create(x, t, **out))
      return loss(lambda x, t, cond: create(x, t, outputs), lambda x, t, cond: 0.5 * x, *data)

    return jax.value_and_grad(of_outputs)(outputs)

  arguments = (params, frozen, outputs, states, data)
  traced = {f.__name__: jax.jit(f).trace(*arguments) for f in (whole, networks, policy)}
  flops = {name: count_flops(t.jaxpr) for name, t in traced.items()}
  compiled = {name: t.lower().compile() for name, t in traced.items()}
  programs = {name: lambda f=f: jax.block_until_ready(f(*arguments)) for name, f in compiled.items()}
  seconds = measure(programs, rounds)
  title = f"π-ID, GMFlow K = {components}, M = {settings.num_states}, DiT-B/2, {space[0]}x{space[1]}x{channels}"
  report(f"{title}, batch {batch}", seconds, flops, "whole")
  for i, kind in enumerate(("seconds", "CPU seconds")):
    rest = 1 - seconds["networks"][:, i] / seconds["whole"][:, i]
    alone = seconds["policy"][:, i] / seconds["whole"][:, i]
    print(f"outside the networks, by {kind}: {spread(rest, '.1%')}; the policy alone: {spread(alone, '.1%')}")


def compare_methods(batch, rounds, components=8, space=(32, 32), channels=4):
  """Compares the gradient of a data-free π-ID step by "euler" and by "auto", with networks and without."""
  size = dict(width=256, depth=6, num_heads=4)
  teacher_module = make_dit(pf.VelocityHead, channels, **size)
  module = make_dit(lambda *args: pf.GMFlowHead(*args, num_components=components), channels, **size)
  x, cond, key = make_batch(batch, space, channels)
  ones = jnp.ones(batch)
  frozen = teacher_module.init(jax.random.key(0), x, ones, cond)["params"]
  params = pf.student_params_from_teacher(frozen, module, jax.random.key(1))
  outputs = jax.jit(lambda p: module.apply({"params": p}, x, ones, cond))(params)

  def loss(student, teacher, settings, x, cond, key):
    return jnp.mean(pf.imitation_loss_data_free(student, teacher, x, cond, key, jnp.asarray(0), settings)[0])

  def whole(settings, params, frozen, outputs, data):
    teacher = lambda x, t, cond: teacher_module.apply({"params": frozen}, x, t, cond)
    return loss(make_student(module, params), teacher, settings, *data)

  def alone(settings, outputs, frozen, params, data):
    create = jax.vmap(lambda x, t, out: pf.GMFlowPolicy.create(x, t, **out))
    return loss(lambda x, t, cond: create(x, t, outputs), lambda x, t, cond: 0.5 * x, settings, *data)

  for name, function, arguments in (
    ("whole", whole, (params, frozen, outputs, (x, cond, key))),
    ("the policy alone", alone, (outputs, frozen, params, (x, cond, key))),
  ):
    programs, flops = {}, {}
    for method in ("euler", "auto"):
      settings = pf.Imitation(nfe=4, final_scale=0.5, shift=3.2, window=3, dropout=0.1, method=method)
      traced = jax.jit(jax.grad(functools.partial(function, settings))).trace(*arguments)
      compiled, flops[method] = traced.lower().compile(), count_flops(traced.jaxpr)
      programs[method] = lambda f=compiled, arguments=arguments: jax.block_until_ready(f(*arguments))
    title = f"π-ID without data, {name}: GMFlow K = {components}, {space[0]}x{space[1]}x{channels}, batch {batch}"
    report(title, measure(programs, rounds), flops, "euler")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", choices=("emd", "pid", "methods"))
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--batch", type=int, default=2, help="of π-ID")
  args = parser.parse_args()
  load = [round(x, 1) for x in os.getloadavg()]
  print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load average of 1, 5, 15 minutes {load}")
  if load[0] > 1:
    print("WARNING: the machine is busy with other work; do not quote these numbers")
  if args.only in (None, "emd"):
    size = dict(width=64, depth=4, num_heads=4, scan_unroll=4)
    compare_objectives("digits DiT, 8x8x1, batch 64", (8, 8), 1, 64, 10 * args.rounds, **size)
    compare_objectives("DiT-S/2, 32x32x4, batch 4", (32, 32), 4, 4, args.rounds, **pf.DIT_SIZES["S"])
  if args.only in (None, "pid"):
    imitation_overhead(args.batch, args.rounds)
  if args.only in (None, "methods"):
    compare_methods(args.batch, args.rounds)


if __name__ == "__main__":
  main()
