"""Flow maps: Align Your Flow (Eulerian and Lagrangian), MeanFlow and consistency distillation, in one core.

A flow map jumps from flow time t to s, f(x, t, s) = x + (s - t) F(x, t, s): F is the average velocity between them, and
the network. F obeys an identity with its own derivative. All objectives regress F on the other side of that identity,
with the derivative taken forward (`jax.jvp`); they differ in the settings of `FlowMap`, see `ayf_emd`, `ayf_lmd`,
`mean_flow` and `consistency`.

References:
  Align Your Flow, arXiv:2506.14603; MeanFlow, arXiv:2505.13447; sCM, arXiv:2410.11081.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pflow_jax.core.batches import per_example
from pflow_jax.core.checks import check_finite, check_names, checked
from pflow_jax.core.guidance import broadcast_condition
from pflow_jax.core.objectives.flow_matching import replace_condition, sample_time
from pflow_jax.core.policies.base import as_float
from pflow_jax.core.schedule import add_noise, over_space, shift_time

Array = jax.Array
# (x, t, s, cond, guidance) -> F, like x; guidance (B,) or None.
Network = Callable[[Array, Array, Array, Any, Array | None], Array]
# (x, t, cond, guidance) -> v, like x.
Teacher = Callable[[Array, Array, Any, Array | None], Array]


NORMALISATIONS = ("none", "rms", "l2", "adaptive")
TIMES = ("length", "pair")
SIDES = ("eulerian", "lagrangian")
TARGETS = ("teacher", "data")
DERIVATIVE_DTYPES = ("float32", "network")


@dataclasses.dataclass(frozen=True)
class FlowMap:
  """Settings of a flow-map objective.

  Attributes:
    side: "eulerian" differentiates F along the trajectory through (x, t), "lagrangian" in s, where the jump lands.
    target: the velocity at the end that is differentiated, the "teacher"'s or the "data"'s, eps - x0.
    times: how the interval is drawn. "length": its length is logit-normal(time_mean, time_std), its place uniform;
      "pair": t and s are a sorted pair of logit-normals.
    to_data: share of the examples whose interval is moved to the data: it keeps its drawn length and ends at s = 0. 1
      is a consistency model; t is then the drawn length.
    shift: time shift applied to the drawn times and to the sampler's grid.
    anchor: share of the examples with s = t, which is flow matching.
    warmup_steps: optimizer steps until the derivative counts in full (0: at once). Before, the regression is in part on
      the velocity itself.
    max_warmup: share of the derivative that counts as full. AYF's 0.99 keeps 1 % of the regression on the velocity, so
      that its minimum is not the exact map: on Gaussian data of standard deviation 0.5, that of the samples is 0.0043,
      0.0020 and 0.0010 off with 1, 2 and 4 steps. 1 has no such bias.
    normalisation: of the residual g of a sample, g / (size + norm_offset)^norm_power: "rms" takes the root mean square
      for its size, "l2" the plain norm, "adaptive" MeanFlow's sum of squares; "none" leaves g as it is.
    norm_power: the exponent, MeanFlow's p.
    norm_offset: keeps a small residual finite, MeanFlow's c.
    guidance: (low, high) strengths of guidance, drawn uniformly for every example; a student trained with several is
      conditioned on its own. (1, 1) is the teacher as it is set.
    omega: weight of the data in MeanFlow's guidance of its own target with target="data": v = omega (eps - x0) +
      (1 - omega - kappa) F_null(t, t) + kappa F_cond(t, t), as strong as a guidance of omega / (1 - kappa).
    kappa: weight of the network's conditional velocity in it.
    interval: flow times (low, high) of t, inclusive, in which omega and kappa count.
    cond_dropout: share of all examples whose condition is replaced by the empty one, with target="data"; they are drawn
      among those with s = t, and their target is not guided.
    derivative_dtype: what the derivative is computed in. "float32": a network that computes in less is evaluated once
      more, in float32 with exact products. "network": value and derivative are of one evaluation, as the network is.
  """

  sections: ClassVar[tuple[str, ...]] = ("teacher", "adapters", "adversarial")
  """Sections of a config that it uses beside those of every run."""

  side: str = "eulerian"
  target: str = "teacher"
  times: str = "length"
  time_mean: float = -0.8
  time_std: float = 1.0
  shift: float = 1.0
  to_data: float = 0.0
  anchor: float = 0.0
  warmup_steps: int = 10_000
  max_warmup: float = 0.99
  normalisation: str = "rms"
  norm_power: float = 1.0
  norm_offset: float = 0.1
  guidance: tuple[float, float] = (1.0, 1.0)
  omega: float = 1.0
  kappa: float = 0.0
  interval: tuple[float, float] = (0.0, 1.0)
  cond_dropout: float = 0.0
  derivative_dtype: str = "float32"

  def __post_init__(self):
    check_finite(self)
    check_names(self, side=SIDES, target=TARGETS, times=TIMES, normalisation=NORMALISATIONS)
    check_names(self, derivative_dtype=DERIVATIVE_DTYPES)
    for name in ("to_data", "anchor", "max_warmup", "cond_dropout"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
    if not (self.time_std > 0 and self.shift > 0 and self.warmup_steps >= 0):
      raise ValueError(
        "time_std, shift and warmup_steps: expected > 0, > 0 and >= 0, got "
        f"{self.time_std}, {self.shift} and {self.warmup_steps}"
      )
    if not (self.norm_power >= 0 and self.norm_offset > 0):
      raise ValueError(
        f"norm_power and norm_offset: expected >= 0 and > 0, got {self.norm_power} and {self.norm_offset}"
      )
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise ValueError(f"interval: expected flow times (low, high), 0 <= low <= high <= 1, got {self.interval}")
    if len(self.guidance) != 2 or not 0 < self.guidance[0] <= self.guidance[1]:
      raise ValueError(f"guidance: expected (low, high) with 0 < low <= high, got {self.guidance}")
    if self.target == "data" and (self.side == "lagrangian" or self.guided):
      raise ValueError(
        "target: 'data' gives a velocity at the start of a jump only, without guidance strengths; set side='eulerian' "
        "and guidance=(1, 1), or target='teacher'"
      )
    own = (self.omega, self.kappa, tuple(self.interval), self.cond_dropout)
    if self.target == "teacher" and own != (1, 0, (0, 1), 0):
      raise ValueError(
        "omega, kappa, interval, cond_dropout: expected their defaults with target='teacher', whose guidance counts"
      )
    if self.cond_dropout > self.anchor:
      raise ValueError(
        f"cond_dropout: conditions are dropped among the examples with s = t, expected at most anchor={self.anchor}, "
        f"got {self.cond_dropout}"
      )

  @property
  def guided(self) -> bool:
    """Returns whether the student is conditioned on a guidance strength."""
    return tuple(self.guidance) != (1.0, 1.0)

  def warmup(self, step: Array) -> Array | float:
    """Share of the derivative at optimizer step `step`."""
    if self.warmup_steps == 0:
      return self.max_warmup
    return jnp.minimum(self.max_warmup, step / self.warmup_steps)


def ayf_emd(**changes: Any) -> FlowMap:
  """Align Your Flow's Eulerian map distillation, the objective for images."""
  return dataclasses.replace(FlowMap(), **changes)


def ayf_lmd(**changes: Any) -> FlowMap:
  """Align Your Flow's Lagrangian map distillation: stable on points, over-smooth on images."""
  return dataclasses.replace(FlowMap(side="lagrangian"), **changes)


def mean_flow(**changes: Any) -> FlowMap:
  """MeanFlow: the Eulerian objective on the velocity of the data; no teacher is asked for one.

  The defaults are those of the official JAX release: its times, p = 1 and c = 0.01, omega = 1 and kappa = 0.5 (a
  guidance of strength 2) at all times, labels dropped for 0.1 of a batch. One thing differs: every example draws by
  itself whether s = t, and then whether its label is dropped; the release takes the first 75 % of a batch, and of these
  the first rows. Without classes set kappa and cond_dropout to 0, which saves two evaluations of the network a step.

  References:
    MeanFlow, arXiv:2505.13447.
  """
  settings = FlowMap(
    target="data",
    times="pair",
    time_mean=-0.4,
    anchor=0.75,
    warmup_steps=0,
    max_warmup=1.0,
    normalisation="adaptive",
    norm_offset=0.01,
    kappa=0.5,
    cond_dropout=0.1,
  )
  return dataclasses.replace(settings, **changes)


def consistency(**changes: Any) -> FlowMap:
  """Continuous-time consistency distillation: every jump of the Eulerian objective goes to the data.

  The times are sCM's, sigma = t / (1 - t) = exp(N(-1, 1.4^2)) for data of standard deviation 0.5: the median of t is
  0.27. `time_mean` and `time_std` change them. The warm-up and the normalisation are AYF's; sCM's learned weight of the
  loss is left out.

  References:
    sCM, arXiv:2410.11081.
  """
  return dataclasses.replace(FlowMap(to_data=1.0, time_mean=-1.0, time_std=1.4), **changes)


def sample_interval(key: Array, batch: int, settings: FlowMap) -> tuple[Array, Array]:
  """Draws times (t, s) of `batch` examples, each (batch,), 0 <= s <= t <= 1, as the settings say."""
  key_length, key_place, key_share = jax.random.split(key, 3)
  first = sample_time(key_length, (batch,), mean=settings.time_mean, std=settings.time_std)
  if settings.times == "length":
    length = first
    s = jax.random.uniform(key_place, (batch,)) * (1 - length)
    t = s + length
  else:
    second = sample_time(key_place, (batch,), mean=settings.time_mean, std=settings.time_std)
    t, s = jnp.maximum(first, second), jnp.minimum(first, second)
    length = t - s
  to_data, anchored = jax.random.uniform(key_share, (2, batch)) < jnp.array([[settings.to_data], [settings.anchor]])
  t, s = jnp.where(to_data, length, t), jnp.where(to_data, 0.0, s)
  t, s = shift_time(t, settings.shift), shift_time(s, settings.shift)
  return t, jnp.where(anchored, t, s)


def residual(
  network: Network,
  velocity: Callable[[Array, Array], Array],
  x: Array,
  t: Array,
  s: Array,
  cond: Any,
  guidance: Array | None,
  *,
  side: str,
  warmup: Array | float,
  precise: Network | None = None,
) -> tuple[Array, Array, Array]:
  """Residual of the identity between F and its derivative, F - v +- warmup (t - s) dF; 0 for the exact flow map.

  Args:
    network: see `Network`.
    velocity: (x, t) -> v, like x.
    x: states at `t`, (B, *space, C).
    t: flow times, (B,).
    s: flow times s <= t, (B,).
    cond: condition, passed on.
    guidance: strengths, (B,), or None.
    side: "eulerian" or "lagrangian".
    warmup: share of the derivative.
    precise: the network in float32, for the derivative alone; None is `network` itself, in the same evaluation.

  Returns:
    F with its gradient; the residual and dF (dF/dt along the flow, or dF/ds), both without one; all like x.
  """

  def jump(x, t, s):
    # Accelerators round the factors of a float32 product to bfloat16 unless asked not to.
    with jax.default_matmul_precision("highest"):
      return (precise or network)(x, t, s, cond, guidance)

  if side == "eulerian":
    v = jax.lax.stop_gradient(velocity(x, t))
    F, dF = jax.jvp(lambda x, t: jump(x, t, s), (x, t), (v, jnp.ones_like(t)))
    correction = dF
  else:
    F, dF = jax.jvp(lambda s: jump(x, t, s), (s,), (jnp.ones_like(s),))
    landed = jax.lax.stop_gradient(x + over_space(s - t, x) * F)
    v = jax.lax.stop_gradient(velocity(landed, s))
    correction = -dF
  g = jax.lax.stop_gradient(F - v + warmup * over_space(t - s, x) * correction)
  if precise is not None:
    F = network(x, t, s, cond, guidance)
  return F, g, jax.lax.stop_gradient(dF)


def flow_map_loss(
  network: Network,
  teacher: Teacher | None,
  x0: Array,
  cond: Any,
  key: Array,
  step: Array,
  settings: FlowMap,
  *,
  null_cond: Any = None,
  precise: Network | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Loss of a flow map: the residual times itself normalised; its gradient is that of a regression of F alone.

  An example whose residual is not finite does not count. Where F itself is not, its gradient cannot be, and the
  optimizer skips the step.

  Args:
    network: average velocity, see `Network`; must have a forward derivative.
    teacher: velocity, see `Teacher`; None with target="data".
    x0: data, (B, *space, C).
    cond: condition of the examples, see `core.objectives.flow_matching.replace_condition`.
    key: a PRNG key.
    step: optimizer step, for the warm-up.
    settings: the objective's.
    null_cond: the empty condition.
    precise: see `residual`.

  Returns:
    loss per example (B,), and metrics per example: rms of the residual and of the derivative, the share of examples
      left out because they are not finite, the flow time "t" that a jump starts from, and the warm-up.

  Raises:
    ValueError: for a network or teacher that returns anything but an array like x.

  References:
    Align Your Flow, arXiv:2506.14603, Sec. 3 and 4.
  """
  where = "flow_map_loss: {}(x, t, {}cond, guidance)"
  network = checked(where.format("network", "s, "), network)
  precise = precise and checked(where.format("precise", "s, "), precise)
  (x0,) = as_float(x0)
  key_time, key_noise, key_drop, key_guidance = jax.random.split(key, 4)
  batch = x0.shape[0]
  t, s = (a.astype(x0.dtype) for a in sample_interval(key_time, batch, settings))
  eps = jax.random.normal(key_noise, x0.shape, x0.dtype)
  x = add_noise(x0, eps, t)
  guidance = jax.random.uniform(key_guidance, (batch,), x0.dtype, *settings.guidance) if settings.guided else None

  if settings.target == "teacher":
    if teacher is None:
      raise ValueError("flow_map_loss: target='teacher' needs a teacher, got None")

    field = checked(where.format("teacher", ""), teacher)

    def velocity(x, t):
      return field(x, t, cond, guidance)
  else:
    v = _self_guided(network, eps - x0, x, t, cond, null_cond, settings)
    if settings.cond_dropout:
      dropped = jax.random.bernoulli(key_drop, settings.cond_dropout / settings.anchor, (batch,)) & (s == t)
      cond = replace_condition(dropped, cond, null_cond)
      v = jnp.where(over_space(dropped, v), eps - x0, v)

    def velocity(x, t):
      return v

  warmup = settings.warmup(step)
  F, g, dF = residual(network, velocity, x, t, s, cond, guidance, side=settings.side, warmup=warmup, precise=precise)
  loss, metrics = regression(F, g, dF, settings)
  return loss, metrics | {"t": t, "warmup": jnp.asarray(warmup)}


def regression(F: Array, g: Array, dF: Array, settings: FlowMap) -> tuple[Array, dict[str, Array]]:
  """Turns a residual into a loss of the gradient |F - sg(F) + normalised residual|^2.

  Args:
    F: output of the network, with its gradient.
    g: residual, like F, without one.
    dF: derivative, like F, for the metrics.
    settings: its normalisation.

  Returns:
    loss (B,), whose value falls with the residual, and metrics per example.
  """

  @per_example
  def of_each(F, g, dF):
    finite = jnp.all(jnp.isfinite(g), axis=tuple(range(1, g.ndim)))
    g, dF = (jnp.where(over_space(finite, a), a, 0.0) for a in (g, dF))
    normalised = normalise(g, settings)
    gradient = 2 * jnp.where(over_space(finite, F), F - jax.lax.stop_gradient(F), 0.0) * normalised
    metrics = {
      "residual": jnp.sqrt(_mean(g**2)).reshape(-1),
      "derivative": jnp.sqrt(_mean(dF**2)).reshape(-1),
      "masked": 1.0 - finite,
    }
    return _mean(gradient + g * normalised).reshape(-1), metrics

  return of_each(F, g, dF)


def normalise(g: Array, settings: FlowMap) -> Array:
  """Divides the residual of each sample by a power of its size, see `FlowMap.normalisation`; g is (B, *space, C)."""
  if settings.normalisation == "none":
    return g
  squares = _sum(g**2)
  count = g[0].size
  # The loss takes the mean over a sample where MeanFlow takes the sum.
  size, scale = {
    "rms": (jnp.sqrt(squares / count), 1),
    "l2": (jnp.sqrt(squares), 1),
    "adaptive": (squares, count),
  }[settings.normalisation]
  return g * (scale / (size + settings.norm_offset) ** settings.norm_power)


def _self_guided(network: Network, v: Array, x: Array, t: Array, cond: Any, null_cond: Any, settings: FlowMap) -> Array:
  """Guides MeanFlow's target by the network's own velocities, F(x, t, t), where t lies in the interval."""
  if (settings.omega, settings.kappa) == (1, 0):
    return v
  null = jax.tree.map(broadcast_condition, cond, null_cond)
  guided = settings.omega * v
  for share, c in ((1 - settings.omega - settings.kappa, null), (settings.kappa, cond)):
    if share != 0:
      guided += share * jax.lax.stop_gradient(network(x, t, t, c, None))
  low, high = settings.interval
  return jnp.where(over_space((low <= t) & (t <= high), v), guided, v)


def _sum(x: Array) -> Array:
  return jnp.sum(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def _mean(x: Array) -> Array:
  return jnp.mean(x, axis=tuple(range(1, x.ndim)), keepdims=True)
