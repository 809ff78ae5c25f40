"""The state is a pytree that can be donated, replaced and built abstractly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pflow_jax.training.state import TrainState, create_state

PARAMS = {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.zeros(3, jnp.float32)}}


def test_create_state():
  state = create_state(PARAMS, optax.adam(0.1))
  assert state.step.shape == ()
  assert state.step.dtype == jnp.int32
  assert {x.dtype for x in jax.tree.leaves(state.ema)} == {np.dtype(np.float32)}
  jax.tree.map(np.testing.assert_array_equal, state.ema, PARAMS)


def test_is_a_pytree_with_named_fields():
  abstract = jax.eval_shape(lambda: create_state(PARAMS, optax.adam(0.1)))
  assert isinstance(abstract, TrainState)
  names = {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
  assert names == {"step", "params", "ema", "opt_state"}


def test_average_is_a_copy_that_allows_donation():
  params = {"w": jnp.ones(5, jnp.float32)}
  for state in (
    create_state(params, optax.sgd(0.1)),
    jax.jit(lambda p: create_state(p, optax.sgd(0.1)))(params),
  ):
    assert state.ema["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()
  step = jax.jit(lambda s: dataclasses.replace(s, step=s.step + 1), donate_argnums=0)
  after = step(state)
  assert int(after.step) == 1
  np.testing.assert_array_equal(after.ema["w"], np.ones(5))
