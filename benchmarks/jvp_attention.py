"""Memory and time of attention with its forward derivative: the kernels of "flash_jvp" beside XLA's attention.

    python benchmarks/jvp_attention.py [--topology v5e:2x2] [--plot docs/images/jvp_attention.png]
    python benchmarks/jvp_attention.py --time

One step is what a flow map asks of one layer: the output of attention and its tangent along tangents of queries, keys
and values, then the gradients of a loss that holds both, the tangent detached. One example, 24 heads of 128 channels as
in FLUX.1 and Qwen-Image, bfloat16.

The first command compiles the step for one chip of a TPU slice, on a machine without one, and prints the peak of its
memory in GiB, inputs and results included; where it does not fit, what the compiler asks for. The second measures this
machine's accelerator: median milliseconds of the forward pass, of the forward pass with its tangent, and of the step,
beside XLA's and, for the forward pass alone, beside the platform's own kernel (cuDNN on a GPU, splash on a TPU). The
forward pass with its tangent makes 3 times the products of the forward pass. It has not met an accelerator yet.
"""

from __future__ import annotations

import argparse
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from pflow_jax.evaluation import figures
from pflow_jax.evaluation.figures.canvas import drawing
from pflow_jax.evaluation.figures.palette import GRID
from pflow_jax.networks.attention import attention
from pflow_jax.planning.plan import Slice

HEADS, WIDTH = 24, 128
TOKENS = (1024, 2048, 4096, 8192, 16384)
COLORS = {"xla": "#888888", "flash_jvp": "#0072b2"}
GIB = 2**30


def forward(name, q, k, v, *_):
  return attention(q, k, v, implementation=name)


def with_tangent(name, q, k, v, dq, dk, dv, *_):
  return jax.jvp(functools.partial(attention, implementation=name), (q, k, v), (dq, dk, dv))


def step(name, q, k, v, dq, dk, dv, cotangent):
  """Gradients, and the tangent."""

  def loss(q, k, v):
    out, dout = with_tangent(name, q, k, v, dq, dk, dv)
    return jnp.sum((out * (cotangent + jax.lax.stop_gradient(dout))).astype(jnp.float32)), dout

  return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


def peak(name, tokens, device, fast):
  """Bytes that the step needs on a device, and whether it has them."""
  shape = (1, tokens, HEADS, WIDTH)
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))] * 7
  lowered = jax.jit(functools.partial(step, name)).trace(*arrays).lower(lowering_platforms=("tpu",))
  try:
    compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0} if fast else None)
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([MG])", str(error))
    if not found:
      raise
    return float(found[1]) * {"M": 2**20, "G": GIB}[found[2]], False
  return compiled.memory_analysis().peak_memory_in_bytes, True


def draw(rows, limit, topology):
  with drawing(4.8, 3.2) as figure:
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axis = figure.add_subplot()
    for name, color in COLORS.items():
      sizes = [rows[tokens][name][0] / GIB for tokens in rows]
      axis.plot(list(rows), sizes, color=color, marker="o", label=f'attention="{name}"')
    axis.axhline(limit / GIB, color="#d55e00", lw=1, ls="--")
    axis.text(TOKENS[0], limit / GIB * 1.1, f"memory of a chip of {topology.split(':')[0]}", color="#d55e00")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory of one layer, GiB")
    axis.set_xticks(list(rows), [f"{n:,}" for n in rows])
    axis.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axis.minorticks_off()
    axis.grid(True, which="major", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    axis.set_title(f"{HEADS} heads of {WIDTH}: output, tangent and gradients", loc="left")
  return figure


def memory(args):
  where = Slice(args.topology)
  (device, *_), limit = where.devices(), where.chip.hbm_bytes_per_device
  print(f"{args.topology}, {limit / GIB:.2f} GiB a device, jax {jax.__version__}: peak memory of a step, GiB")
  print(f"{'tokens':>8}" + "".join(f"{name:>12}" for name in COLORS))
  rows = {}
  for tokens in args.tokens:
    rows[tokens] = {name: peak(name, tokens, device, args.fast) for name in COLORS}
    cells = (f"{size / GIB:.2f}{'' if fits else ' *':2}" for size, fits in rows[tokens].values())
    print(f"{tokens:>8,}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
  print("* does not fit: what the compiler asks for")
  if args.plot:
    figures.save(draw(rows, limit, args.topology), args.plot)
    print(f"wrote {args.plot}")


def milliseconds(run, arrays, count=10):
  """Median of `count` calls after one that compiles; nan where the memory does not last."""
  program, seconds = jax.jit(run), []
  try:
    jax.block_until_ready(program(*arrays))
    for _ in range(count):
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds.append(time.perf_counter() - start)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return float("nan")
  return 1e3 * float(np.median(seconds))


def timing(args):
  platform = jax.devices()[0].platform
  own = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
  if own is None:
    raise SystemExit(f"--time: expected a GPU or a TPU, got a {platform}")
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: milliseconds")
  columns = [(name, f) for name in ("flash_jvp", "xla") for f in (forward, with_tangent, step)] + [(own, forward)]
  print(f"{'tokens':>8}" + "".join(f"{f'{name} {f.__name__}':>24}" for name, f in columns))
  for tokens in args.tokens:
    keys = jax.random.split(jax.random.key(0), 7)
    arrays = [jax.random.normal(key, (1, tokens, HEADS, WIDTH), jnp.bfloat16) for key in keys]
    found = {(name, f): milliseconds(functools.partial(f, name), arrays) for name, f in columns}
    ratio = found["flash_jvp", with_tangent] / found[own, forward]
    print(
      f"{tokens:>8,}" + "".join(f"{found[c]:24.3f}" for c in columns) + f"  tangent over {own}: {ratio:.2f}", flush=True
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
  parser.add_argument("--fast", action="store_true", help="compile with little effort")
  parser.add_argument("--plot", default="")
  parser.add_argument("--time", action="store_true", help="measure this machine's accelerator")
  args = parser.parse_args()
  timing(args) if args.time else memory(args)


if __name__ == "__main__":
  main()
