"""Layout of the golden vectors, and the toy networks that they were made with (see golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.policies import ArcPolicy, DXPolicy, GMFlowPolicy


def channels_last(array):
  """(..., C, H, W) -> (..., H, W, C)."""
  return jnp.moveaxis(jnp.asarray(array), -3, -1)


def released(golden, name, release):
  """The file `name` with the numbers that a release made of its inputs, see golden/README.md."""
  return golden(name) | (golden(f"{release}/{name}") if release == "lakonlab-0.2" else {})


def toy_teacher(x, t, cond=None):
  del cond
  return 0.7 * x + 0.3 * jnp.sin(3 * x) - 0.4 * t[:, None, None, None]


def toy_params(file):
  """The toy student's parameters, channels last and without their batch axis of one."""
  return {
    "means": channels_last(file["in_param_means"])[0],
    "lw": jnp.asarray(file["in_param_lw"])[0, :, 0],
    "ls": jnp.asarray(file["in_param_ls"]).reshape(()),
    "lg": jnp.asarray(file["in_param_lg"])[0, :, 0],
  }


def toy_student(params, kind, **options):
  """(x, t, cond) -> batch of policies of `kind` "GM", "DXgrid", "DXpolynomial" or "Arc"."""

  def one(x, t):
    means = params["means"] + 0.5 * x[None] + 0.25 * t
    logits = jax.nn.log_softmax(params["lw"] * (1 + t), axis=0)
    if kind == "GM":
      return GMFlowPolicy.create(x, t, means, logits, params["ls"], **options)
    if kind == "Arc":
      return ArcPolicy.create(x, t, means, logits, params["lg"], **options)
    # The release keeps every coefficient of the polynomial as a denoised state.
    return DXPolicy.create(x, t, means, basis=kind[2:], compat=True, **options)

  return lambda x, t, cond=None: jax.vmap(one)(x, t)


def toy_gradients(file):
  """`out_grad_*` of a file in the layout of `toy_params`."""
  return {
    "means": channels_last(file["out_grad_means"])[0],
    "lw": jnp.asarray(file["out_grad_lw"])[0, :, 0],
    "ls": jnp.asarray(file["out_grad_ls"]).reshape(()),
    "lg": jnp.asarray(file["out_grad_lg"])[0, :, 0],
  }


def gm_outputs(file, means="in_means", logits="in_logweights", log_std="in_logstds"):
  """A file's arrays as `GMFlowPolicy.create` takes them, batched."""
  return channels_last(file[means]), jnp.asarray(file[logits])[:, :, 0], jnp.asarray(file[log_std]).reshape(-1)


def assert_close(actual, expected, rtol, atol=0.0):
  """Compares to `rtol` of the largest expected magnitude."""
  scale = float(np.max(np.abs(expected)))
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol + rtol * scale)
