"""Planning: what is counted without a compiler, what a compiler says, and what would make a run fit."""

import dataclasses
import json

import jax
import pytest

from pflow_jax.commands import cli
from pflow_jax.planning import plan
from pflow_jax.planning.report import as_bytes, as_table, as_text
from pflow_jax.settings.config_file import read_config_file
from tests.programs import ROOT, pflow

pytestmark = pytest.mark.usefixtures("float32")

V5E = plan.Slice("v5e:2x4")


def config(variant="gmrepa_1nfe", **mesh):
  values = read_config_file(f"configs/imagenet.py:{variant},quicktest")
  values.mesh.update({"data": -1, "min_size": 64} | mesh)
  return values


@pytest.fixture
def compiler(monkeypatch):
  """This machine's own compiler in the TPU's place: eight devices, the same reports."""
  monkeypatch.setattr(plan.Slice, "devices", lambda self: jax.devices()[: self.num_devices])


@pytest.fixture
def no_compiler(monkeypatch):
  def missing(self):
    raise plan.NoCompiler("install it")

  monkeypatch.setattr(plan.Slice, "devices", missing)


@pytest.fixture
def verdicts(compiler, monkeypatch):
  """Takes the place of compiling: the next verdict of a list, True for a program that fits."""
  text = jax.jit(lambda x: x @ x).lower(jax.numpy.ones((8, 8))).compile()
  asked, fits = [], []

  def answer(traced, fast, platform):
    asked.append(fast)
    return text if fits.pop(0) else None, {"peak": 2**40, "compile_seconds": 1.0}

  monkeypatch.setattr(plan, "_compile", answer)
  return fits, asked


def test_without_a_compiler_what_is_counted_is_there(no_compiler):
  report = plan.plan(config(fsdp=4), V5E)
  assert report["note"] == "install it"
  assert report["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1}
  assert report["flops"] > 0
  assert report["estimate"]["limit"] == "compute"
  assert "peak" not in report["memory"]
  text = as_text(report)
  assert "install it" in text
  assert f"operations a step: {report['flops'] / 1e12:,.1f} TFLOP" in text
  json.dumps(report)


def test_parts_of_the_memory_are_those_of_one_device(no_compiler):
  whole = plan.plan(config(fsdp=1), V5E)["memory"]
  parts = plan.plan(config(fsdp=8, min_size=0, rules=((".*bias|.*(logstds_3|proj_out_logw).*", ()),)), V5E)["memory"]
  for name in ("parameters", "average", "teacher"):
    assert 0.1 < parts[name] / whole[name] < 0.3, name
  assert whole["average"] == whole["parameters"]
  assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], rel=0.01)
  assert whole["available"] == plan.chip_of("v5e:2x4").hbm_bytes_per_device


def test_a_compiled_plan_has_memory_traffic_and_the_sampler(compiler):
  report = plan.plan(config(fsdp=4), V5E)
  memory, traffic = report["memory"], report["traffic"]
  assert memory["fits"] is True
  assert memory["peak"] == memory["arguments"] + memory["activations"] > memory["parameters"] > 0
  assert traffic["ici"]["all-gather"]["count"] > 0
  assert not traffic["dcn"]
  assert traffic["unknown_loops"] == 0
  estimate = report["estimate"]
  assert set(estimate["seconds"]) == {"compute", "hbm", "ici"}
  assert estimate["step_seconds"] == [max(estimate["seconds"].values()), sum(estimate["seconds"].values())]
  hours = report["steps"] * 8 * estimate["step_seconds"][0] / 3600
  assert estimate["chip_hours"][0] == pytest.approx(hours)
  assert [row["nfe"] for row in report["sample"]] == [1]
  assert report["sample"][0]["batch_size"] == 64
  text = as_text(report)
  for part in ("fits: peak", "all-gather", "chip-hours", "sampling, 1 NFE", "mesh data 2 x fsdp 4"):
    assert part in text
  json.dumps(report)
  moved = traffic["moved"]
  assert sum(moved["kinds"].values()) == traffic["hbm"]
  assert moved["kinds"]["attention"] > 0
  assert moved["kinds"]["MLP"] > 0
  assert moved["kinds"]["optimizer"] > 0
  sizes = [one["bytes"] for one in moved["operations"]]
  assert sizes == sorted(sizes, reverse=True)
  lines = as_bytes(report).splitlines()
  assert any(line.startswith("all ") and line.endswith(f"{traffic['hbm'] / 1e9:.2f}  100.0%") for line in lines)


def test_bytes_of_a_step_that_was_not_compiled_are_not_known(no_compiler):
  with pytest.raises(ValueError, match="--bytes: expected a compiled step.*the TPU compiler is not installed"):
    as_bytes(plan.plan(config(), V5E))


def test_several_slices_send_over_the_slow_network(compiler):
  values = config("teacher", slice=2, fsdp=2)
  report = plan.plan(values, plan.Slice("v5e:2x2", 2), sampling=False)
  assert report["devices"] == 8
  assert report["traffic"]["dcn"]["all-reduce"]["sent"] > 0, "gradients are summed over slices"
  assert "dcn" in report["estimate"]["seconds"]
  assert "2 slices of v5e:2x2" in as_text(report)


@pytest.mark.parametrize(
  ("message", "gib"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.84G of 15.75G hbm. Exceeded by 10.09G.",
      25.84,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.5M) exceeds "
      "available HBM (15.75G).",
      0.50049,
    ),
  ],
)
def test_refusals_of_the_compiler_are_read(message, gib):
  assert plan._needed(message) == pytest.approx(gib * 2**30, rel=1e-4)


def test_other_errors_of_the_compiler_are_errors():
  for message in ("INTERNAL: 3.5G of nonsense", "Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem."):
    with pytest.raises(RuntimeError, match="the compiler failed"):
      plan._needed(message)


def test_a_smaller_batch_is_tried_where_it_cannot_be_cut(verdicts):
  verdicts[0].extend([False] * 20)
  values = config("ayf_emd", fsdp=8)
  values.model.remat = "full"
  values.train.batch_size = 32
  report = plan.plan(values, V5E, sampling=False)
  assert [attempt["change"][-1] for attempt in report["tried"]] == [f"config.train.accumulation={n}" for n in (2, 4)]
  assert "nothing that was tried fits" in as_text(report)
  values.adversarial.update(weight=0.1, width=16)
  report = plan.plan(values, V5E, sampling=False)
  assert [attempt["change"][-1] for attempt in report["tried"]] == [f"config.train.batch_size={n}" for n in (16, 8)]


def test_a_sweep_without_a_compiler_says_what_it_does_not_know(no_compiler):
  table = as_table(plan.sweep(config(min_size=2**14), plan.Slice("v5e:1x1"))).splitlines()
  assert table[1].split()[2:5] == ["?", "?", "?"]
  assert table[-1] == "install it"


def test_rules_of_the_config_count_without_a_compiler_too(no_compiler):
  values = config(fsdp=8, rules=((".*", ()),))
  memory = plan.plan(values, V5E)["memory"]
  assert memory["parameters"] == plan.plan(config(fsdp=1), V5E)["memory"]["parameters"], "kept whole"


@pytest.mark.skipif(not plan.has_compiler(), reason="the TPU compiler is not installed")
def test_the_tpu_compiler_s_word():
  values = config("teacher", fsdp=4)
  report = plan.plan(values, V5E, fast=True, sampling=False)
  assert report["memory"]["fits"]
  assert report["traffic"]["ici"]["all-gather"]["count"] > 0


def test_what_would_fit_is_looked_for(verdicts):
  fits, asked = verdicts
  fits += [False, False, False, False, True]
  values = config(fsdp=1)
  values.model.remat = "none"
  values.train.batch_size = 32
  report = plan.plan(values, V5E, sampling=False)
  assert report["memory"]["fits"] is False
  assert [attempt["change"] for attempt in report["tried"]] == [
    ["config.model.remat=full"],
    ["config.model.remat=full", "config.mesh.fsdp=4"],
    ["config.model.remat=full", "config.mesh.fsdp=8"],
    ["config.model.remat=full", "config.mesh.fsdp=8", "config.train.accumulation=2"],
  ]
  assert [attempt["fits"] for attempt in report["tried"]] == [False, False, False, True]
  text = as_text(report)
  assert "DOES NOT FIT: peak 1024.00 GiB of 15.75 GiB" in text
  assert "with config.model.remat=full config.mesh.fsdp=8 config.train.accumulation=2: fits" in text
  assert asked == [False, True, True, True, True], "the search compiles fast"


def test_sweep_compares_sizes_and_names_those_that_do_not_fit(verdicts):
  verdicts[0].extend([True, False, True])
  values = config()
  values.model.update(width=20, num_heads=2)
  reports = plan.sweep(values, V5E)
  assert [report["mesh"]["fsdp"] for report in reports] == [1, 2, 4, 8]
  assert "splits 20 in 8 parts" in reports[-1]["refused"]
  table = as_table(reports).splitlines()
  assert len(table) == 6
  assert "no" in table[-3].split()
  assert "refused" in table[-2]
  assert "overestimated" in table[-1]


def test_what_is_known_not_to_fit_is_not_compiled(compiler, monkeypatch):
  monkeypatch.setattr(plan, "_compile", lambda *given: pytest.fail("compiled"))
  monkeypatch.setattr(plan.Slice, "chip", dataclasses.replace(plan.chip_of("v5e:2x4"), hbm_bytes=10_000))
  report = plan.plan(config(fsdp=1), V5E, sampling=False, search=False)
  assert report["memory"]["fits"] is False
  assert report["memory"]["peak"] > 10_000
  assert ", its arguments alone" in as_text(report)


def test_a_batch_that_no_device_holds_is_refused(no_compiler):
  values = config()
  values.train.batch_size = 8 * 10**8
  with pytest.raises(ValueError, match=r"batch_size: a device's part of 800000000 examples: takes .*, a device has 15"):
    plan.plan(values, V5E)
  with pytest.raises(ValueError, match=r"--slices: .* at most 100,000 chips in all, got 1000000000 slices"):
    plan.Slice("v5e-8", 10**9)


def test_a_fast_plan_says_that_it_overestimates(verdicts):
  verdicts[0].extend([True, True, True])
  report = plan.plan(config(fsdp=4), V5E, sampling=False, fast=True)
  assert "seconds and chip-hours are overestimated" in as_text(report)
  assert "overestimated" in as_table([report, report]).splitlines()[-1]
  report = plan.plan(config(fsdp=4), V5E, sampling=False)
  assert "overestimated" not in as_text(report) + as_table([report])


def test_a_node_of_gpus_is_counted(capsys):
  config = f"--config={ROOT}/configs/imagenet.py:gmrepa_1nfe,quicktest"
  cli.main(["plan", config, "--topology=h100-8", "--config.mesh.fsdp=2"])
  told = capsys.readouterr().out
  assert "imitation, gmflow on h100-8: 8 chips, mesh data 4 x fsdp 2" in told
  assert "what follows is counted, not compiled" in told
  assert "a step takes at least" in told


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--topology=v5e:16"], "expected 2 sides for v5e"),
    (["--topology=v9-8"], "expected one of the chips"),
    (["--topology=v5e-8", "--mesh=model=2"], "--mesh: expected sizes of"),
    (["--topology=v5e-8", "--mesh=data=3"], "whose product is the number of devices, 8"),
    (["--topology=v5e-8", "--mesh=fsdp=3"], "multiply to a divisor of the number of devices, 8"),
    (["--topology=v5e-8", "--batch=12"], "config.train.batch_size: expected a multiple"),
    (["--topology=v5e-8", "--json=no/such/x.json"], "--json: there is no folder for no/such/x.json"),
  ],
)
def test_mistakes_are_named(flags, message, capsys):
  with pytest.raises(SystemExit) as exit_:
    cli.main(["plan", f"--config={ROOT}/configs/imagenet.py:gmrepa_1nfe,quicktest", *flags])
  assert exit_.value.code == 2
  assert message in capsys.readouterr().err


def test_the_command_writes_json(tmp_path):
  out = tmp_path / "plan.json"
  flags = ("--topology=v5e-8", "--mesh=data=4,fsdp=2", "--batch=16", "--nosampling", f"--json={out}")
  run = pflow("plan", "--config=configs/imagenet.py:gmrepa_1nfe,quicktest", "--fast", *flags)
  assert "imitation, gmflow on v5e-8: 8 chips, mesh data 4 x fsdp 2" in run.stdout
  assert json.loads(out.read_text())["batch_size"] == 16
