"""Operations of one optimizer step in closed form, from a transformer's sizes: a check on what is counted by tracing.

A product of matrices counts 2 a multiply-add, all else nothing, as in `flops.count_flops`. Left out are an adversary,
and the products inside GMFlow and DX policies: their rollouts took 0.15 % of a step or less from DiT-S/2 upwards.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from pflow_jax.core.objectives.flow_map import FlowMap
from pflow_jax.core.objectives.imitation import Imitation
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.mesh.partition import first_match
from pflow_jax.networks import heads
from pflow_jax.networks.attention import LANES
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.layers import FREQUENCIES
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.network import AdapterSettings


def analytic_step_flops(experiment: Experiment, batch_size: int, *, data_free: bool = False) -> int | None:
  """Operations of one optimizer step, teacher included, as `step.step_flops` counts them by tracing, to 1 %.

  Args:
    batch_size: examples a step; however they are accumulated, the step is linear in them.
    data_free: whether the objective is "imitation_data_free", which an Experiment does not say.
  Returns: operations, or None for a network that is neither a DiT nor made of MMDiT blocks.
  """
  objective = experiment.objective
  if not isinstance(experiment.network.module, (DiT, Flux, QwenImage)):
    return None
  student = _Transformer.of(experiment)
  passes = student.forward() + student.backward()
  teacher = _teacher(experiment, student)
  if teacher is None:
    return None
  if isinstance(objective, Imitation):
    # Without data a step walks all segments, with data one. The teacher's outputs are constants: it has no backward
    # pass, nor have the rollouts that lead to its inputs.
    segments = objective.nfe if data_free else 1
    if segments > 1 and student.remat != "none":
      passes += student.forward()  # the student is evaluated again, see experiment._imitation
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


def _teacher(experiment: Experiment, student: _Transformer) -> int | None:
  """One evaluation of the teacher's velocity for one example, guided if it is; None for a weak one that is no DiT."""
  if experiment.teacher is None:
    return 0
  settings, objective = experiment.teacher.settings, experiment.objective
  strong = student.as_teacher()
  if settings.guidance == 1 and not (isinstance(objective, FlowMap) and objective.guided):
    return strong.forward()
  if not settings.autoguided:
    # Both branches are one call under vmap, in which what sees neither condition is not doubled: the image's tokens,
    # the time and, where the condition is a text's tokens, what is made of the time.
    alike = [layer for layer in strong.layers if layer.path.startswith(("patch_embed", "img_in", "time_embed"))]
    if student.kind is QwenImage:
      alike += [layer for layer in strong.layers if layer.path.endswith(("mod", "adaln"))]
    return 2 * strong.forward() - sum(layer.product for layer in alike)
  blocks = experiment.teacher.shapes["weak"].get("blocks", {})
  if "qkv" not in blocks:
    return None
  patch = experiment.teacher.shapes["weak"]["patch_embed"]["kernel"].shape[0]
  depth, width, _ = blocks["qkv"]["kernel"].shape
  hidden = blocks["mlp_in"]["kernel"].shape[-1]
  tokens = student.stacks[0].tokens * student.patch // patch
  return strong.forward() + _dit(tokens, patch, width, depth, hidden).forward()


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
class _Stack:
  """`depth` blocks that are one scan: what one of them needs of a pass, all do.

  Attributes:
    tokens, width: of the attention.   layers: (rows, inputs, outputs) of a block, by name.
    last: the layers whose results, but for their gates, nothing else of the block reads.
    after: the attention's output layers.
  """

  name: str
  depth: int
  tokens: int
  width: int
  layers: dict[str, tuple[int, int, int]]
  last: tuple[str, ...]
  after: tuple[str, ...]

  @property
  def attention(self) -> int:
    """Scores, and the sum of values that they weigh: each a product of tokens x tokens x width."""
    return self.depth * 2 * (2 * self.tokens**2 * self.width)

  def dense(self) -> list[_Dense]:
    return [_Dense(f"{self.name}/{name}", *sizes, copies=self.depth) for name, sizes in self.layers.items()]


def _dit_stack(tokens: int, width: int, depth: int, hidden: int) -> _Stack:
  layers = {"adaln": (1, width, 6 * width), "qkv": (tokens, width, 3 * width), "proj": (tokens, width, width)}
  layers |= {"mlp_in": (tokens, width, hidden), "mlp_out": (tokens, hidden, width)}
  return _Stack("blocks", depth, tokens, width, layers, last=("mlp_out",), after=("proj",))


def _double_stack(image: int, text: int, width: int, depth: int, hidden: int) -> _Stack:
  layers: dict[str, tuple[int, int, int]] = {}
  for prefix, tokens in (("img_", image), ("txt_", text)):
    layers |= {f"{prefix}mod": (1, width, 6 * width)}
    layers |= {f"{prefix}{name}": (tokens, width, width) for name in ("q", "k", "v", "out")}
    layers |= {f"{prefix}mlp_in": (tokens, width, hidden), f"{prefix}mlp_out": (tokens, hidden, width)}
  last, after = ("img_mlp_out", "txt_mlp_out"), ("img_out", "txt_out")
  return _Stack("double_blocks", depth, image + text, width, layers, last, after)


def _single_stack(tokens: int, width: int, depth: int, hidden: int) -> _Stack:
  layers = {"mod": (1, width, 3 * width)} | {name: (tokens, width, width) for name in ("q", "k", "v")}
  layers |= {"mlp_in": (tokens, width, hidden), "out": (tokens, width + hidden, width)}
  return _Stack("single_blocks", depth, tokens, width, layers, last=("out",), after=("out",))


def _dit(tokens: int, patch: int, width: int, depth: int, hidden: int) -> _Transformer:
  """A DiT with a velocity's head."""
  stack = _dit_stack(tokens, width, depth, hidden)
  return _Transformer(DiT, width, patch, (("patch_embed", tokens, patch),), (("time_embed", FREQUENCIES),), (stack,))


@dataclasses.dataclass(frozen=True)
class _Transformer:
  """Sizes of a transformer; what its passes cost for one example.

  Attributes:
    kind: class of the network.   patch: values a patch.
    inputs: layers that make tokens, (name, tokens, values a token).   embeddings: MLPs of two layers, (name, inputs).
    stacks: of blocks, in order.
    outputs: of the head, by layer: (name, values a token). None is a velocity's.   log_std: width of GMFlow's MLP.
    fused: whether the attention is a kernel that keeps no scores and makes them again, twice, in its backward pass.
    remat, adapters: of the network.
  """

  kind: type
  width: int
  patch: int
  inputs: tuple[tuple[str, int, int], ...]
  embeddings: tuple[tuple[str, int], ...]
  stacks: tuple[_Stack, ...]
  outputs: tuple[tuple[str, int], ...] | None = None
  log_std: int = 0
  fused: bool = False
  remat: str = "none"
  adapters: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)

  @classmethod
  def of(cls, experiment: Experiment) -> _Transformer:
    """The network that trains."""
    module: Any = experiment.network.module
    objective, dataset = experiment.objective, experiment.dataset
    head, space = module.head, dataset.shape[:-1]
    pixels, channels = module.patch_size ** len(space), module.channels
    tokens = math.prod(side // module.patch_size for side in space)
    outputs = {"proj_out": head.maps * channels}
    if isinstance(head, (heads.GMFlowHead, heads.ArcHead)):
      outputs = {"proj_out_means": head.maps * channels, "proj_out_logweights": head.maps}
    if isinstance(head, heads.ArcHead):
      outputs["proj_out_loggamma"] = head.maps - 1
    embeddings = [("time_embed", FREQUENCIES)]
    if isinstance(objective, FlowMap):
      embeddings += [("length_embed", FREQUENCIES), *[("guidance_embed", FREQUENCIES)] * objective.guided]
    if isinstance(module, DiT):
      width = module.width
      inputs = [("patch_embed", tokens, pixels * channels)]
      embeddings += [("pooled_embed", module.pooled_width)] if module.pooled_width is not None else []
      stacks = [_dit_stack(tokens, width, module.depth, int(width * module.mlp_ratio))]
    else:
      width, text = module.num_heads * module.head_dim, dataset.cond_shapes(1)["text"].shape[1]
      hidden = int(width * module.mlp_ratio)
      inputs = [("img_in", tokens, pixels * channels), ("txt_in", text, module.text_width)]
      stacks = [_double_stack(tokens, text, width, module.depth, hidden)]
      if isinstance(module, Flux):
        stacks.append(_single_stack(tokens + text, width, module.single_depth, hidden))
        embeddings += [("pooled_embed", module.pooled_width)]
        embeddings += [("guidance_embed", FREQUENCIES)] if module.guidance is not None else []
    fused = module.attention == "splash"
    if fused:
      stacks = [dataclasses.replace(stack, tokens=-(-stack.tokens // LANES) * LANES) for stack in stacks]
    return cls(
      kind=type(module),
      width=width,
      patch=pixels * channels,
      inputs=tuple(inputs),
      embeddings=tuple(embeddings),
      stacks=tuple(stacks),
      outputs=tuple((name, pixels * values) for name, values in outputs.items()),
      log_std=head.logstd_inner_dim if isinstance(head, heads.GMFlowHead) and head.learns_log_std else 0,
      fused=fused,
      remat=module.remat,
      adapters=experiment.network.adapters,
    )

  def as_teacher(self) -> _Transformer:
    """The same network with a velocity's head, without what a flow map or a student has besides."""
    own = ("length_embed", "guidance_embed") if self.kind is DiT else ("length_embed",)
    embeddings = tuple(embedding for embedding in self.embeddings if embedding[0] not in own)
    return dataclasses.replace(self, embeddings=embeddings, outputs=None, log_std=0, adapters=AdapterSettings())

  @property
  def layers(self) -> list[_Dense]:
    d, tokens = self.width, self.inputs[0][1]
    layers = [_Dense(name, rows, values, d) for name, rows, values in self.inputs]
    for name, values in self.embeddings:
      layers += [_Dense(f"{name}/in", 1, values, d), _Dense(f"{name}/out", 1, d, d)]
    for stack in self.stacks:
      layers += stack.dense()
    layers += [_Dense("final_norm/adaln", 1, d, 2 * d)]
    layers += [_Dense(f"head/{name}", tokens, d, values) for name, values in self.outputs or [("proj_out", self.patch)]]
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
    own = ("head/", "length_embed/", *(["guidance_embed/"] if self.kind is DiT else []))
    full = not self.adapters.table or path.startswith(own)
    return full or any(re.fullmatch(pattern, path) for pattern in self.adapters.train)

  @property
  def attention(self) -> int:
    return sum(stack.attention for stack in self.stacks)

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
    condition = (self.kind is DiT and self._trains("class_embed/embedding")) or any(
      f"{name}/{part}" in learning for name, _ in self.embeddings for part in ("in", "out")
    )
    # By stack, whether its tokens get a gradient.
    reached, so_far = {}, condition or any(name in learning for name, *_ in self.inputs)
    for stack in self.stacks:
      so_far = so_far or any(path.startswith(f"{stack.name}/") for path in learning)
      reached[stack.name] = so_far

    def below(path: str) -> bool:
      """Whether anything trains that the layer's input depends on."""
      name, _, part = path.partition("/")
      if part == "adaln" or part.endswith("mod"):
        return condition
      if part.startswith("proj_out_logstds"):
        return part.endswith("3")  # an MLP of two layers on a detached embedding
      if name == "head":
        return so_far or "final_norm/adaln" in learning
      return reached.get(name, part == "out" and f"{name}/in" in learning)

    total = sum(layer.backward(below(layer.path)) for layer in layers)
    for stack in self.stacks:
      if reached[stack.name]:
        # Each product of the attention passes a gradient to both of its factors.
        total += stack.attention * (7 if self.fused else 4) // 2
        total += self._again(stack, gates=condition or any(f"{stack.name}/{m}" in learning for m in _mods(stack)))
    return total

  def _again(self, stack: _Stack, gates: bool) -> int:
    """What rematerialisation runs a second time; of the blocks, what the backward pass asks for.

    "full" runs them whole, but for the last layers' results where no gate needs them for a gradient. "dots" (and
    "offload") keep the dense layers' outputs and run the attention again, its second product only for a weight.
    """
    if self.remat == "none":
      return 0
    blocks = {layer.path.split("/")[1]: layer for layer in self.layers if layer.path.startswith(f"{stack.name}/")}
    if self.remat != "full":
      needed = self.fused or any(blocks[name].kernel or blocks[name].rank for name in stack.after)
      return stack.attention if needed else stack.attention // 2
    unused = 0 if gates else sum(blocks[name].product + blocks[name].up for name in stack.last)
    return stack.attention + sum(layer.forward for layer in blocks.values()) - unused


def _mods(stack: _Stack) -> list[str]:
  return [name for name in stack.layers if name.endswith(("mod", "adaln"))]
