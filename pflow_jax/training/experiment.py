"""From the settings of a run to its pieces: data set, network, teacher, method."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.families.registry import sharding_rules
from pflow_jax.files.foreign import check_memory
from pflow_jax.mesh.partition import differing
from pflow_jax.mesh.sharding import Layout, make_layout
from pflow_jax.networks.attention import check_platform
from pflow_jax.networks.heads import HEADS
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.inputs import read_inputs, scaling_told
from pflow_jax.training.methods import METHODS, Method
from pflow_jax.training.methods.base import Teachers
from pflow_jax.training.network import OF_FLOW_MAPS, Network, head_class, make_network
from pflow_jax.training.origins import Saved
from pflow_jax.training.parts import ROLES
from pflow_jax.training.teachers import Teacher, load_teacher

Array = jax.Array
Params = Any


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The pieces of a run.

  Attributes:
    settings: of the run.
    method: an objective bound to the network that trains, its data and its teacher.
  """

  settings: Settings
  method: Method

  @property
  def dataset(self) -> data.Dataset:
    """Data of the run."""
    return self.method.dataset

  @property
  def network(self) -> Network:
    """Network that trains."""
    return self.method.network

  @property
  def teacher(self) -> Teacher | None:
    """Teacher of the run, or None."""
    return self.method.teacher

  @property
  def frozen(self) -> Params:
    """Shapes of the teacher's parameters, which the loss takes beside those that train."""
    return self.teacher.shapes if self.teacher else {}

  @property
  def saved(self) -> dict[str, Saved]:
    """Places of the models that the run is made from, by their names in `training.inputs.Inputs`."""
    return {ROLES[name]: one for name, one in self.teacher.saved.items()} if self.teacher else {}

  def load_frozen(self, layout: Layout | None = None) -> Params:
    """Loads the teacher's parameters, to the devices as `layout` says, without one to the host."""
    return self.teacher.load(layout) if self.teacher else {}

  def init(self, key: Array, frozen: Params, start: Params = ()) -> Params:
    """Makes the parameters that train: `start` if given, random ones, or for a student those of its teacher."""
    if start:
      return jax.tree.map(jnp.array, start)
    key_params, key_adapters = jax.random.split(key)
    params, base = self.method.init(key_params, frozen), frozen.get("strong", {})
    return self.network.trained(params, base, key_adapters)

  def loss(
    self, trained: Params, frozen: Params, batch: Mapping[str, Array], key: Array, step: Array
  ) -> tuple[Array, dict[str, Array]]:
    """The loss of every example (B,), and metrics, from the parameters that train and those that do not."""
    return self.method.loss(self.complete(trained, frozen), frozen, batch, key, step)

  def start_params(self) -> Params:
    """Loads the parameters that train from the run that config.start names; () where it names none.

    Raises:
      ValueError: that run trained another network.
    """
    start = self.settings.start
    if not start.workdir:
      return ()
    folder = f"{start.workdir}/{workdir.CHECKPOINTS}"
    params = load_params(folder, which=start.which, step=start.step)  # type: ignore[arg-type]
    theirs = workdir.load_settings(start.workdir)
    params = self.method.start(params, theirs.head, jax.random.key(self.settings.seed))
    if others := differing(params, self._trained_shapes()):
      raise ValueError(
        f"config.start.workdir: {start.workdir} trained another network than this run will; parameters that "
        f"differ: {others[:8]}; {_start_that_fits(start.workdir, theirs, self.settings)}"
      )
    if self.network.adapters.table:
      self._check_base_of_start(start.workdir)
    return params

  def _trained_shapes(self) -> Params:
    """Shapes of the parameters that train; a network that trains in full needs no teacher for them."""
    if self.network.adapters.table:
      return jax.eval_shape(self.init, jax.random.key(0), self.frozen)
    return self.method.shapes()

  def _check_base_of_start(self, start: str) -> None:
    """Raises ValueError if the adapters to start from were trained on another teacher's weights."""
    assert self.teacher is not None
    inputs = read_inputs(start)
    if inputs and "teacher" in inputs.models:
      there, here = inputs.models["teacher"].parameters, self.teacher.saved["strong"].digest
    else:
      theirs = workdir.load_settings(start).need("teacher")
      there, here = (
        f"{os.path.realpath(str(t.workdir))} at step {t.step} ({t.which})" for t in (theirs, self.teacher.settings)
      )
    if there != here:
      raise ValueError(
        f"config.start.workdir: the adapters there were trained on the teacher {there}, this run's is {here}; give it "
        "their teacher"
      )

  def load(
    self,
    folder: str | os.PathLike,
    which: str = "ema",
    layout: Layout | None = None,
    frozen: Params | None = None,
    step: int | None = None,
  ) -> Params:
    """Loads all parameters of the network as the run in `folder` saved them, to the devices as `layout` says.

    Args:
      folder: the workdir.
      which: "ema" or "params".
      layout: by default the first device.
      frozen: result of `load_frozen`, if it has been called: its leaves are shared. Adapters alone need it.
      step: of the checkpoint; None for the newest intact one.

    Raises:
      ValueError: the checkpoint is of another network than the settings describe.
    """
    place = f"{folder}/{workdir.CHECKPOINTS}"
    trained = load_params(place, which=which, step=step, layout=layout)  # type: ignore[arg-type]
    if others := differing(trained, self._trained_shapes()):
      raise ValueError(
        f"{folder}: its checkpoint holds another network than its config describes; parameters that differ: "
        f"{others[:8]}; restore the {workdir.CONFIG} that it was trained with"
      )
    if frozen is None:
      frozen = self.load_frozen(layout) if self.network.adapters.table else {}
    return self.complete(trained, frozen)

  def complete(self, trained: Params, frozen: Params) -> Params:
    """All parameters of the network, from those that train and those that do not."""
    return self.network.complete(trained, frozen.get("strong", {}))


# Arrays of a teacher that is a function have names of their own; those that no row covers stay whole.
OF_A_FUNCTION = ("strong/.*", ())


def _start_that_fits(start: str, theirs: Settings, own: Settings) -> str:
  """Says what to start from in place of the run in `start`, whose settings `theirs` are of another network."""
  for key in OF_FLOW_MAPS:
    there, here = (_option_of_flow_maps(settings, key) for settings in (theirs, own))
    if there != here:
      return (
        f"config.model.{key} is {there} there and {here} here; start from a run in which it is the same, a policy from "
        "a flow map without it, such as 'ayf_emd'"
      )
  if theirs.adapters.table and not own.adapters.table:
    return f"add its adapters to its weights, `pflow merge --workdir {start} --out MERGED`, and start from MERGED"
  if own.adapters.table and not theirs.adapters.table:
    return "it trained without adapters; leave config.adapters out, or start from a run that has them"
  return "start from a run with the same model, head, adapters and guidance"


def _option_of_flow_maps(settings: Settings, key: str) -> Any:
  """Returns an option of the network, one of OF_FLOW_MAPS, or None where the network is without it."""
  value = settings.model.get(key)
  return None if (key, value) == ("late_blocks", 0) else value  # the other's 0 is an output layer


def layout_of(settings: Settings, devices: Sequence[Any] | int | None = None) -> Layout:
  """Placement of a run's arrays: `settings.mesh` over `devices`, see `make_layout`, and the networks' tables.

  Raises:
    ValueError: sizes do not fit, or these devices do not have the network's attention.
  """
  mesh, table = settings.mesh, sharding_rules(settings.model.kind)
  layout = make_layout(mesh.sizes, (*mesh.table, *table, OF_A_FUNCTION), devices, min_size=mesh.min_size)
  implementation = settings.model.get("attention")
  if layout.platform is not None and implementation is not None:
    check_platform(implementation, layout.platform)
  return layout


def build(
  config: Settings | Mapping[str, Any],
  abstract: bool = False,
  dataset: data.Dataset | None = None,
  run: str | os.PathLike | None = None,
  teacher: Teacher | None = None,
) -> Experiment:
  """Makes the pieces of the run that settings describe.

  Args:
    config: the settings, or a config, which is parsed.
    abstract: take the shapes that the teacher must have, without reading one: to plan a run, not to train it.
    dataset: in place of that of config.data, to sample other shapes than a run was trained on.
    run: workdir of the run, if it has been trained. Its inputs.json then describes its data, whose records are read
      when they are asked for, and its teacher is looked for when it is needed.
    teacher: in place of the one that the section `teacher` names; that section still decides its guidance.

  Raises:
    ValueError: something in the config does not fit; it is raised before any work is done.
  """
  settings = Settings.of(config, converted=run is not None)
  method = METHODS[type(settings.objective)]
  heads = [name for name, head in HEADS.items() if head.has_policy == method.has_policy]
  if head_class(settings.head).has_policy != method.has_policy:
    raise ValueError(
      f"config.objective.kind {settings.kind!r} does not train the head {settings.head.kind!r}: expected head.kind one "
      f"of {heads}"
    )
  for key in OF_FLOW_MAPS:
    if _option_of_flow_maps(settings, key) is not None and key not in method.network_options:
      raise ValueError(f"config.model.{key}: the objective {settings.kind!r} does not use it; leave it out")
  inputs = read_inputs(run) if run is not None else None
  dataset = dataset or (inputs and inputs.dataset(settings.data)) or call(data.load, "data", settings.data)
  if settings.converted and dataset.scaling is None:  # random numbers stand for its data
    dataset = dataclasses.replace(dataset, scaling=scaling_told(settings.source or {}, dataset.shape[-1]))
  if settings.sample.autoencoder:
    dataset = dataclasses.replace(dataset, autoencoder=settings.sample.autoencoder)
  check_memory("config.data: one example", 4 * math.prod(dataset.shape), "make it smaller")
  network = make_network(settings.model, settings.head, dataset, settings.adapters)

  def find_teacher(strengths: tuple[float, float]) -> Teacher:
    if teacher is not None:
      if settings.teacher is not None and settings.teacher.autoguided:
        raise ValueError("teacher: a weaker model guides a teacher that is in a workdir; save it, distill from there")
      teacher.check(settings, dataset, strengths)
      return teacher.on(dataset, settings.teacher)
    return load_teacher(settings, dataset, strengths, abstract, run)

  named = teacher is not None or bool(settings.teacher and settings.teacher.workdir)
  bound = method.bind(settings, network, dataset, Teachers(named, find_teacher))
  if teacher is not None and teacher.has_network:
    _check_start(bound.shapes(), teacher.shapes["strong"])
  return Experiment(settings, bound)


def _check_start(student: Params, teacher: Params) -> None:
  """Raises ValueError for a teacher, not from a workdir, whose parameters a student cannot start from."""
  body = {name: leaves for name, leaves in teacher.items() if name != "head"}
  if others := differing(body, {name: leaves for name, leaves in student.items() if name in body}):
    raise ValueError(f"teacher: expected the student's network, parameters that differ: {others[:8]}")
