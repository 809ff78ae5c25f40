"""`pflow plan`: memory and cost of a run on a TPU slice, found on a machine that has none.

The TPU compiler compiles the run's own step for the slice. The memory that it reports, and the traffic of its program,
are those of the run; seconds are estimates, from the counted operations and bytes and the chip's published rates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax.files import foreign
from pflow_jax.mesh.chips import Chip, chip_of, compiler_topology, links_of_axis, parse_topology
from pflow_jax.mesh.sharding import Layout, mesh_shape
from pflow_jax.planning import hlo, hlo_memory, operations
from pflow_jax.planning.report import EFFICIENCY
from pflow_jax.settings.tree import Settings
from pflow_jax.training import sample
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.flops import compute_seconds, count_flops
from pflow_jax.training.step import Program, bytes_of_device, make_program

CACHE = "~/.cache/pflow_jax/libtpu"
MAX_CHIPS = 100_000  # of a program; the largest published one had 50,944


class NoCompiler(RuntimeError):
  """The TPU compiler is not installed; the message has the command that installs it."""


@dataclasses.dataclass(frozen=True)
class Slice:
  """The chips to plan for.

  Attributes:
    topology: of one slice, "v5e:16x16" or a Cloud name, see `mesh.chips.parse_topology`.
    slices: number of slices.
  """

  topology: str
  slices: int = 1

  def __post_init__(self):
    parse_topology(self.topology)
    if self.slices < 1 or self.num_chips > MAX_CHIPS:
      raise ValueError(
        f"--slices: expected at least 1 slice, and at most {MAX_CHIPS:,} chips in all, got {self.slices} slices of "
        f"{self.topology}"
      )

  @property
  def chip(self) -> Chip:
    """Chip of the topology."""
    return chip_of(self.topology)

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return parse_topology(self.topology)[2] * self.slices

  @property
  def num_devices(self) -> int:
    """JAX devices of all slices."""
    return self.num_chips * self.chip.devices

  def devices(self) -> Sequence[Any]:
    """Devices that can be compiled for, and nothing else.

    Raises:
      NoCompiler: the compiler is not installed, or needs a GPU.
    """
    if self.chip.platform == "gpu":
      raise NoCompiler("XLA compiles for a GPU where there is one, so what follows is counted, not compiled.")
    os.environ |= _compiler_environment()
    from jax.experimental import topologies

    name, options = compiler_topology(self.topology)
    if self.slices > 1:
      options["num_slices"] = self.slices
    try:
      return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
      if "INVALID_ARGUMENT" not in str(error):
        raise
      raise ValueError(f"topology: the compiler knows no {self.topology}: {error}") from error


def find_compiler() -> str:
  """Path of the TPU compiler's library.

  Raises:
    NoCompiler: it is not installed.
  """
  places = [os.environ.get("TPU_LIBRARY_PATH"), os.path.expanduser(f"{CACHE}/libtpu/libtpu.so")]
  spec = importlib.util.find_spec("libtpu")
  if spec is not None and spec.submodule_search_locations:
    places += [f"{folder}/libtpu.so" for folder in spec.submodule_search_locations]
  for place in places:
    if place and pathlib.Path(place).exists():
      return place
  needs = importlib.metadata.requires("jax") or []
  pinned = [need.split(";")[0].strip() for need in needs if need.startswith("libtpu")]
  raise NoCompiler(
    "the TPU compiler is not installed, so what follows is counted, not compiled. It is a package of its own, which "
    f"needs no TPU:\n  {sys.executable} -m pip install --no-deps --target {CACHE} "
    f"'{pinned[0] if pinned else 'libtpu'}'\n"
    "(or set TPU_LIBRARY_PATH to a libtpu.so that fits this JAX)"
  )


def has_compiler() -> bool:
  """Returns whether `find_compiler` finds one."""
  try:
    return bool(find_compiler())
  except NoCompiler:
    return False


def _compiler_environment() -> dict[str, str]:
  """Environment of libtpu on a machine without a TPU, beside other processes that use it, and without its logs."""
  return {
    "TPU_LIBRARY_PATH": find_compiler(),
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
  }


def plan(
  config: Settings | Mapping[str, Any], where: Slice, *, fast: bool = False, search: bool = True, sampling: bool = True
) -> dict[str, Any]:
  """Reports the needs and the cost of the run that `config` describes on `where`.

  Without the TPU compiler the report has "note", and lacks the compiler's numbers.

  Args:
    config: of the run.
    where: the slices.
    fast: compile with little effort: about the same memory, but more traffic, and with it longer estimates.
    search: if the run does not fit, look for changes that make it fit.
    sampling: plan the sampler as well.

  Returns:
    a report for JSON, see `planning.report.as_text`. Bytes are of a device, operations and bytes sent of a step.

  Raises:
    ValueError: the config, the mesh and the batch do not fit together.
  """
  note = ""
  try:
    devices: Sequence[Any] | None = where.devices()
  except NoCompiler as missing:
    devices, note = None, str(missing)
  with _quiet():
    experiment = build(config, abstract=True)
    report, program = _step(experiment, where, devices, fast)
    if note:
      report["note"] = note
    elif not report["memory"]["fits"] and search:
      report["tried"] = list(_what_would_fit(experiment.settings, where, devices))
    if sampling and not note:
      report["sample"] = _sampler(experiment, program.layout, where, fast)
  return report


def sweep(config: Settings | Mapping[str, Any], where: Slice, *, fast: bool = True) -> list[dict[str, Any]]:
  """Reports for every size of "fsdp" that is a power of 2 and divides the devices of a slice; "data" is the rest.

  The report of a size that does not divide the network or the batch has "refused" instead.
  """
  reports, settings = [], Settings.of(config)
  size, most = 1, where.num_devices // where.slices
  while most % size == 0:
    one = settings.changed("mesh", slice=where.slices, data=-1, fsdp=size, tensor=1)
    print(f"data {most // size} x fsdp {size}", flush=True)
    try:
      reports.append(plan(one, where, fast=fast, search=False, sampling=False))
    except ValueError as error:
      reports.append({"mesh": {"slice": where.slices, "data": most // size, "fsdp": size}, "refused": str(error)})
    size *= 2
  return reports


def _step(
  experiment: Experiment, where: Slice, devices: Sequence[Any] | None, fast: bool
) -> tuple[dict[str, Any], Program]:
  """Makes the report on the training step."""
  settings = experiment.settings
  length = settings.need("train")
  program = make_program(experiment, layout_of(settings, devices or where.num_devices))
  what = f"config.train.batch_size: a device's part of {length.batch_size} examples"
  foreign.check_memory(what, bytes_of_device(program.batch), "lower it", have=where.chip.hbm_bytes_per_device)
  traced = program.trace()
  flops = count_flops(traced.jaxpr)
  state = program.state
  memory: dict[str, Any] = {
    "parameters": bytes_of_device(state.params),
    "average": bytes_of_device((state.ema, state.profiles)),
    "optimizer": bytes_of_device(state.opt_state) + bytes_of_device(state.opponent),
    "teacher": bytes_of_device(program.frozen),
    "batch": bytes_of_device(program.batch),
    "available": where.chip.hbm_bytes_per_device,
  }
  report: dict[str, Any] = {
    "config": {"objective": settings.kind, "head": settings.head.kind, "model": settings.model.plain()},
    "topology": where.topology,
    "slices": where.slices,
    "chip": where.chip.name,
    "chips": where.num_chips,
    "devices": where.num_devices,
    "mesh": dict(program.layout.mesh.shape),
    "batch_size": length.batch_size,
    "accumulation": program.step.accumulation,
    "remat": settings.model.get("remat", "none"),
    "data": str(settings.data.get("name")),
    "steps": length.steps,
    "parameters": {"trained": _count(state.params), "teacher": _count(program.frozen)},
    "flops": flops,
    "memory": memory,
  }
  seconds = {"compute": compute_seconds(traced.jaxpr, where.chip) / where.num_chips}
  if devices is None:
    report["estimate"] = _estimate(seconds, where, length.steps)
    return report, program
  arguments = sum(memory[name] for name in ("parameters", "average", "optimizer", "teacher", "batch"))
  if arguments > memory["available"]:  # the compiler need not be asked, and some numbers kill it
    memory |= {"peak": arguments, "fits": False}
    return report, program
  compiled, told = _compile(traced, fast, devices[0].platform)
  report |= {"compile_seconds": told.pop("compile_seconds"), "compiled": "fast" if fast else "in full"}
  memory |= told
  memory["fits"] = compiled is not None
  if compiled is None:
    return report, program
  text = compiled.as_text()
  collectives = hlo.collectives(text, where.num_devices // where.slices)
  moves = hlo_memory.memory_moves(text)
  traffic = sum(move.bytes for move in moves)
  report["traffic"] = {
    "ici": {kind: dataclasses.asdict(t) for kind, t in collectives.ici.items() if t.count},
    "dcn": {kind: dataclasses.asdict(t) for kind, t in collectives.dcn.items() if t.count},
    "hbm": traffic,
    "moved": operations.as_dict(operations.operations(moves, (state.params, program.frozen), program.layout)),
    "unknown_loops": collectives.unknown_loops,
  }
  chip, per = where.chip, where.chip.devices
  # A collective runs along one axis of the slice.
  one_axis = chip.ici_bandwidth * links_of_axis(where.topology) / chip.ici_links
  seconds["hbm"] = traffic * per / chip.hbm_bandwidth
  seconds["ici"] = sum(t.sent for t in collectives.ici.values()) * per / one_axis
  if where.slices > 1:
    seconds["dcn"] = sum(t.sent for t in collectives.dcn.values()) * per / chip.dcn_bandwidth
  report["estimate"] = _estimate(seconds, where, length.steps)
  return report, program


def _estimate(seconds: dict[str, float], where: Slice, steps: int) -> dict[str, Any]:
  """Seconds a step if all overlaps and if nothing does, its limit, and the cost of the run."""
  least = max(seconds.values())
  return {
    "seconds": seconds,
    "step_seconds": [least, sum(seconds.values())],
    "limit": max(seconds, key=seconds.__getitem__),
    "chip_hours": [least * steps * where.num_chips / 3600, least / EFFICIENCY * steps * where.num_chips / 3600],
  }


def _needed(error: str) -> int:
  """Bytes that a program needs, from the compiler's refusal of it; any other error is raised again.

  A refusal is "Ran out of memory in memory space hbm. Used 25.84G of 15.75G hbm." or "Ran out of memory on HBM, the
  total memory required for HLO temporaries (37.66G) exceeds available HBM (15.75G)."
  """
  sizes = re.search(r"(?:Used |\()([\d.]+)([KMGT])\b", error)
  if "Ran out of memory" not in error or "hbm" not in error.lower() or sizes is None:
    raise RuntimeError(f"the compiler failed: {error}")
  return int(float(sizes[1]) * 1024 ** ("KMGT".index(sizes[2]) + 1))


def _compile(traced: Any, fast: bool, platform: str) -> tuple[Any, dict[str, Any]]:
  """The compiled program, None if it does not fit, and the compiler's numbers of memory, in bytes of a device."""
  options = {"exec_time_optimization_effort": -1.0} if fast else None
  start = time.perf_counter()
  try:
    compiled = traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    return None, {"peak": _needed(str(error)), "compile_seconds": time.perf_counter() - start}
  told = compiled.memory_analysis()
  return compiled, {
    "arguments": told.argument_size_in_bytes,
    "activations": told.peak_memory_in_bytes - told.argument_size_in_bytes,
    "peak": told.peak_memory_in_bytes,
    "compile_seconds": time.perf_counter() - start,
  }


def _what_would_fit(settings: Settings, where: Slice, devices: Sequence[Any] | None) -> Iterator[dict[str, Any]]:
  """Changes in the order of their cost, each on top of those before, until one fits."""
  changes: list[tuple[str, str, dict[str, Any]]] = []
  if settings.model.get("remat", "full") != "full":
    changes.append(("config.model.remat=full", "model", {"remat": "full"}))
  sizes = mesh_shape(settings.mesh.sizes, where.num_devices)
  fsdp, most = sizes[2], sizes[1] * sizes[2]
  while fsdp < most:
    fsdp = min(fsdp * 4, most)
    changes.append((f"config.mesh.fsdp={fsdp}", "mesh", {"data": -1, "fsdp": fsdp}))
  # The memory of a step is that of a micro-batch. An adversarial run takes its batch whole.
  length, parts = settings.need("train"), math.prod(sizes[:3])
  whole = settings.adversarial is not None and settings.adversarial.weight > 0
  for halvings in range(1, 7):
    if length.batch_size % (length.accumulation * 2**halvings * parts) == 0:
      name, value = "accumulation", length.accumulation * 2**halvings
      if whole:
        name, value = "batch_size", length.batch_size // 2**halvings
      changes.append((f"config.train.{name}={value}", "train", {name: value}))
  kept: list[str] = []
  for label, section, values in changes:
    key = label.split("=")[0]
    change = [*(name for name in kept if not name.startswith(f"{key}=")), label]
    print(f"does not fit; trying {' '.join(change)}", flush=True)
    one = settings.changed(section, **values)
    try:
      report, _ = _step(build(one, abstract=True), where, devices, fast=True)
    except ValueError as error:
      yield {"change": change, "refused": str(error)}
      continue
    kept, settings = change, one
    yield {"change": change, "peak": report["memory"]["peak"], "fits": report["memory"]["fits"]}
    if report["memory"]["fits"]:
      return


def _sampler(experiment: Experiment, layout: Layout, where: Slice, fast: bool) -> list[dict[str, Any]]:
  """Makes reports on the sampler, one for each number of evaluations of the config."""
  settings = experiment.settings.sample
  size = -(-settings.batch_size // layout.batch_parts) * layout.batch_parts

  def all_params(key: jax.Array, frozen: Any) -> Any:
    return experiment.complete(experiment.init(key, frozen), frozen)

  key = jax.random.key(0)
  params = layout.abstract(jax.eval_shape(all_params, key, experiment.frozen))
  if (guide := experiment.method.guide(settings)) is not None:
    params = {"strong": params, "weak": layout.abstract(guide.shapes)}
  dataset = experiment.dataset
  noise = jax.ShapeDtypeStruct((size, *dataset.shape), jnp.float32)
  keys = jax.ShapeDtypeStruct((size,), key.dtype)
  spread = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.batch)
  inputs = jax.tree.map(spread, (noise, dataset.cond_shapes(size), keys))
  reports = []
  for nfe in sample.evaluations(experiment.method, settings):
    with layout.context():
      run: Any = sample.make_sampler(experiment.method, settings, nfe)
      traced = run.trace(params, *inputs)
    flops = count_flops(traced.jaxpr)
    compiled, told = _compile(traced, fast, layout.mesh.devices.flat[0].platform)  # type: ignore[union-attr]
    seconds = compute_seconds(traced.jaxpr, where.chip) / where.num_chips
    reports.append(
      {"nfe": nfe, "batch_size": size, "flops": flops, "compute_seconds": seconds, "fits": compiled is not None} | told
    )
  return reports


def _count(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Context without libtpu's lines on stderr, which no setting stops without a TPU; an error brings them back."""
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as said:
    os.dup2(said.fileno(), 2)
    try:
      yield
    except RuntimeError as error:
      said.seek(0)
      raise RuntimeError(f"{error}\n{said.read()[-2000:].decode(errors='replace')}") from error
    finally:
      os.dup2(kept, 2)
      os.close(kept)
