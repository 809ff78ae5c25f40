"""FLOPs against counts by hand."""

import jax
import jax.numpy as jnp

from pflow_jax.training.flops import count_flops


def flops(f, *shapes):
  return count_flops(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)))


def test_products_and_convolutions():
  assert flops(jnp.matmul, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
  assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * 2 * 3 * 4 * 5
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert flops(conv, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * 3 * 3 * 3


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
