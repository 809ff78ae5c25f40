"""Comparisons: budgets, what is repeated, failures, the table. Training is a stand-in but in one test."""

import contextlib
import copy
import json
import math
import signal
import types

import pytest
from ml_collections import ConfigDict

from pflow_jax.evaluation import compare as module
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.compare import affordable_steps, compare
from pflow_jax.evaluation.compare_plan import plan, read_methods
from pflow_jax.evaluation.compare_report import markdown, summarise
from pflow_jax.files.lock import Lock
from tests.programs import ROOT, load_module

COMPARISONS = sorted((ROOT / "configs" / "compare").glob("*.py"))
DATA_OF_COMPARISONS = {"mnist": "mnist5k"}


def digits(variant):
  return f"{ROOT}/configs/digits.py:{variant},quicktest"


GMFLOW = dict(name="gmflow", config=digits("gmflow"), students=((1,), (2,)))
EMD = dict(name="emd", title="AYF-EMD", config=digits("ayf_emd"), students=((1, 2),))
ADVERSARIAL = dict(name="adversarial", config=digits("ayf_emd_adversarial"), students=((1, 2),), start="emd")
GUIDED = dict(
  name="guided",
  config=digits("ayf_emd"),
  students=((4,),),
  weak=True,
  overrides=dict(objective=dict(guidance=(1.0, 2.0))),
)


def comparison(*methods, **changes):
  values = dict(teacher=dict(config=digits("flow_teacher")), flops=100.0, methods=methods or (GMFLOW, EMD))
  return ConfigDict(values | changes)


class Programs:
  """Stand-ins for step_flops, train, evaluate and the picture that note what they are called with."""

  def __init__(self):
    self.trained, self.evaluated = {}, []
    self.broken, self.stopped, self.drawn = {}, None, None

  def step_flops(self, config):
    return 7

  def train(self, config, folder, *, picture):
    name = "/".join(folder.parts[-2:])
    self.trained[name] = copy.deepcopy(config)
    folder.mkdir(parents=True, exist_ok=True)
    if name in self.broken:
      raise self.broken[name]
    return types.SimpleNamespace(step=config.train.steps - (name == self.stopped))

  def evaluate(self, config, folder):
    self.evaluated.append("/".join(folder.parts[-2:]))
    rows = [row(f"teacher, {steps} steps", steps, 2.0 / steps) for steps in config.evaluate.teacher_steps]
    rows += [row(f"student, {nfe} NFE", nfe, 0.5 + 0.1 * config.seed) for nfe in config.sample.nfe]
    return {"data": "digits", "num_samples": 128, "features": "classifier", "device": "cpu", "rows": rows}

  def picture(self, panels, **options):
    self.drawn, self.options = panels, options


def row(name, nfe, score, fd=None):
  fd = score if fd is None else fd
  return {
    **{"name": name, "nfe": nfe, "alignment_ratio": (score, 0.01), "fd_ratio": (fd, 0.02)},
    **{"diversity_ratio": 0.9, "recall": 0.8, "images_per_second": 500.0},
  }


@pytest.fixture
def programs(monkeypatch):
  programs = Programs()
  for name in ("step_flops", "train", "evaluate"):
    monkeypatch.setattr(module, name, getattr(programs, name))
  monkeypatch.setattr(figures, "curve_panels", programs.picture)
  monkeypatch.setattr(figures, "save", lambda *_: None)
  return programs


def test_steps_are_what_the_budget_pays_for():
  assert [affordable_steps(100.0, flops) for flops in (1, 30, 33, 100)] == [100, 3, 3, 1]
  with pytest.raises(ValueError, match=r"config\.flops.*101"):
    affordable_steps(100.0, 101)


def test_a_teachers_other_solvers_are_no_euler_steps():
  rows = [row("teacher, 4 steps", 4, 1.0), row("teacher, heun, 3 NFE", 3, 0.1), row("teacher, dpmpp_2m, 4 NFE", 4, 0.1)]
  runs = [{"seed": 0, "method": "gmflow", "nfe": [4], "spent": {}, "rows": [*rows[1:], rows[0]]}]
  table = summarise(runs, {"gmflow": "GMFlow"})
  assert [(one["method"], one["nfe"], one["alignment_ratio"]["mean"]) for one in table] == [("teacher", 4, 1.0)]


def test_every_student_is_trained_with_the_budget_and_the_teacher_with_its_own_steps(programs, tmp_path):
  report = compare(comparison(), tmp_path)
  students = ("gmflow/nfe1", "gmflow/nfe2", "emd/nfe1-2")
  assert {name: config.train.steps for name, config in programs.trained.items()} == {
    "seed0/teacher": 3,
    **dict.fromkeys(students, 14),
  }
  runs = {run["run"]: run for run in report["runs"]}
  assert all((runs[name]["steps"], runs[name]["step_flops"], runs[name]["flops"]) == (14, 7, 98) for name in students)
  totals = {row["method"]: row["training_flops"] for row in report["table"]}
  assert totals == {"teacher": 21, "gmflow": 2 * 98, "emd": 98}


def test_runs_share_what_a_comparison_holds_fixed():
  wide = dict(config=digits("flow_teacher"), overrides=dict(model=dict(width=32), evaluate=dict(num_samples=200)))
  changed = GMFLOW | dict(overrides=dict(objective=dict(nfe=3, dropout=0.2)))
  runs = {run.name: run for run in plan(comparison(changed | dict(name="changed"), GMFLOW, EMD, teacher=wide), seed=5)}
  teacher = runs["teacher"].settings
  for run in runs.values():
    assert run.settings.model == teacher.model
    assert run.settings.model.get("width") == 32
    assert run.settings.evaluate.num_samples == 200
    assert run.settings.seed == 5
  configs = {name: run.settings for name, run in runs.items()}
  assert [configs[f"gmflow/nfe{n}"].objective.nfe for n in (1, 2)] == [1, 2]
  assert [configs[f"gmflow/nfe{n}"].sample.nfe for n in (1, 2)] == [(1,), (2,)]
  assert configs["emd/nfe1-2"].sample.nfe == (1, 2)
  assert configs["emd/nfe1-2"].evaluate.teacher_steps == (1, 2, 4, 128)
  assert (configs["changed/nfe1"].objective.nfe, configs["changed/nfe1"].objective.dropout) == (3, 0.2)


def test_runs_know_the_folders_of_what_they_need(programs, tmp_path):
  weak = dict(config=digits("flow_teacher"), overrides=dict(train=dict(steps=2)))
  report = compare(comparison(EMD, ADVERSARIAL, GUIDED, weak=weak), tmp_path)
  trained = programs.trained
  assert list(trained) == [f"seed0/{n}" for n in ("teacher",)] + ["emd/nfe1-2", "adversarial/nfe1-2"] + [
    "seed0/weak",
    "guided/nfe4",
  ]
  root = tmp_path / "seed0"
  assert trained["guided/nfe4"].teacher.weak_workdir == str(root / "weak")
  assert trained["adversarial/nfe1-2"].start.workdir == str(root / "emd" / "nfe1-2")
  assert trained["emd/nfe1-2"].teacher.workdir == str(root / "teacher")
  assert trained["emd/nfe1-2"].teacher.weak_workdir is trained["emd/nfe1-2"].start.workdir is None
  assert trained["seed0/weak"].train.steps == 2
  totals = {row["method"]: row["training_flops"] for row in report["table"]}
  assert totals == {"teacher": 21, "emd": 98, "adversarial": 2 * 98, "guided": 98 + 14}, (
    "starts and weak teachers count"
  )


def test_what_is_finished_is_not_repeated(programs, tmp_path):
  first = compare(comparison(), tmp_path)
  programs.trained.clear()
  programs.evaluated.clear()
  assert compare(comparison(), tmp_path) == first
  assert not programs.trained
  assert not programs.evaluated
  # Other settings, another budget and a lost result are other runs.
  compare(comparison(GMFLOW, EMD | dict(overrides=dict(sample=dict(gamma=0.5)))), tmp_path)
  assert list(programs.trained) == ["emd/nfe1-2"]
  (tmp_path / "seed0" / "gmflow" / "nfe2" / "result.json").unlink()
  programs.trained.clear()
  compare(comparison(GMFLOW), tmp_path)
  assert list(programs.trained) == ["gmflow/nfe2"]
  programs.trained.clear()
  compare(comparison(GMFLOW, flops=200.0), tmp_path)
  assert list(programs.trained) == ["gmflow/nfe1", "gmflow/nfe2"]
  programs.trained.clear()
  longer = dict(config=digits("flow_teacher"), overrides=dict(train=dict(steps=4)))
  compare(comparison(GMFLOW, flops=200.0, teacher=longer), tmp_path)
  assert list(programs.trained) == ["seed0/teacher", "gmflow/nfe1", "gmflow/nfe2"], "another teacher"


@pytest.mark.parametrize(
  "result",
  [
    *("", "{", "[]", "null", "[" * 100_000, '{"described": {}}', '{"result": 3}'),
    *({}, [], {"spent": 3}, {"spent": {}, "rows": [{}]}, {"spent": {"a": "x"}}, {"spent": {}, "rows": 3}),
    {"spent": {}, "rows": [row("student, 1 NFE", 1, 0.5) | {"images_per_second": 0.0}]},
    {"spent": {}, "rows": [row("student, 1 NFE", 1, 0.5) | {"recall": "x"}]},
  ],
  ids=lambda result: json.dumps(result)[:40],
)
def test_a_result_of_somebody_else_is_looked_at_before_it_is_believed(result, programs, tmp_path):
  one = dict(methods=(GMFLOW | dict(students=((1,),)),))
  first = compare(comparison(**one), tmp_path)
  path = tmp_path / "seed0" / "gmflow" / "nfe1" / "result.json"
  kept = json.loads(path.read_text())
  path.write_text(result if isinstance(result, str) else json.dumps(kept | {"result": result}))
  programs.trained.clear()
  assert compare(comparison(**one), tmp_path) == first
  assert list(programs.trained) == ["gmflow/nfe1"]
  assert json.loads(path.read_text()) == kept


def test_a_run_that_fails_is_reported_and_tried_again_and_the_others_go_on(programs, tmp_path):
  programs.broken = {"emd/nfe1-2": FloatingPointError("20 updates in a row"), "gmflow/nfe1": ValueError("bad")}
  report = compare(comparison(EMD, ADVERSARIAL, GMFLOW), tmp_path)
  errors = {run["run"]: run["error"] for run in report["runs"] if "error" in run}
  assert errors == {
    "emd/nfe1-2": "FloatingPointError: 20 updates in a row",
    "adversarial/nfe1-2": "it needs emd/nfe1-2, which failed",
    "gmflow/nfe1": "ValueError: bad",
  }
  assert "adversarial/nfe1-2" not in programs.trained
  assert programs.evaluated == ["gmflow/nfe2"]
  text = (tmp_path / "compare.md").read_text()
  assert text.count("failed: seed 0") == 5
  assert all(error in text for error in errors.values())
  programs.broken = {}
  programs.trained.clear()
  report = compare(comparison(EMD, ADVERSARIAL, GMFLOW), tmp_path)
  assert list(programs.trained) == ["emd/nfe1-2", "adversarial/nfe1-2", "gmflow/nfe1"]
  assert not any("error" in run for run in report["runs"])
  assert "failed" not in (tmp_path / "compare.md").read_text().lower()


def test_a_failed_teacher_ends_only_its_seed(programs, tmp_path):
  programs.broken = {"seed1/teacher": FloatingPointError("nan")}
  report = compare(comparison(EMD), tmp_path, seeds=(0, 1))
  assert {(run["seed"], run["run"]): run.get("error") for run in report["runs"]} == {
    (0, "teacher"): None,
    (0, "emd/nfe1-2"): None,
    (1, "teacher"): "FloatingPointError: nan",
    (1, "emd/nfe1-2"): "it needs teacher, which failed",
  }
  assert list(programs.trained).count("emd/nfe1-2") == 1


def test_a_mistake_of_ours_is_not_a_failed_run(programs, tmp_path):
  programs.broken = {"gmflow/nfe1": TypeError("a bug")}
  with pytest.raises(TypeError, match="a bug"):
    compare(comparison(), tmp_path)


def test_a_run_that_is_told_to_stop_ends_the_call_and_is_not_taken_for_finished(programs, tmp_path):
  programs.stopped = "gmflow/nfe2"
  with pytest.raises(KeyboardInterrupt, match="run 3 of 4.*13 of 14.*goes on"):
    compare(comparison(), tmp_path)
  assert [run["run"] for run in json.loads((tmp_path / "compare.json").read_text())["runs"]] == [
    "teacher",
    "gmflow/nfe1",
  ]
  programs.stopped = None
  programs.trained.clear()
  compare(comparison(), tmp_path)
  assert list(programs.trained) == ["gmflow/nfe2", "emd/nfe1-2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_trainings_ends_it_unless_it_is_ignored(number):
  before = signal.getsignal(number)
  for ignored in (False, True):
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
      with contextlib.nullcontext() if ignored else pytest.raises(KeyboardInterrupt), module._stopped_by_signals():
        signal.raise_signal(number)
      assert signal.getsignal(number) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
      signal.signal(number, before)


def test_two_comparisons_in_one_folder_are_one_too_many(programs, tmp_path):
  with Lock(tmp_path, "pflow compare"), pytest.raises(ValueError, match="is being written by 'pflow compare'"):
    compare(comparison(), tmp_path)
  assert programs.trained == {}


def test_only_works_on_some_methods_and_shows_all_that_are_finished(programs, tmp_path, capsys):
  methods = comparison(EMD, ADVERSARIAL, GMFLOW)
  report = compare(methods, tmp_path, only=["adversarial"])
  assert list(programs.trained) == ["seed0/teacher", "emd/nfe1-2", "adversarial/nfe1-2"], "with what it starts from"
  assert "run 3 of 3: seed 0, adversarial/nfe1-2" in capsys.readouterr().out
  assert {row["method"] for row in report["table"]} == {"teacher", "emd", "adversarial"}
  programs.trained.clear()
  report = compare(methods, tmp_path, only=["gmflow"])
  assert list(programs.trained) == ["gmflow/nfe1", "gmflow/nfe2"]
  assert {row["method"] for row in report["table"]} == {"teacher", "emd", "adversarial", "gmflow"}


def test_seeds_have_runs_of_their_own_and_become_mean_and_spread(programs, tmp_path):
  report = compare(comparison(), tmp_path, seeds=(0, 1, 3))
  assert {(run["seed"], run["run"]) for run in report["runs"]} >= {(1, "teacher"), (3, "gmflow/nfe2")}
  assert (tmp_path / "seed3" / "gmflow" / "nfe2" / "result.json").exists()
  assert programs.trained["seed3/teacher"].seed == programs.trained["gmflow/nfe1"].seed == 3
  (one,) = (row for row in report["table"] if (row["method"], row["nfe"]) == ("emd", 1))
  # 0.5, 0.6 and 0.8: mean 0.6333, deviations -0.1333, -0.0333, 0.1667.
  assert one["alignment_ratio"]["mean"] == pytest.approx(1.9 / 3)
  assert one["alignment_ratio"]["sd"] == pytest.approx(math.sqrt((0.4**2 + 0.1**2 + 0.5**2) / 9 / 2))
  assert one["alignment_ratio"]["seeds"] == {"0": 0.5, "1": 0.6, "3": pytest.approx(0.8)}
  assert one["ms_per_image"]["mean"] == 2.0
  assert one["training_flops"] == 98, "of one seed"
  assert "0.633 ± 0.153" in (tmp_path / "compare.md").read_text()


def test_table_says_where_a_method_does_not_beat_its_teacher():
  def run(seed, method, nfe, *rows):
    return {"seed": seed, "method": method, "nfe": nfe, "spent": {method: 5}, "rows": rows}

  titles = {name: method.title or name for name, method in read_methods(comparison(GMFLOW, EMD)).items()}
  runs = [
    run(0, "gmflow", [1], row("teacher, 1 step", 1, 3.0, 30.0), row("student, 1 NFE", 1, 2.0, 31.0)),
    run(1, "gmflow", [1], row("teacher, 1 step", 1, 5.0, 10.0), row("student, 1 NFE", 1, 5.5, 9.5)),
    run(1, "emd", [1, 2], row("student, 1 NFE", 1, 4.0, 9.0), row("student, 2 NFE", 2, 9.0, 9.0)),
    {"seed": 0, "method": "emd", "nfe": [1, 2], "error": "ValueError: x"},
  ]
  table = {(row["method"], row["nfe"]): row for row in summarise(runs, titles)}
  assert list(table) == [("teacher", 1), ("gmflow", 1), ("emd", 1), ("emd", 2)]
  # Alignment 3.75 against 4; FD 20.25 against 20.
  assert table["gmflow", 1]["worse"] == ["FD"]
  # Against the teacher of seed 1 alone, 5 and 10, not its mean 4.
  assert table["emd", 1]["worse"] == []
  assert table["emd", 2]["worse"] == [], "no teacher to compare with"
  assert table["emd", 1]["failed"] == [0]
  assert table["teacher", 1]["worse"] == []
  runs[2]["rows"] = [row("student, 1 NFE", 1, 5.0, 11.0)]
  (tied,) = (r for r in summarise(runs, titles) if (r["method"], r["nfe"]) == ("emd", 1))
  assert tied["worse"] == ["alignment", "FD"], "a tie is no win"
  lines = markdown(summarise(runs, titles)).splitlines()
  assert [line.split("|")[-2].strip() for line in lines[2:]] == [
    "-",
    "worse: FD",
    "worse: alignment, FD; failed: seed 0",
    "failed: seed 0",
  ]
  assert lines[4].startswith("| AYF-EMD"), "its title"


def test_files_are_written_and_hold_the_same(programs, tmp_path):
  report = compare(comparison(), tmp_path)
  assert json.loads((tmp_path / "compare.json").read_text()) == report
  assert (report["flops"], report["seeds"], report["device"]) == (100.0, [0], ["cpu"])
  assert [row["nfe"] for row in report["table"]] == [1, 2, 4, 128, 1, 2, 1, 2]
  text = (tmp_path / "compare.md").read_text()
  assert "AYF-EMD" in text
  assert "±" not in text, "one seed has no spread"


def test_picture_draws_the_teacher_where_students_are(programs, tmp_path):
  compare(comparison(), tmp_path)
  titles = ["alignment error / teacher-4\n(lower is better)", "Fréchet distance / teacher-128\n(lower is better)"]
  assert list(programs.drawn) == titles
  assert programs.drawn[titles[0]] == {
    "teacher": ([1, 2], [2.0, 1.0], [0.0, 0.0]),
    "gmflow": ([1, 2], [0.5, 0.5], [0.0, 0.0]),
    "AYF-EMD": ([1, 2], [0.5, 0.5], [0.0, 0.0]),
  }
  assert programs.options["dashed"] == ("teacher",)
  assert programs.options["note"] is None, "one seed has no spread"
  compare(comparison(), tmp_path, seeds=(0, 1))
  (nfe, mean, sd) = programs.drawn[titles[0]]["gmflow"]
  assert (nfe, mean) == ([1, 2], pytest.approx([0.55, 0.55]))
  assert sd == pytest.approx([0.1 / 2**0.5] * 2)
  assert programs.options["note"] == "bars: standard deviation over seeds"


MISTAKES = {
  "no teacher": (dict(teacher=None), r"config: teacher must be set"),
  "no budget": (dict(flops=0.0), r"config: flops must be set"),
  "no methods": (dict(methods=()), r"config: methods must be set"),
  "unknown key": (dict(flop=1.0), r"no key 'flop'; did you mean 'flops'"),
  "unknown key of a method": (dict(methods=(GMFLOW | dict(titel="x"),)), r"gmflow has no key 'titel'.*'title'"),
  "unknown key of the teacher": (dict(teacher=dict(config="x", override=1)), r"no key 'override'.*'overrides'"),
  "no config": (dict(methods=(dict(name="a", students=((1,),)),)), r"methods, a: config must be set"),
  "no students": (dict(methods=(GMFLOW | dict(students=()),)), r"gmflow: students.*got \(\)"),
  "a number twice": (dict(methods=(GMFLOW | dict(students=((1,), (1, 2))),)), r"none of them twice"),
  "a name twice": (dict(methods=(GMFLOW, GMFLOW)), r"got 'gmflow' twice"),
  "a name that is no folder": (dict(methods=(GMFLOW | dict(name="../x"),)), r"got '\.\./x'"),
  "a teacher's name": (dict(methods=(GMFLOW | dict(name="teacher"),)), r"other than 'teacher' and 'weak'"),
  "unknown start": (dict(methods=(EMD, ADVERSARIAL | dict(start="edm"))), r"start.*no key 'edm'; did you mean 'emd'"),
  "start that comes later": (dict(methods=(ADVERSARIAL, EMD)), r"adversarial: start: the list before it"),
  "start with other students": (
    dict(methods=(GMFLOW, ADVERSARIAL | dict(start="gmflow"))),
    r"expected students of gmf",
  ),
  "no weak teacher": (dict(methods=(GUIDED,)), r"guided: weak needs the section config\.weak"),
  "no such file": (
    dict(teacher=dict(config="configs/nope.py:teacher")),
    r"^config\.teacher: configs/nope\.py: there is no such file",
  ),
  "no such file of a method": (
    dict(methods=(GMFLOW | dict(config="configs/nope.py"),)),
    r"^config\.methods, gmflow: configs/nope\.py: there is no such file",
  ),
  "a budget that is no number": (dict(flops="all"), r"config\.flops: input should be a valid number, got 'all'"),
  "an infinite budget": (dict(flops=math.inf), r"config\.flops: expected a finite number, got inf"),
  "a budget below nothing": (dict(flops=-1.0), r"config\.flops: expected a number of operations > 0, got -1"),
  "methods by name": (dict(methods={"a": {}}), r"config\.methods: input should be a valid tuple"),
  "a method that is a name": (dict(methods=("gmflow",)), r"config\.methods: expected a section, .*got 'gmflow'"),
  "a teacher that is a file": (dict(teacher="x.py"), r"config\.teacher: expected a section, .*got 'x\.py'"),
  "students that are no groups": (dict(methods=(GMFLOW | dict(students=(1, 2)),)), r"gmflow\.students: .*got 1"),
  "students of a fraction": (dict(methods=(GMFLOW | dict(students=((1.5,),)),)), r"gmflow\.students: .*got 1\.5"),
  "overrides that are none": (dict(methods=(GMFLOW | dict(overrides=3),)), r"gmflow\.overrides: .*got 3"),
  "a comparison as a teacher": (
    dict(teacher=dict(config=f"{COMPARISONS[0]}:quicktest")),
    r"config\.teacher: .* has no key 'flops'",
  ),
  "unknown section": (dict(methods=(GMFLOW | dict(overrides=dict(trian={})),)), r"no key 'trian'.*'train'"),
  "unknown override": (
    dict(methods=(GMFLOW | dict(overrides=dict(train=dict(stepps=1))),)),
    r"config\.methods, gmflow: config\.train has no key 'stepps'; did you mean 'steps'",
  ),
  "override of another type": (
    dict(methods=(GMFLOW | dict(overrides=dict(train=dict(steps="x"))),)),
    r"steps: .*got 'x'",
  ),
  "other guidance": (
    dict(methods=(EMD, GMFLOW | dict(overrides=dict(teacher=dict(guidance=2.0))))),
    r"(?s)share a teacher.*emd/nfe1-2: guidance 1\.0.*gmflow/nfe1: guidance 2\.0",
  ),
  "other shift": (
    dict(methods=(EMD, GMFLOW | dict(overrides=dict(objective=dict(shift=3.0))))),
    r"(?s)shift 1.*shift 3",
  ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_comparisons_that_do_not_fit_are_refused_before_any_work(name, programs, tmp_path):
  changes, match = MISTAKES[name]
  with pytest.raises(ValueError, match=match):
    compare(comparison(**changes), tmp_path / "x")
  assert not programs.trained
  assert not (tmp_path / "x").exists()


def test_unknown_methods_are_refused_with_the_nearest(programs, tmp_path):
  with pytest.raises(ValueError, match="only.*'gmflw'; did you mean 'gmflow'"):
    compare(comparison(), tmp_path / "x", only=["gmflw"])
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("variant", ["full", "quicktest"])
@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_comparison_configs_are_read_whole(path, variant):
  config = load_module(path).get_config(variant)
  runs = plan(config, seed=0)
  assert {run.settings.data["name"] for run in runs} == {DATA_OF_COMPARISONS.get(path.stem, path.stem)}
  methods = read_methods(config)
  for name, method in methods.items():
    assert sorted(nfe for run in runs if run.method == name for nfe in run.nfe) in ([1], [1, 2, 4, 8]), name
    assert method.title
  assert load_module(path).__doc__
  with pytest.raises(ValueError, match="quicktest"):
    load_module(path).get_config("no-such-variant")


@pytest.mark.usefixtures("float32")
@pytest.mark.slow
def test_real_runs(tmp_path, capsys):
  """Trains a teacher and two students; the second call touches nothing."""
  board = {name: f"{ROOT}/configs/checkerboard.py:{name},quicktest" for name in ("flow_teacher", "gmflow", "ayf_emd")}
  methods = GMFLOW | dict(students=((1,),), config=board["gmflow"]), EMD | dict(config=board["ayf_emd"])
  config = comparison(*methods, teacher=dict(config=board["flow_teacher"]), flops=5e6)
  report = compare(config, tmp_path)
  assert not [run["error"] for run in report["runs"] if "error" in run]
  runs = {run["run"]: run for run in report["runs"]}
  for name in ("gmflow/nfe1", "emd/nfe1-2"):
    run = runs[name]
    assert run["steps"] == 5e6 // run["step_flops"]
    assert 5e6 - run["step_flops"] < run["flops"] <= 5e6
    assert (tmp_path / "seed0" / name / "checkpoints" / str(run["steps"])).exists()
  assert runs["gmflow/nfe1"]["steps"] != runs["emd/nfe1-2"]["steps"], "steps differ where a step costs differently"
  rows = {(row["method"], row["nfe"]): row for row in report["table"]}
  assert {("teacher", 1), ("teacher", 2), ("gmflow", 1), ("emd", 1), ("emd", 2)} <= set(rows)
  assert rows["teacher", 4]["alignment_ratio"]["mean"] == 1.0
  assert (tmp_path / "compare.png").stat().st_size > 10_000
  assert all(row["fd_ratio"]["mean"] > 0 and row["recall"]["mean"] >= 0 for row in rows.values())
  teachers = [[row for row in runs[name]["rows"] if row["name"].startswith("teacher")] for name in list(runs)[1:]]
  for a, b in zip(*teachers, strict=True):
    assert a["fd"] == pytest.approx(b["fd"], rel=1e-3), "one teacher, one noise"
  kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path]
  times = {path: path.stat().st_mtime_ns for path in kept}
  capsys.readouterr()
  assert compare(config, tmp_path) == report
  assert {path: path.stat().st_mtime_ns for path in kept} == times
  assert "compiling" not in capsys.readouterr().out
