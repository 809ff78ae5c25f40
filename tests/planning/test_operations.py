"""The list of bytes by kind of work and operation."""

import types

import jax
import jax.numpy as jnp
import pytest

from pflow_jax.planning.hlo_memory import Move, memory_moves, memory_traffic
from pflow_jax.planning.operations import as_dict, operations

LAYOUT = types.SimpleNamespace(mesh=types.SimpleNamespace(shape={"fsdp": 16, "tensor": 1}))
PARAMS = {"kernel": jax.ShapeDtypeStruct((28, 1152, 4608), jnp.float32)}
STEP = "jit(step)/jvp(DiT)/while/body/closed_call/checkpoint"
BACK = "jit(step)/transpose(jvp(DiT))/while/body/closed_call/checkpoint"


@pytest.mark.parametrize(
  ("name", "opcode", "shape", "kind", "shown"),
  [
    (f"{STEP}/blocks/attention/exp", "fusion", "f32[16,256]{1,0}", "attention", "attention/exp"),
    (f"{BACK}/blocks/qkv/dot_general", "fusion", "f32[16,256]", "attention", "backward: qkv/dot_general"),
    (f"{STEP}/blocks/img_mlp_in/dot_general", "fusion", "f32[16,256]", "MLP", "img_mlp_in/dot_general"),
    (f"{BACK}/rematted_computation/blocks/jit(gelu)/tanh", "fusion", "f32[1]", "MLP", "again: jit(gelu)/tanh"),
    (f"{STEP}/blocks/mul", "fusion", "(f32[16,256]{1,0}, f32[2])", "norms and gates", "blocks/mul"),
    (f"{STEP}/blocks/mul", "reshape", "f32[16,256]", "copies", "blocks/mul (reshape)"),
    ("", "copy-start", "(f32[16,256], f32[16,256])", "copies", "copy-start"),
    ("", "copy-start", "(bf16[1,72,4608]{2,1,0}, bf16[1,72,4608]{2,1,0:S(1)})", "weights", "copy-start"),
    (f"{BACK}/jit(dynamic_index_in_dim)/dynamic_slice", "fusion", "bf16[1,16,256]", "kept", "backward: jit(dyn"),
    (f"{STEP}/blocks/x", "all-gather-start", "(f32[72,4608], f32[1152,4608])", "collectives", "blocks/x"),
    ("jit(step)/cond/branch_1_fun/mul", "fusion", "f32[28,72,4608]", "optimizer", "branch_1_fun/mul"),
    ("jit(step)/jvp()/shard_map/vmap()/mul", "fusion", "f32[16,1024]", "other", "vmap()/mul"),
  ],
)
def test_every_move_has_its_kind(name, opcode, shape, kind, shown):
  (found,) = operations([Move(name, opcode, shape, 10, 2), Move(name, opcode, shape, 5, 1)], PARAMS, LAYOUT)
  assert (found.kind, found.bytes, found.count) == (kind, 15, 3)
  assert found.name.startswith(shown)
  assert as_dict([found])["kinds"][kind] == 15


def test_moves_have_the_names_of_their_operations():
  def f(x, y):
    with jax.named_scope("blocks"), jax.named_scope("mlp_in"):
      return jnp.sin(x @ y)

  text = jax.jit(f).lower(*[jnp.ones((64, 64), jnp.float32)] * 2).compile().as_text()
  moves = memory_moves(text)
  assert sum(move.bytes for move in moves) == memory_traffic(text) == 5 * 64 * 64 * 4
  assert all("blocks/mlp_in/" in move.name for move in moves)
  assert all(move.count == 1 for move in moves)
