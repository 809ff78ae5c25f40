"""Random policies, a converged solver and derivative checks that the tests of policies and integration share."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.policies import ArcPolicy, DXPolicy, GMFlowPolicy

# Compiled once for each shape: a bound class method is a new function at every access.
_create_gmflow = jax.jit(GMFlowPolicy.create)
_create_dx = jax.jit(DXPolicy.create, static_argnames=("basis", "compat"))
_create_arc = jax.jit(ArcPolicy.create)


def gmflow(seed=0, *, k=8, space=(3,), c=2, t_s=1.0, std=0.3, spread=1.0, dtype=jnp.float64):
  """A state and a mixture over it: clean samples lie around a common centre, as far apart as t_s leaves open."""
  normal = np.random.default_rng(seed).normal
  centre = (1 - t_s) * normal(size=(*space, c))
  x = centre + t_s * normal(size=(*space, c))
  x0 = centre + t_s * spread * normal(size=(k, *space, c))
  outputs = (x, t_s, (x - x0) / t_s, normal(size=(k, *space)), np.log(std))
  outputs = [jnp.asarray(a, dtype) for a in outputs]
  return outputs[0], _create_gmflow(*outputs)


def dx(seed=0, *, n=4, space=(3,), c=2, t_s=1.0, dtype=jnp.float64, **options):
  """A state and a DX policy over it."""
  normal = np.random.default_rng(seed).normal
  x, t_s, d = (jnp.asarray(a, dtype) for a in (normal(size=(*space, c)), t_s, normal(size=(n, *space, c))))
  return x, _create_dx(x, t_s, d, **options)


def arc(seed=0, *, k=4, space=(3,), c=2, t_s=1.0, dtype=jnp.float64):
  """A state and an ArcFlow policy over it."""
  normal = np.random.default_rng(seed).normal
  shapes = [(*space, c), (k, *space, c), (k, *space), (k - 1, *space)]
  x, *outputs = (jnp.asarray(normal(size=shape), dtype) for shape in shapes)
  return x, _create_arc(x, jnp.asarray(t_s, dtype), *outputs)


velocity = jax.jit(lambda policy, x, t: policy.velocity(x, t))
integrate = jax.jit(lambda policy, x, t, s: policy.integrate(x, t, s))


@jax.jit
def converged(policy, x, t, s):
  """State at flow time s by an adaptive method of order 8, from nothing but `velocity`, which must be smooth."""
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, x, policy: policy.velocity(x, t)),
    diffrax.Dopri8(),
    t,
    s,
    dt0=None,
    y0=x,
    args=policy,
    stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-12),
    max_steps=10_000,
  )
  return solution.ys[0]


def assert_derivative(f, *args, seed=0, step=1e-5, rtol=1e-6):
  """Compares the jvp of f along a random direction of all its arguments with a difference of fourth order (float64)."""
  leaves, tree = jax.tree.flatten(args)
  leaves = [jnp.asarray(leaf, jnp.float64) for leaf in leaves]
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  direction = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]

  @jax.jit
  def along(h):
    return f(*jax.tree.unflatten(tree, [a + h * d for a, d in zip(leaves, direction, strict=True)]))

  expected = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
  actual = jax.jvp(along, (0.0,), (1.0,))[1]
  scale = float(jnp.max(jnp.abs(expected)))
  assert scale > 1e-3
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)
