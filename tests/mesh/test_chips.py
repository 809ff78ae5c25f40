"""Names of slices, and numbers that must fit together."""

import pytest

from pflow_jax.mesh.chips import CHIPS, GIB, TPUS, chip_of, compiler_topology, links_of_axis, parse_topology, peak_flops


@pytest.mark.parametrize(
  ("name", "chip", "shape"),
  [
    ("v5e:16x16", "v5e", (16, 16)),
    ("v5p:4x4x8", "v5p", (4, 4, 8)),
    ("v5e-1", "v5e", (1, 1)),
    ("v5e-4", "v5e", (2, 2)),
    ("v5e-8", "v5e", (2, 4)),
    ("v5e-16", "v5e", (4, 4)),
    ("v5litepod-128", "v5e", (8, 16)),
    ("v5litepod-256", "v5e", (16, 16)),
    ("v6e-64", "v6e", (8, 8)),
    ("v3-8", "v3", (2, 2)),
    ("v3-32", "v3", (4, 4)),
    ("v4-8", "v4", (2, 2, 1)),
    ("v4-32", "v4", (2, 2, 4)),
    ("v4-64", "v4", (2, 4, 4)),
    ("v4-384", "v4", (4, 4, 12)),
    ("v5p-8", "v5p", (2, 2, 1)),
    ("v5p-16", "v5p", (2, 2, 2)),
    ("v5p-128", "v5p", (4, 4, 4)),
    ("v5p-512", "v5p", (4, 8, 8)),
    ("v5p-12288", "v5p", (16, 16, 24)),
    ("tpu7x-2", "tpu7x", (1, 1, 1)),
    ("tpu7x-9216", "tpu7x", (12, 16, 24)),
  ],
)
def test_names_of_slices(name, chip, shape):
  """The shapes that Cloud's pages list for its names."""
  got, sides, number = parse_topology(name)
  assert (got, sides) == (chip, shape)
  cores = 1 if chip in ("v5e", "v6e") else 2
  if "-" in name:
    assert number * cores == int(name.split("-")[1])
  assert chip_of(name) is CHIPS[chip]
  text, _ = compiler_topology(name)
  assert parse_topology(text) == (chip, shape, number)


@pytest.mark.parametrize(
  ("name", "problem"),
  [
    ("v9:4x4", r"expected one of the chips \['h100', 'h200', 'tpu7x', 'v3', 'v4', 'v5e', 'v5p', 'v6e'\], got 'v9'"),
    ("h100-16", "at most 8 chips of h100 in a slice, got 16; use several slices"),
    ("16x16", "expected a chip and a shape"),
    ("v5e:4x4x4", "expected 2 sides for v5e, as in 'v5e:4x4', got 3"),
    ("v5p:4x4", "expected 3 sides for v5p"),
    ("v5e:0x4", "sides"),
    ("v5e:32x32", "at most 256 chips"),
    ("v6e-512", "at most 256 chips"),
    ("v5p-9", "counts TensorCores"),
    ("v5e-12", "no usual shape; name the one you mean, such as 'v5e:4x4'"),
    ("v5e-2", "no usual shape"),
    ("v5e-" + "9" * 5000, "expected a chip and a shape"),
    ("v5e:\u0664x4", "expected a chip and a shape"),  # a digit, but of another script
    ("v4-24", "no usual shape; name the one you mean, such as 'v4:4x4x4'"),
  ],
)
def test_what_there_is_not_is_refused(name, problem):
  with pytest.raises(ValueError, match=problem):
    parse_topology(name)


def test_options_that_the_compiler_needs():
  assert compiler_topology("v5e-256") == ("v5e:16x16", {})
  assert compiler_topology("v5e-1") == ("v5e:1x1", {"chips_per_host_bounds": [1, 1, 1]})
  assert compiler_topology("v4-16") == ("v4:2x2x2", {"chip_config_name": "megacore"})


def test_the_table_fits_together():
  assert CHIPS["v5e"].hbm_bytes == 15.75 * GIB
  assert CHIPS["v3"].hbm_bytes_per_device == CHIPS["v3"].hbm_bytes // 2
  for name, chip in CHIPS.items():
    assert chip.name == name
    # From the fastest to the slowest.
    assert chip.hbm_bandwidth > chip.ici_bandwidth > 8 * chip.dcn_bandwidth
    if chip.platform == "tpu":
      assert chip.ici_links == 2 * chip.dimensions
      # A link of any of them carries 45 to 100 GB/s.
      assert 4.5e10 <= chip.ici_bandwidth / chip.ici_links <= 1e11
    # Operations a byte of memory that make a product worth its reads: a few hundred for all of them.
    assert 100 < chip.peak_flops / chip.hbm_bandwidth < 600


def test_nodes_of_gpus():
  assert parse_topology("h200-8") == parse_topology("h200:8") == ("h200", (8,), 8)
  assert CHIPS["h100"].peak_flops == peak_flops("NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
  ("topology", "links"), [("v5e-16", 1), ("v5e-256", 2), ("v6e-64", 1), ("v5p-128", 2), ("v5p:2x2x2", 1)]
)
def test_an_axis_has_two_links_where_it_closes(topology, links):
  assert links_of_axis(topology) == links


def test_peak_rates_are_those_of_a_device():
  """Names as JAX has them; a device of v3 or tpu7x is half a chip. H100 by NVIDIA's data sheet without sparsity."""
  assert [peak_flops(kind) for kind in ("TPU v5 lite", "TPU v4", "TPU v3")] == [197e12, 275e12, 61.5e12]
  assert set(TPUS.values()) == {name for name, chip in CHIPS.items() if chip.platform == "tpu"}
  kinds = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA GH200 480GB")
  assert [peak_flops(kind) / 1e12 for kind in kinds] == [989, 756, 835, 989, 989]
  assert [peak_flops(kind) for kind in ("NVIDIA A100-SXM4-40GB", "Tesla T4", "NVIDIA L4")] == [312e12, 65e12, 121e12]
  assert [peak_flops(kind) for kind in ("cpu", "TPU v9", "NVIDIA GeForce RTX 4090", "NVIDIA L40")] == [None] * 4
