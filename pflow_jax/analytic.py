"""Operations of one optimizer step in closed form, from the sizes of a DiT: a check on what is counted by tracing.

A product of matrices counts 2 a multiply-add, all else nothing, as in `flops.count_flops`. Left out are an adversary,
and the products inside GMFlow and DX policies: their rollouts took 0.15 % of a step or less from DiT-S/2 upwards.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from pflow_jax.experiment import Experiment
from pflow_jax.models import heads
from pflow_jax.models.dit import DiT
from pflow_jax.models.layers import FREQUENCIES
from pflow_jax.networks import AdapterSettings
from pflow_jax.objectives.flow_map import FlowMap
from pflow_jax.objectives.imitation import Imitation
from pflow_jax.partition import first_match


def analytic_step_flops(experiment: Experiment, batch_size: int, *, data_free: bool = False) -> int | None:
  """Operations of one optimizer step, teacher included, as `step.step_flops` counts them by tracing, to 1 %.

  Args:
    batch_size: examples a step; however they are accumulated, the step is linear in them.
    data_free: whether the objective is "imitation_data_free", which an Experiment does not say.
  Returns: operations, or None for a network that is not a DiT.
  """
  module, objective = experiment.network.module, experiment.objective
  if not isinstance(module, DiT):
    return None
  student = _DiT.of(experiment)
  passes = student.forward() + student.backward()
  teacher = _teacher(experiment, student)
  if teacher is None:
    return None
  if isinstance(objective, Imitation):
    # Without data a step walks all segments, with data one. The teacher's outputs are constants: it has no backward
    # pass, nor have the rollouts that lead to its inputs.
    segments = objective.nfe if data_free else 1
    return batch_size * segments * (passes + objective.num_states * teacher)
  if not isinstance(objective, FlowMap):
    return batch_size * passes
  passes += student.tangent(objective.side)
  if experiment.network.float32 is not None:
    passes += student.forward()  # the derivative is that of an evaluation of its own, in float32
  if objective.target == "teacher":
    return batch_size * (passes + teacher)
  # MeanFlow's guided target needs the student's own velocities, without and with the condition.
  omega, kappa = objective.omega, objective.kappa
  own = ((1 - omega - kappa != 0) + (kappa != 0)) if (omega, kappa) != (1, 0) else 0
  return batch_size * (passes + own * student.forward())


def _teacher(experiment: Experiment, student: _DiT) -> int | None:
  """One evaluation of the teacher's velocity for one example, guided if it is; None for a weak one that is no DiT."""
  if experiment.teacher is None:
    return 0
  settings, objective = experiment.teacher.settings, experiment.objective
  strong = _DiT(student.tokens, student.patch, student.width, student.depth, student.hidden)
  if settings.guidance == 1 and not (isinstance(objective, FlowMap) and objective.guided):
    return strong.forward()
  if not settings.autoguided:
    # Both branches are one call under vmap, in which what sees neither condition is not doubled.
    alike = [layer for layer in strong.layers if layer.path.startswith(("patch_embed", "time_embed"))]
    return 2 * strong.forward() - sum(layer.product for layer in alike)
  blocks = experiment.teacher.params["weak"].get("blocks", {})
  if "qkv" not in blocks:
    return None
  patch = experiment.teacher.params["weak"]["patch_embed"]["kernel"].shape[0]
  depth, width, _ = blocks["qkv"]["kernel"].shape
  hidden = blocks["mlp_in"]["kernel"].shape[-1]
  return strong.forward() + _DiT(student.tokens * student.patch // patch, patch, width, depth, hidden).forward()


@dataclasses.dataclass(frozen=True)
class _Dense:
  """A dense layer on `rows` rows an example, `copies` times in the depth of the network, with an adapter of `rank`."""

  path: str
  rows: int
  inputs: int
  outputs: int
  copies: int = 1
  rank: int = 0
  kernel: bool = True  # whether it trains
  learns: bool = True  # whether anything in the layer does

  @property
  def product(self) -> int:
    return 2 * self.copies * self.rows * self.inputs * self.outputs

  @property
  def down(self) -> int:
    """The adapter's first product."""
    return 2 * self.copies * self.rows * self.inputs * self.rank

  @property
  def up(self) -> int:
    return 2 * self.copies * self.rows * self.rank * self.outputs

  @property
  def forward(self) -> int:
    return self.product + self.down + self.up

  def backward(self, below: bool) -> int:
    """Once more for the gradient of every weight that trains; and for the input's, if anything `below` trains.

    What passes the adapter's second product backward is there for the first one's weight alone.
    """
    return self.product * (self.kernel + below) + self.down * (1 + below) + 2 * self.up


@dataclasses.dataclass(frozen=True)
class _DiT:
  """Sizes of a DiT; what its passes cost for one example.

  Attributes:
    tokens: an example.   patch: values a patch.   hidden: width of the blocks' MLP.
    outputs: of the head, by layer: (name, values a token). None is a velocity's.   log_std: width of GMFlow's MLP.
    embeddings: of times and strengths.   remat, adapters: of the network.
  """

  tokens: int
  patch: int
  width: int
  depth: int
  hidden: int
  outputs: tuple[tuple[str, int], ...] | None = None
  log_std: int = 0
  embeddings: tuple[str, ...] = ("time_embed",)
  remat: str = "none"
  adapters: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)

  @classmethod
  def of(cls, experiment: Experiment) -> _DiT:
    """The network that trains."""
    module, objective, space = experiment.network.module, experiment.objective, experiment.dataset.shape[:-1]
    assert isinstance(module, DiT)
    head: Any = module.head
    pixels, channels = module.patch_size ** len(space), module.channels
    outputs = {"proj_out": head.maps * channels}
    if isinstance(head, (heads.GMFlowHead, heads.ArcHead)):
      outputs = {"proj_out_means": head.maps * channels, "proj_out_logweights": head.maps}
    if isinstance(head, heads.ArcHead):
      outputs["proj_out_loggamma"] = head.maps - 1
    embeddings = ["time_embed"]
    if isinstance(objective, FlowMap):
      embeddings += ["length_embed", *["guidance_embed"] * objective.guided]
    return cls(
      tokens=math.prod(side // module.patch_size for side in space),
      patch=pixels * channels,
      width=module.width,
      depth=module.depth,
      hidden=int(module.width * module.mlp_ratio),
      outputs=tuple((name, pixels * values) for name, values in outputs.items()),
      log_std=head.logstd_inner_dim if isinstance(head, heads.GMFlowHead) and head.learns_log_std else 0,
      embeddings=tuple(embeddings),
      remat=module.remat,
      adapters=experiment.network.adapters,
    )

  @property
  def layers(self) -> list[_Dense]:
    t, d, hidden = self.tokens, self.width, self.hidden
    block = {"adaln": (1, d, 6 * d), "qkv": (t, d, 3 * d), "proj": (t, d, d)}
    block |= {"mlp_in": (t, d, hidden), "mlp_out": (t, hidden, d)}
    layers = [_Dense("patch_embed", t, self.patch, d)]
    for name in self.embeddings:
      layers += [_Dense(f"{name}/in", 1, FREQUENCIES, d), _Dense(f"{name}/out", 1, d, d)]
    layers += [_Dense(f"blocks/{name}", *sizes, copies=self.depth) for name, sizes in block.items()]
    layers += [_Dense("final_norm/adaln", 1, d, 2 * d)]
    layers += [_Dense(f"head/{name}", t, d, values) for name, values in self.outputs or [("proj_out", self.patch)]]
    if self.log_std:
      layers += [_Dense("head/proj_out_logstds_1", 1, d, self.log_std)]
      layers += [_Dense("head/proj_out_logstds_3", 1, self.log_std, 1)]
    return [self._with_adapter(layer) for layer in layers]

  def _with_adapter(self, layer: _Dense) -> _Dense:
    rows = self.adapters.rows
    match = first_match((row.pattern for row in rows), layer.path)
    rank = 0 if match is None else rows[match].rank
    kernel, bias = (self._trains(f"{layer.path}/{leaf}") for leaf in ("kernel", "bias"))
    return dataclasses.replace(layer, rank=rank, kernel=kernel, learns=kernel or bias or rank > 0)

  def _trains(self, path: str) -> bool:
    """Whether a parameter trains in full: all do; beside adapters what the teacher lacks, and what `train` names."""
    full = not self.adapters.table or path.startswith(("head/", "length_embed/", "guidance_embed/"))
    return full or any(re.fullmatch(pattern, path) for pattern in self.adapters.train)

  @property
  def attention(self) -> int:
    """Scores, and the sum of values that they weigh: each a product of tokens x tokens x width."""
    return self.depth * 2 * (2 * self.tokens**2 * self.width)

  def forward(self) -> int:
    return sum(layer.forward for layer in self.layers) + self.attention

  def tangent(self, side: str) -> int:
    """What the forward derivative adds: a linear layer again where its input has a tangent, attention's factors both.

    "eulerian" moves x, t and the length t - s; "lagrangian" s alone. The blocks are one scan: all of them move.
    """
    still = ("guidance_embed",) if side == "eulerian" else ("guidance_embed", "patch_embed", "time_embed")
    return sum(layer.forward for layer in self.layers if not layer.path.startswith(still)) + 2 * self.attention

  def backward(self) -> int:
    """Gradients of what trains, through what lies above it; what lies below all of that has no backward pass."""
    layers = self.layers
    learning = {layer.path for layer in layers if layer.learns}
    condition = self._trains("class_embed/embedding") or any(
      f"{e}/{i}" in learning for e in self.embeddings for i in ("in", "out")
    )
    # The blocks are one scan: what one of them needs, all do.
    blocks = condition or any(path.startswith(("patch_embed", "blocks/")) for path in learning)

    def below(path: str) -> bool:
      """Whether anything trains that the layer's input depends on."""
      name, _, part = path.partition("/")
      if part == "adaln":
        return condition
      if part.startswith("proj_out_logstds"):
        return part.endswith("3")  # an MLP of two layers on a detached embedding
      if name == "head":
        return blocks or "final_norm/adaln" in learning
      return blocks if name == "blocks" else (part == "out" and f"{name}/in" in learning)

    total = sum(layer.backward(below(layer.path)) for layer in layers)
    if not blocks:
      return total
    # Each product of the attention passes a gradient to both of its factors.
    return total + 2 * self.attention + self._again(gates=condition or "blocks/adaln" in learning)

  def _again(self, gates: bool) -> int:
    """What rematerialisation runs a second time; of the blocks, what the backward pass asks for.

    "full" runs them whole, but for the last layer's result where no gate needs it for a gradient. "dots" (and
    "offload") keep the dense layers' outputs and run the attention again, its second product only for a weight.
    """
    if self.remat == "none":
      return 0
    blocks = {layer.path: layer for layer in self.layers if layer.path.startswith("blocks/")}
    if self.remat != "full":
      proj = blocks["blocks/proj"]
      return self.attention if proj.kernel or proj.rank else self.attention // 2
    last = blocks["blocks/mlp_out"]
    unused = 0 if gates else last.product + last.up
    return self.attention + sum(layer.forward for layer in blocks.values()) - unused
