"""FLOPs against counts by hand: of single operations, and of whole transformers in closed form."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pflow_jax.families.flux.network import Flux
from pflow_jax.mesh.chips import CHIPS
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.flash_jvp import flash_jvp
from pflow_jax.networks.heads import ArcHead, DXHead, GMFlowHead, VelocityHead
from pflow_jax.networks.layers import FREQUENCIES
from pflow_jax.training.flops import compute_seconds, count_flops


def flops(f, *shapes):
  return count_flops(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)))


def test_products_and_convolutions():
  assert flops(jnp.matmul, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
  assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * 2 * 3 * 4 * 5
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert flops(conv, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * 3 * 3 * 3


def test_products_of_float32_take_several_passes_of_bfloat16_units():
  def seconds(f, dtype, chip):
    """In time of that many operations of bfloat16."""
    shape = jax.ShapeDtypeStruct((2, 8, 8, 8), dtype)
    return round(compute_seconds(jax.make_jaxpr(f)(shape, shape), chip) * chip.peak_flops)

  convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
  attend = lambda q, k: flash_jvp(q, k, k)
  rows = ((None, 1, 2), ("high", 3, 2), ("highest", 6, 15))
  for one in (jnp.matmul, convolve, attend):
    plain = seconds(one, jnp.bfloat16, CHIPS["v5e"])
    assert plain > 0
    for precision, tpu, gpu in rows:
      with jax.default_matmul_precision(precision):
        assert seconds(one, jnp.bfloat16, CHIPS["h200"]) == plain
        assert seconds(one, jnp.float32, CHIPS["v5e"]) == tpu * plain
        assert seconds(one, jnp.float32, CHIPS["h200"]) == gpu * plain


def test_loops_count_their_length_and_nesting():
  def deep(x, w):
    body = lambda x, _: (jax.checkpoint(lambda y: jax.jit(jnp.matmul)(y, w))(x), None)
    return jax.lax.scan(body, x, length=12)[0]

  assert flops(deep, (3, 4), (4, 4)) == 12 * 2 * 3 * 4 * 4
  twice = flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), (3, 4), (4, 4))
  assert twice == 2 * 2 * 3 * 4 * 4


def test_gradient_of_a_product_costs_twice_the_product():
  grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))
  assert flops(grad, (4, 5), (3, 4)) == 3 * (2 * 3 * 4 * 5)


# Whole transformers. Sizes differ wherever they may, lest one stand for another.

BATCH, SIDE, CHANNELS, PATCH, TEXT, TEXT_WIDTH, POOLED, DEPTH, SINGLE, INNER = 3, 8, 5, 2, 7, 12, 10, 3, 4, 24
SPACE = dict(channels=CHANNELS, patch_size=PATCH)
WIDTHS = {"dit": 32, "flux": 64}
TOKENS, PIXELS = (SIDE // PATCH) ** 2, PATCH**2


def head_of(kind, layout):
  mixture = dict(num_components=6) | SPACE
  return {
    "velocity": lambda: VelocityHead(**SPACE, layout=layout),
    "gmflow": lambda: GMFlowHead(**mixture, layout=layout, logstd_inner_dim=INNER),
    "dx": lambda: DXHead(**SPACE, layout=layout, num_coefficients=9),
    "arc": lambda: ArcHead(**mixture, layout=layout),
  }[kind]()


def network_of(family, head, **changes):
  """Returns the network, and a condition for it."""
  if family == "dit":
    cond = jnp.zeros(BATCH, jnp.int32)
    return DiT(**SPACE, width=WIDTHS["dit"], depth=DEPTH, num_heads=4, num_classes=11, head=head, **changes), cond
  size = dict(num_heads=4, head_dim=16, rope_axes=(4, 6, 6), text_width=TEXT_WIDTH, pooled_width=POOLED)
  cond = {"text": jnp.zeros((BATCH, TEXT, TEXT_WIDTH)), "pooled": jnp.zeros((BATCH, POOLED))}
  return Flux(head, **SPACE, depth=DEPTH, single_depth=SINGLE, **size, **changes), cond


def closed_form(family, head):
  """Operations of one forward pass: (layers on what is given, blocks' layers, attention, the layers after them)."""
  d, product = WIDTHS[family], lambda rows, inputs, outputs: 2 * BATCH * rows * inputs * outputs
  block = lambda rows: product(rows, d, 4 * d) + product(rows, 4 * d, d)  # its MLP, both layers
  attention = lambda tokens: 2 * product(tokens, tokens, d)  # scores, and the sum of values that they weigh
  given = product(TOKENS, PIXELS * CHANNELS, d) + product(1, FREQUENCIES, d)
  after = product(1, d, d)  # of the time's embedding
  if family == "dit":
    blocks = DEPTH * (product(1, d, 6 * d) + product(TOKENS, d, 3 * d) + product(TOKENS, d, d) + block(TOKENS))
    attended = DEPTH * attention(TOKENS)
  else:
    given += product(TEXT, TEXT_WIDTH, d) + product(1, POOLED, d) + product(1, FREQUENCIES, d)
    after += 2 * product(1, d, d)  # of the pooled text's and the guidance's embeddings
    both = TOKENS + TEXT
    blocks = DEPTH * (2 * product(1, d, 6 * d) + 4 * product(both, d, d) + block(both))
    blocks += SINGLE * (product(1, d, 3 * d) + 4 * product(both, d, d) + block(both))
    attended = (DEPTH + SINGLE) * attention(both)
  values = {"velocity": CHANNELS, "gmflow": 6 * (CHANNELS + 1), "dx": 9 * CHANNELS, "arc": 6 * (CHANNELS + 1) + 5}
  after += product(1, d, 2 * d) + product(TOKENS, d, PIXELS * values[head])
  if head == "gmflow":  # the width of its mixtures, from a detached embedding
    given, after = given + product(1, d, INNER), after + product(1, INNER, 1)
  return given, blocks, attended, after


def traced(family, head, gradient, **changes):
  network, cond = network_of(family, head_of(head, family), **changes)
  inputs = (jnp.zeros((BATCH, SIDE, SIDE, CHANNELS)), jnp.zeros(BATCH), cond)
  params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  loss = lambda params: sum(jnp.sum(out**2) for out in jax.tree.leaves(network.apply(params, *inputs)))
  return count_flops(jax.make_jaxpr(jax.grad(loss) if gradient else loss)(params))


@pytest.mark.parametrize("head", ["velocity", "gmflow", "dx", "arc"])
@pytest.mark.parametrize("family", WIDTHS)
def test_a_transformer_forward_and_backward(family, head):
  """A gradient costs every product twice more; once, where the factor is given and only the weight is asked for."""
  given, blocks, attention, after = closed_form(family, head)
  forward = given + blocks + attention + after
  assert traced(family, head, False) == forward
  assert traced(family, head, True) == 3 * forward - given


@pytest.mark.parametrize("family", WIDTHS)
def test_rematerialisation_runs_blocks_again(family):
  _, blocks, attention, _ = closed_form(family, "arc")
  kept = traced(family, "arc", True)
  assert traced(family, "arc", True, remat="full") == kept + blocks + attention
  assert traced(family, "arc", True, remat="dots") == kept + attention
  assert traced(family, "arc", True, remat="layers") == kept + attention // 2, "the scores alone"
