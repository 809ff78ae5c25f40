"""Traffic of compiled programs against bytes worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pflow_jax.planning import hlo
from pflow_jax.planning.hlo import Traffic
from pflow_jax.planning.hlo_memory import memory_traffic

BYTES = 64 * 32 * 4  # of the arrays below, float32


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def compiled(f, mesh, *specs, shape=(64, 32)):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
  return jax.jit(f).lower(*arguments).compile().as_text()


def manual(f, mesh):
  """Text of a program in which every device runs f on an array (64, 32) of its own."""
  spec = P(("data", "model"))
  mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return compiled(mapped, mesh, spec, shape=(8 * 64, 32))


def ring(shift, size=4):
  return [(i, (i + shift) % size) for i in range(size)]


CASES = {
  "all-gather": (lambda x: lax.all_gather(x, "model", tiled=True)[:64], Traffic(1, 4 * BYTES, 3 * BYTES)),
  "reduce-scatter": (
    lambda x: jnp.tile(lax.psum_scatter(x, "model", tiled=True), (4, 1)),
    Traffic(1, BYTES, BYTES * 3 // 4),
  ),
  "all-reduce": (lambda x: lax.psum(x, "data"), Traffic(1, BYTES, BYTES)),
  "all-to-all": (lambda x: lax.all_to_all(x, "model", 0, 0, tiled=True), Traffic(1, BYTES, BYTES * 3 // 4)),
  "collective-permute": (lambda x: lax.ppermute(x, "model", ring(1)), Traffic(1, BYTES, BYTES)),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_collective_on_one_axis_of_two(kind, mesh):
  f, expected = CASES[kind]
  found = hlo.collectives(manual(f, mesh))
  assert found == hlo.Collectives({kind: expected}, {}, 0)


def test_over_both_axes_the_group_is_everything(mesh):
  found = hlo.collectives(manual(lambda x: lax.psum(x, ("data", "model")), mesh))
  assert found.ici == {"all-reduce": Traffic(1, BYTES, 2 * BYTES * 7 // 8)}


def test_nothing_moves_where_nothing_is_shared(mesh):
  assert hlo.collectives(manual(jnp.sin, mesh)) == hlo.Collectives({}, {}, 0)


def test_loops_multiply_and_nest(mesh):
  def inner(x, _):
    return lax.psum(jnp.sin(x), "data"), None

  def outer(x, _):
    return lax.scan(inner, x, length=5)[0] * 2, None

  found = hlo.collectives(manual(lambda x: lax.scan(outer, x, length=3)[0], mesh))
  assert found == hlo.Collectives({"all-reduce": Traffic(15, 15 * BYTES, 15 * BYTES)}, {}, 0)
  counted = hlo.collectives(manual(lambda x: lax.fori_loop(2, 9, lambda i, x: lax.psum(x * i, "data"), x), mesh))
  assert counted.ici["all-reduce"].count == 7


def test_a_loop_of_unknown_length_counts_once_and_is_reported(mesh):
  def f(x):
    return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: lax.psum(x, "data"), x)

  assert hlo.collectives(manual(f, mesh)) == hlo.Collectives({"all-reduce": Traffic(1, BYTES, BYTES)}, {}, 1)


def test_of_a_conditional_the_larger_branch_counts(mesh):
  def f(x):
    return lax.cond(
      jnp.sum(x) > 0, lambda x: lax.psum(lax.psum(x, "data") * 2, "model"), lambda x: lax.psum(x, "data"), x
    )

  found = hlo.collectives(manual(f, mesh)).ici["all-reduce"]
  assert found == Traffic(2, 2 * BYTES, BYTES + 2 * BYTES * 3 // 4)


def test_a_sharded_program_gathers_its_weight_and_reduces_the_gradient(mesh):
  """What the partitioner makes of a weight that is sharded over "model", for examples over both axes."""
  whole = NamedSharding(mesh, P())

  def loss(w, x):
    return jnp.sum(jnp.tanh(x @ lax.with_sharding_constraint(w, whole).T) ** 2)

  found = hlo.collectives(compiled(jax.grad(loss), mesh, P("model"), P(("data", "model"))))
  gather, reduction = Traffic(1, BYTES, BYTES * 3 // 4), Traffic(1, BYTES, 2 * BYTES * 7 // 8)
  assert found == hlo.Collectives({"all-gather": gather, "all-reduce": reduction}, {}, 0)


def test_traffic_is_split_at_the_slices(mesh):
  """Two slices of four devices: "model" lies within one, "data" joins them."""
  text = manual(lambda x: lax.psum(lax.ppermute(lax.psum(x, "model"), "model", ring(1)), "data"), mesh)
  found = hlo.collectives(text, devices_per_slice=4)
  assert found.dcn == {"all-reduce": Traffic(1, BYTES, BYTES)}
  assert found.ici == {
    "all-reduce": Traffic(1, BYTES, 2 * BYTES * 3 // 4),
    "collective-permute": Traffic(1, BYTES, BYTES),
  }
  assert hlo.collectives(text).dcn == {}


@pytest.fixture(scope="module")
def alone():
  """Text of a program on one device."""

  def of(f, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*arguments).compile().as_text()

  return of


def test_memory_of_a_product_and_what_is_fused_into_it(alone):
  n = 256
  product = 3 * n * n * 4
  assert memory_traffic(alone(jnp.matmul, (n, n), (n, n))) == product
  pointwise = alone(lambda x: jnp.sin(x) * 2 + 1, (n, n))
  assert memory_traffic(pointwise) == pytest.approx(2 * n * n * 4, rel=1e-3)


def test_memory_of_a_scan_counts_the_slice_that_each_turn_reads_and_writes(alone):
  """Twelve weights, stacked: every turn reads one and writes one state, not all twelve."""
  n, turns = 128, 12

  def f(x, ws):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, ws)

  one = n * n * 4
  found = memory_traffic(alone(f, (n, n), (turns, n, n)))
  # The slice and its copy, the product, the tanh, the write of the state: 8 to 12 moves of a matrix.
  assert 8 * turns * one <= found <= 13 * turns * one


# What follows is the TPU compiler's way of writing, cut down from real programs.

SHAPES = {
  "<x>": "f32[8,128]{1,0:T(8,128)}",
  "<4x>": "f32[32,128]{1,0:T(8,128)}",
  "<h>": "bf16[8,128]{1,0:T(8,128)(2,1)}",
  "<4h>": "bf16[32,128]{1,0:T(8,128)(2,1)}",
  "<4h on chip>": "bf16[32,128]{1,0:T(8,128)(2,1)S(1)}",
  "<i>": "s32[]{:T(128)}",
  "<flag>": "u32[]{:S(2)}",
}
X, H = 8 * 128 * 4, 8 * 128 * 2


def program(text):
  """A whole text from parts of one, with the shapes that <names> stand for."""
  add = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}
"""
  for name, shape in SHAPES.items():
    text = text.replace(name, shape)
  return f"HloModule step, is_scheduled=true, num_partitions=8\n{add}{text}"


def reduction(groups):
  return program("""
ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = <x> parameter(0)
  ROOT %r = <x> all-reduce(%p), channel_id=1, replica_groups=GROUPS, use_global_device_ids=true, to_apply=%add
}
""").replace("GROUPS", groups)


@pytest.mark.parametrize(
  ("groups", "size", "across"),
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", 2, False),
    ("{{0,4},{1,5},{2,6},{3,7}}", 2, True),
    ("{}", 8, True),
    ("[2,4]<=[8]", 4, False),
    ("[4,2]<=[2,4]T(1,0)", 2, True),
    ("mesh['a'=2,'b'=4] {'b'}", 4, False),
    ("mesh['a'=2,'b'=4] {'a'}", 2, True),
    ("mesh['a'=2,'b'=4] {'a','b'}", 8, True),
    ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4, False),
    ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", 2, True),
    ("mesh[a=8] {a:(1)2}", 2, True),
    ("mesh[a=8] {a:(2)4}", 4, False),
    ("mesh[a=8] {a:(2)2}", 2, False),
    ("mesh[a=8], device_ids=(0,4,1,5,2,6,3,7) {a:(4)2}", 2, True),
  ],
)
def test_forms_of_groups(groups, size, across):
  """Eight devices in two slices of four."""
  found = hlo.collectives(reduction(groups), devices_per_slice=4)
  expected = {"all-reduce": Traffic(1, X, 2 * X * (size - 1) // size)}
  assert (found.ici, found.dcn) == (({}, expected) if across else (expected, {}))


def test_an_all_reduce_fused_with_its_slice_is_a_reduce_scatter():
  text = program("""
%all-reduce-scatter.1 (input: f32[32,128]) -> f32[8,128] {
  %input = <4x> parameter(0)
  %r = <4x> all-reduce(%input), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = <x> dynamic-slice(%r, %id, %zero), dynamic_slice_sizes={8,128}
}

ENTRY %main (p: f32[32,128]) -> f32[8,128] {
  %p = <4x> parameter(0)
  ROOT %f = <x> fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
""")
  assert hlo.collectives(text).ici == {"reduce-scatter": Traffic(1, 4 * X, 3 * X)}
  assert memory_traffic(text) == 4 * X + X


def test_a_collective_that_runs_inside_several_fusions_counts_once():
  gather = 'all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}'
  text = program("""
%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p = <h> parameter(0)
  %g = <4h> GATHER
  ROOT %c = (<h>, <4h on chip>, /*index=2*/<flag>) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_fusion (p: bf16[8,128], q: bf16[32,128], w: bf16[32,128]) -> (bf16[8,128], bf16[8,128], bf16[32,128]) {
  %p = <h> parameter(0)
  %q = <4h on chip> parameter(1)
  %w = <4h> parameter(2)
  %g = <4h on chip> GATHER
  %o = <h> convolution(%w, %w), dim_labels=bf_io->bf
  ROOT %t = (<h>, <h>, <4h on chip>) tuple(%o, %p, %g)
}

%done (p: bf16[8,128], q: bf16[32,128]) -> bf16[32,128] {
  %p = <h> parameter(0)
  %q = <4h on chip> parameter(1)
  %g = <4h> GATHER
  ROOT %c = <4h on chip> custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[8,128], w: bf16[32,128]) -> bf16[32,128] {
  %p = <h> parameter(0)
  %w = <4h> parameter(1)
  %s = (<h>, <4h on chip>, /*index=2*/<flag>) fusion(%p), kind=kCustom, calls=%start
  %s0 = <h> get-tuple-element(%s), index=0
  %s1 = <4h on chip> get-tuple-element(%s), index=1
  %f = (<h>, <h>, <4h on chip>) fusion(%s0, %s1, %w), kind=kOutput, calls=%async_fusion
  %f1 = <h> get-tuple-element(%f), index=1
  %f2 = <4h on chip> get-tuple-element(%f), index=2
  ROOT %d = <4h on chip> fusion(%f1, %f2), kind=kCustom, calls=%done
}
""").replace("GATHER", gather)
  assert hlo.collectives(text).ici == {"all-gather": Traffic(1, 4 * H, 3 * H)}
  # The gather reads its shard, into on-chip memory; what is computed meanwhile reads %w and writes %o.
  assert memory_traffic(text) == H + (4 * H + H)


def test_starts_count_and_their_ends_do_not():
  text = program("""
%offloaded (p: f32[8,128], t: token[]) -> f32[32,128] {
  %p = <x> parameter(0)
  %t = token[] parameter(1)
  ROOT %g = <4x> all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8,128]) -> f32[32,128] {
  %p = <x> parameter(0)
  %t = token[] after-all()
  %ps = (<x>, <x>, <flag>, <flag>) collective-permute-start(%p), source_target_pairs={{0,1},{1,2},{2,3}}
  %pd = <x> collective-permute-done(%ps)
  %cs = ((<x>, token[]), <4x>) call-start(%pd, %t), async_execution_thread="sparsecore", to_apply=%offloaded
  ROOT %cd = <4x> call-done(%cs)
}
""")
  assert hlo.collectives(text).ici == {"collective-permute": Traffic(1, X, X), "all-gather": Traffic(1, 4 * X, 3 * X)}
  assert memory_traffic(text) == 2 * X + (X + 4 * X)


def test_what_the_hosts_carry_between_slices():
  text = program("""
ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = <x> parameter(0)
  %t = token[] after-all()
  %s = (<x>, u32[], token[]) send(%p, %t), is_host_transfer=true, frontend_attributes={SUM}
  %d = token[] send-done(%s), is_host_transfer=true, frontend_attributes={SUM}
  %a = (<x>, u32[], token[]) send(%p, %t), is_host_transfer=true, frontend_attributes={SWAP}
  %h = (<x>, u32[], token[]) send(%p, %t), is_host_transfer=true, frontend_attributes={rendezvous="callback"}
  ROOT %r = <x> copy(%p)
}
""")
  among, swapped = '"{1,2,3,4}x{0:15}"', "{{100000,200000},{100001,200001}}"
  text = text.replace("SUM", f'_xla_megascale_target={among},_xla_megascale_transfer_type="ALL_REDUCE"')
  text = text.replace("SWAP", f'_xla_megascale_target={swapped},_xla_megascale_transfer_type="ALL_TO_ALL"')
  found = hlo.collectives(text)
  assert found.ici == {}
  assert found.dcn == {"all-reduce": Traffic(1, X, 2 * X * 3 // 4), "all-to-all": Traffic(1, X, X // 2)}


@pytest.mark.parametrize(("start", "trips"), [(0, 28), (1, 27), (28, 0)])
def test_a_loop_without_a_stated_length_is_followed_from_where_it_starts(start, trips):
  """One whose first turn was peeled off starts at 1."""
  text = program("""
%body (s: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %s = (<i>, <x>, <i>) parameter(0)
  %i = <i> get-tuple-element(%s), index=0
  %x = <x> get-tuple-element(%s), index=1
  %n = <i> get-tuple-element(%s), index=2
  %one = <i> constant(1)
  %next = <i> add(%i, %one)
  %r = <x> all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %t = (<i>, <x>, <i>) tuple(%next, %r, %n)
}

%condition (s: (s32[], f32[8,128], s32[])) -> pred[] {
  %s = (<i>, <x>, <i>) parameter(0)
  %i = <i> get-tuple-element(%s), index=0
  %n = <i> get-tuple-element(%s), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = <x> parameter(0)
  %start = <i> constant(START)
  %copy = <i> copy(%start)
  %bound = <i> constant(28)
  %t = (<i>, <x>, <i>) tuple(%copy, %p, %bound)
  %w = (<i>, <x>, <i>) while(%t), condition=%condition, body=%body
  ROOT %r = <x> get-tuple-element(%w), index=1
}
""").replace("START", str(start))
  found = hlo.collectives(text)
  assert found.ici["all-reduce"].count == trips
  assert found.unknown_loops == 0


def test_memory_on_a_tpu_knows_tiles_and_on_chip_arrays():
  text = program("""
ENTRY %main (p: bf16[16,72]) -> bf16[16,72] {
  %p = bf16[16,72]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[16,72]{1,0:T(8,128)(2,1)S(1)}, bf16[16,72]{1,0:T(8,128)(2,1)}, <flag>) copy-start(%p)
  %d = bf16[16,72]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)
  %n = bf16[16,72]{1,0:T(8,128)(2,1)S(1)} negate(%d)
  ROOT %r = bf16[16,72]{0,1:T(8,128)(2,1)} copy(%n)
}
""")
  # Read: 72 columns in a tile of 128. Written with the rows innermost: 16 of them in a tile of 128, 72 in nine of 8.
  assert memory_traffic(text) == 16 * 128 * 2 + 72 * 128 * 2


def test_unknown_forms_are_refused():
  with pytest.raises(ValueError, match="replica groups"):
    hlo.collectives(reduction("cube(2)"))
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.collectives("module @jit_f { }")
