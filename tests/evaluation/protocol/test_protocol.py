"""ADM's protocol on tiny runs: what is drawn, what is measured, and going on after being killed."""

import dataclasses
import json
import re
import shutil
import zipfile

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from pflow_jax.checkpoints.steps import steps_of
from pflow_jax.commands import cli
from pflow_jax.evaluation import metrics
from pflow_jax.evaluation.protocol import Protocol, evaluate, evaluate_by_protocol, kept
from pflow_jax.evaluation.protocol.drawing import Drawing
from pflow_jax.evaluation.protocol.draws import drawn_labels, draws
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.reference import comparable, open_reference
from pflow_jax.evaluation.protocol.report import over_draws
from pflow_jax.evaluation.protocol.scores import measured
from pflow_jax.evaluation.references import Reference, load_reference
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.training.workdir import load_config
from tests.evaluation.stub_network import StubNetwork

pytestmark = pytest.mark.usefixtures("float32")

NUMBER, PART = 70, 32
SMALL = {"num_samples": NUMBER, "num_paired": 16}


class Network(StubNetwork):
  """A feature network with logits."""

  num_logits = 4

  def __call__(self, pictures):
    found = super().__call__(pictures)
    return found._replace(logits=found.pool[:, :4])


@pytest.fixture(scope="module", autouse=True)
def small_parts():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, "PART", PART)
    patch.setattr(evaluate, "PAIRS_IN_PART", 8)
    patch.setattr(evaluate, "open_feature_network", lambda path, layout, width: Network())
    yield


def reference_of(folder, count=200, spatial=4, network="stub 1", name="reference", seed=3):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(count, 6)).astype(np.float32)
  places = metrics.Moments.from_features(rng.normal(size=(count, spatial)))
  made = Reference(metrics.Moments.from_features(features), places, features, network)
  made.save(folder / f"{name}.npz")
  return folder / f"{name}.npz"


def config_of(run):
  config = load_config(run)
  config.evaluate.features = "inception.pt"
  return config


def evaluated(run, folder, **settings):
  path = reference_of(folder)
  return evaluate_by_protocol(config_of(run), run, path, protocol=Protocol(**{**SMALL, **settings}), out=folder / "adm")


@pytest.fixture(scope="module")
def made(student_run, small_parts, tmp_path_factory):
  """An evaluation, which no test changes: its report and its folder."""
  folder = tmp_path_factory.mktemp("made")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return evaluated(student_run, folder, keep="npz"), folder / "adm"


def test_the_table_has_the_metrics_of_the_samples_that_are_kept(made):
  report, folder = made
  (row,) = report["rows"]
  with np.load(folder / "1_nfe" / "samples.npz") as file:
    seen, labels = file["arr_0"], file["arr_1"]
  assert (seen.shape, seen.dtype, labels.shape) == ((NUMBER, 8, 8, 3), np.uint8, (NUMBER,))
  pool, spatial, logits = Network()(seen)
  known = np.load(folder.parent / "reference.npz")
  reference = metrics.Moments(known["mu"], known["sigma"], None)
  assert row["fid"][0] == pytest.approx(metrics.frechet_distance(pool, reference), rel=1e-6)
  apart = metrics.Moments(known["mu_s"], known["sigma_s"], None)
  assert row["sfid"] == pytest.approx(metrics.frechet_distance(spatial, apart), rel=1e-6)
  assert row["inception_score"] == pytest.approx(metrics.inception_score(logits, 10))
  assert row["kid"][0] == pytest.approx(1000 * metrics.kernel_distance(known["features"], pool, subset_size=70).mean)
  near = metrics.prdc(known["features"], pool, 3)._asdict()
  assert {name: row[name] for name in near} == pytest.approx(near)
  low, high = map(float, row["fid_interval"].split(" to "))
  assert low <= row["fid_unbiased"] <= high
  assert row["alignment"] > 0
  assert {"alignment_ratio", "diversity_ratio"} <= row.keys()
  assert json.loads((folder / "adm.json").read_text()) == json.loads(json.dumps(report))
  text = (folder / "adm.md").read_text()
  assert "70 samples of random classes, seed 0" in text
  assert "16 samples more, 8 of a class" in text
  assert (folder / "1_nfe" / "samples.png").stat().st_size > 1000


def test_adms_own_reader_finds_the_samples(made):
  """It reads arr_0.npy of the archive by itself, a part at a time, and takes headers of NumPy's version 1.0 alone."""
  with zipfile.ZipFile(made[1] / "1_nfe" / "samples.npz") as archive, archive.open("arr_0.npy") as file:
    assert np.lib.format.read_magic(file) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert (shape, fortran, dtype) == ((NUMBER, 8, 8, 3), False, np.uint8)
    assert len(file.read()) == np.prod(shape)


def test_a_killed_evaluation_goes_on_with_the_same_numbers(made, student_run, tmp_path, monkeypatch):
  report, folder = made
  write, written = Parts.write, []

  def killed(self, number, *rest, **options):
    write(self, number, *rest, **options)
    written.append(number)
    if len(written) in (1, 4, 6):
      raise KeyboardInterrupt

  monkeypatch.setattr(Parts, "write", killed)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt):
      evaluated(student_run, tmp_path, keep="npz")
  monkeypatch.setattr(evaluate, "measured", lambda *_: pytest.fail("measured again"))
  again = evaluated(student_run, tmp_path, keep="npz")
  assert written == [0, 1, 2, 0, 1, 0, 1], "each part once: three of the samples, two of pairs of teacher and student"
  without = lambda row: {key: value for key, value in row.items() if key not in ("images_per_second", "reference")}
  assert [*map(without, again["rows"])] == [*map(without, report["rows"])]
  a, b = (np.load(one / "1_nfe" / "samples.npz")["arr_0"] for one in (folder, tmp_path / "adm"))
  np.testing.assert_array_equal(a, b)
  assert not list(tmp_path.rglob("pictures.npy"))
  assert (tmp_path / "adm" / "1_nfe" / "samples.png").exists()


def test_all_pictures_are_kept_in_one_folder(student_run, tmp_path):
  first = evaluated(student_run, tmp_path, keep="png", num_paired=0)
  files = sorted((tmp_path / "adm" / "1_nfe" / "samples").iterdir())
  assert [file.name for file in files] == [f"{i:06}.png" for i in range(NUMBER)]
  with Image.open(files[-1]) as picture:
    assert (picture.size, picture.mode) == ((8, 8), "RGB")
  again = evaluated(student_run, tmp_path, keep="png", num_paired=0)
  assert again == first, "nothing was left to draw"


def test_a_teacher_is_measured_by_its_own_solver(teacher_run, tmp_path):
  config = config_of(teacher_run)
  config.sample.nfe, config.sample.solver = (3,), "heun"
  settings = Protocol(**SMALL, labels="balanced")
  report = evaluate_by_protocol(config, teacher_run, reference_of(tmp_path), protocol=settings, out=tmp_path / "adm")
  (row,) = report["rows"]
  assert row["nfe"] == 3
  assert "alignment" not in row
  labels = np.load(tmp_path / "adm" / "3_nfe" / "part_00000" / "label.npy")
  assert len(np.unique(labels)) == 10


def test_samples_depend_on_their_number_and_the_seed_alone():
  draw = draws((2, 2, 1), seed=3)
  noise, keys = draw(np.arange(8))
  few, few_keys = draw(np.array([5, 2]))
  np.testing.assert_array_equal(few, noise[np.array([5, 2])])
  np.testing.assert_array_equal(jax.random.key_data(few_keys), jax.random.key_data(keys)[np.array([5, 2])])
  assert not np.array_equal(draws((2, 2, 1), seed=4)(np.arange(8))[0], noise)


def test_samples_do_not_depend_on_jaxs_default_generator():
  noise, keys = draws((4,), seed=3)(np.arange(6))
  with jax.default_prng_impl("rbg"):
    other, other_keys = draws((4,), seed=3)(np.arange(6))
    labels = drawn_labels(Protocol(num_samples=50), 10)
  np.testing.assert_array_equal(other, noise)
  np.testing.assert_array_equal(jax.random.key_data(other_keys), jax.random.key_data(keys))
  np.testing.assert_array_equal(labels, drawn_labels(Protocol(num_samples=50), 10))
  with jax.default_prng_impl("threefry2x32"):
    key = jax.random.fold_in(jax.random.key(3), 5)
  np.testing.assert_array_equal(noise[5], jax.random.normal(jax.random.split(key, 3)[0], (4,)))


def test_noise_is_standard_normal_and_independent():
  x = np.asarray(draws((4,), seed=0)(np.arange(20_000))[0], np.float64)
  assert np.abs(x.mean(axis=0)).max() < 0.03
  np.testing.assert_allclose(np.cov(x.T), np.eye(4), atol=0.04)
  neighbours = np.mean(x[1:] * x[:-1])
  assert abs(neighbours) < 0.02


def test_random_classes_are_uniform_and_balanced_ones_equal():
  own = drawn_labels(Protocol(num_samples=20_000, num_paired=0), 10)
  counts = np.bincount(own, minlength=10)
  assert (counts != 2000).any()
  assert np.sum((counts - 2000) ** 2 / 2000) < 27.9, "chi-square of nine degrees of freedom, 0.1 %"
  balanced = drawn_labels(Protocol(num_samples=20_000, num_paired=0, labels="balanced"), 10)
  np.testing.assert_array_equal(np.bincount(balanced), np.full(10, 2000))
  assert len(np.unique(balanced[::20])) == 10, "in a random order: every 20th has all classes"
  few = drawn_labels(Protocol(num_samples=20_010, num_paired=0), 10)
  np.testing.assert_array_equal(few[:20_000], own)


def test_pairs_are_several_of_classes_that_lie_apart():
  labels = drawn_labels(Protocol(num_samples=4, num_paired=512), 1000)[4:]
  kinds, counts = np.unique(labels, return_counts=True)
  assert (len(kinds), set(counts)) == (64, {8})
  assert kinds.max() > 950


def test_numbers_without_a_reference_for_them_are_left_out(tmp_path):
  parts = Parts(tmp_path, {}, count=40, size=16)
  rng = np.random.default_rng(0)
  for number in range(len(parts)):
    parts.write(number, {"pool": rng.normal(size=(len(parts.rows_of(number)), 6)).astype(np.float32)})
  moments = metrics.Moments(np.zeros(6), np.eye(6), None)
  row = measured(parts, Reference(moments))
  assert set(row) == {"fid", "fid_unbiased", "fid_interval"}
  few = Parts(tmp_path / "few", {}, count=12, size=16)
  few.write(0, {"pool": rng.normal(size=(12, 6)).astype(np.float32)})
  assert set(measured(few, Reference(moments))) == {"fid"}, "too few to leave some out"


@pytest.mark.parametrize(
  ("change", "problem"),
  [
    ({"num_samples": 11}, "num: a Fréchet distance in 6 features needs at least 12 samples, got 11"),
    ({"num_samples": 1}, "at least 2 samples"),
    ({"num_paired": -1}, "at least 2 samples, and 0 pairs or at least 2"),
    ({"num_paired": 1}, "0 pairs or at least 2.* got 70 and 1"),
  ],
)
def test_too_few_samples_are_refused_first(student_run, tmp_path, change, problem):
  with pytest.raises(ValueError, match=problem):
    evaluated(student_run, tmp_path, **change)
  assert not (tmp_path / "adm").exists()


def test_a_reference_of_another_network_is_refused(student_run, tmp_path):
  with pytest.raises(ValueError, match="expected features of stub 1, got those of 'stub 2'"):
    evaluate_by_protocol(config_of(student_run), student_run, reference_of(tmp_path, network="stub 2"))


def test_samples_that_are_not_finite_have_no_score(student_run, tmp_path, monkeypatch):
  make = evaluate.make_sampler
  broken = lambda *arguments: lambda *values: make(*arguments)(*values).at[3].set(np.nan)
  monkeypatch.setattr(evaluate, "make_sampler", broken)
  with pytest.raises(ValueError, match=r"1 of 32 samples from number 0 on are not finite"):
    evaluated(student_run, tmp_path)


def test_a_disk_without_room_is_told_before_work(student_run, tmp_path, monkeypatch):
  monkeypatch.setattr(kept, "SPARE", 2**60)
  with pytest.raises(ValueError, match=r"features and samples take .*, the disk has .* free"):
    evaluated(student_run, tmp_path)


def test_another_evaluation_is_not_mixed_in(made, student_run, tmp_path):
  report, folder = made
  shutil.copytree(folder, tmp_path / "adm")
  with pytest.raises(ValueError, match=r"holds what was made of seed 0, not 1"):
    evaluated(student_run, tmp_path, keep="npz", seed=1)
  config, path = config_of(student_run), reference_of(tmp_path)
  config.objective.shift = 2.5
  again = lambda: evaluate_by_protocol(
    config, student_run, path, protocol=Protocol(**SMALL, keep="npz"), out=tmp_path / "adm"
  )
  with pytest.raises(ValueError, match=r"adm holds what was made of objective.shift 1.0, not 2.5; name another folder"):
    again()
  file = tmp_path / "adm" / "adm.json"
  file.write_text(json.dumps(report | {"rows": [{"nfe": 1}]}))
  with pytest.raises(ValueError, match=r"adm.json: expected rows with nfe, notes, .*; remove it"):
    evaluated(student_run, tmp_path, keep="npz")
  file.write_text(json.dumps({key: value for key, value in report.items() if key != "format"}))
  with pytest.raises(ValueError, match="of another version of pflow_jax; name another folder, or remove this one"):
    again()
  file.unlink()
  with pytest.raises(ValueError, match=r"1_nfe holds what was made of objective"):
    again()


def test_rows_of_other_references_and_evaluations_stay(student_run, tmp_path, monkeypatch, capsys):
  config, out, drawn = config_of(student_run), tmp_path / "adm", []
  config.sample.batch_size = PART
  first, other = reference_of(tmp_path), reference_of(tmp_path, spatial=5, name="other", seed=4)
  fill = Drawing.fill
  counted = lambda self, parts, *rest, **more: drawn.append(parts.num_missing()) or fill(self, parts, *rest, **more)
  monkeypatch.setattr(Drawing, "fill", counted)

  def run(reference, nfe):
    config.sample.nfe = (nfe,)
    settings = Protocol(**SMALL, keep="npz")
    return evaluate_by_protocol(config, student_run, reference, protocol=settings, out=out)["rows"]

  (alone,) = run(first, 1)
  (out / "1_nfe" / "samples.npz").rename(tmp_path / "mine.npz")
  rows = run(other, 1)
  assert drawn == [NUMBER, 16, 16, 0, 0], "samples and pairs of teacher and student, once"
  assert "samples.npz is not there any more, or not whole" in capsys.readouterr().out
  by_reference = {row["reference"]: row for row in rows}
  second = by_reference[str(other)]
  assert by_reference[str(first)] == alone
  assert (second["notes"], alone["notes"]) == (
    ["no sFID: the reference has 5 spatial features, the feature network 4"],
    [],
  )
  assert ("sfid" in alone, "sfid" in second) == (True, False)
  assert second["images_per_second"] == alone["images_per_second"] > 0
  assert second["alignment"] == alone["alignment"]
  assert [(row["nfe"], row["reference"]) for row in run(first, 2)].count((2, str(first))) == 1
  assert drawn[-2:] == [NUMBER, 16], "the teacher's pairs are there"
  text = (out / "adm.md").read_text()
  assert text.count("| NFE |") == 2
  assert "of 200 images; no sFID: the reference has 5" in text


def test_several_draws_are_evaluations_of_several_seeds(student_run, tmp_path, monkeypatch, capsys):
  """EDM2's protocol: the table has the mean FID of three, and the lowest; what is there is not drawn again."""
  (alone,) = evaluated(student_run, tmp_path, num_paired=0)["rows"]
  write, written = Parts.write, []

  def killed(self, number, *rest, **options):
    write(self, number, *rest, **options)
    written.append((self.folder.name, number))
    if len(written) == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(Parts, "write", killed)
  with pytest.raises(KeyboardInterrupt):
    evaluated(student_run, tmp_path, num_paired=0, draws=3)
  capsys.readouterr()
  rows = evaluated(student_run, tmp_path, num_paired=0, draws=3)["rows"]
  assert written == [(f"1_nfe_seed{seed}", number) for seed in (1, 2) for number in range(3)]
  assert [row["seed"] for row in rows] == [0, 1, 2]
  assert rows[0] == alone
  numbers = lambda row: {key: row[key] for key in ("fid", "sfid", "kid", "precision", "inception_score")}
  own = evaluate_by_protocol(
    config_of(student_run),
    student_run,
    tmp_path / "reference.npz",
    protocol=Protocol(NUMBER, seed=1, num_paired=0),
    out=tmp_path / "own",
  )
  assert numbers(own["rows"][0]) == numbers(rows[1]) != numbers(rows[0])
  (mean,) = over_draws(rows)
  fids = [row["fid"][0] for row in rows]
  assert mean["fid"] == pytest.approx((np.mean(fids), np.sqrt(sum(row["fid"][1] ** 2 for row in rows)) / 3))
  assert (mean["num_draws"], mean["fid_lowest"]) == (3, min(fids))
  assert mean["kid"] == pytest.approx(np.mean([row["kid"][0] for row in rows]))
  assert "fid_interval" not in mean
  text = (tmp_path / "adm" / "adm.md").read_text()
  for told in (text, capsys.readouterr().out):
    assert re.search(r"\| NFE \| draws \| +FID \| FID, lowest draw \|", told)
  assert "seed 0 and 1 and 2; numbers of several draws are their means" in text
  assert evaluated(student_run, tmp_path, num_paired=0)["rows"] == rows, "one draw of the three is there"
  with pytest.raises(ValueError, match="seeds below 2.32, got 4294967294 and 3"):
    Protocol(seed=2**32 - 2, draws=3)


def test_a_killed_evaluation_keeps_its_checkpoint_while_it_is_there(student_run, tmp_path, monkeypatch, capsys):
  run, step = tmp_path / "run", max(steps_of(epath.Path(student_run / "checkpoints")))
  shutil.copytree(student_run, run)
  with monkeypatch.context() as patch:
    patch.setattr(Drawing, "fill", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      evaluated(run, tmp_path, num_paired=0)
  shutil.copytree(run / "checkpoints" / str(step), run / "checkpoints" / "9")
  assert evaluated(run, tmp_path, num_paired=0)["step"] == step
  assert f"going on with the evaluation of step {step}" in capsys.readouterr().out
  with pytest.raises(ValueError, match=f"holds what was made of step {step}, not 9"):
    evaluated(run, tmp_path, num_paired=0)
  path = reference_of(tmp_path)
  again = lambda step: evaluate_by_protocol(
    config_of(run), run, path, protocol=Protocol(NUMBER, num_paired=0), step=step, out=tmp_path / "adm"
  )
  assert again(step)["step"] == step
  with pytest.raises(ValueError, match="no checkpoint of step 7"):
    again(7)


def test_a_reference_that_cannot_be_compared_is_told_before_samples_are_drawn(tmp_path):
  network = Network()
  known = load_reference(reference_of(tmp_path))
  assert comparable(known, network, 100)[1] == []
  trimmed, notes = comparable(known, network, 7)
  assert (trimmed.spatial, notes) == (None, ["no sFID: 4 spatial features need 8 of each, there are 7 samples"])
  small = dataclasses.replace(known.spatial, count=6)
  assert (
    "there are 6 images of the reference" in comparable(dataclasses.replace(known, spatial=small), network, 100)[1][0]
  )
  alone = Reference(known.pool)
  assert [note.split(":")[0] for note in comparable(alone, network, 100)[1]] == [
    "no sFID",
    "no KID, precision, recall, density and coverage",
  ]
  few = Reference(dataclasses.replace(known.pool, count=11))
  with pytest.raises(ValueError, match="in 6 features needs at least 12 images, this one is of 11"):
    comparable(few, network, 100)
  with pytest.raises(ValueError, match="precision and recall need more than 3 features, got 3"):
    comparable(dataclasses.replace(known, features=known.features[:3]), network, 100)


def test_features_of_a_references_pictures_are_made_once(tmp_path):
  rng = np.random.default_rng(0)
  pictures, moments = (
    rng.integers(0, 256, (20, 8, 8, 3), np.uint8),
    metrics.Moments.from_features(rng.normal(size=(90, 6))),
  )
  np.savez(tmp_path / "adm.npz", mu=moments.mean, sigma=moments.cov, arr_0=pictures)
  network, lock = Network(), Lock(tmp_path, "test")
  with lock:
    first = open_reference(tmp_path / "adm.npz", network, 50, tmp_path, lock)
    assert network.most == 20
    network.most = 0
    again = open_reference(tmp_path / "adm.npz", network, 50, tmp_path, lock)
    assert network.most == 0
    np.testing.assert_array_equal(again.reference.features, network(pictures).pool)
    np.testing.assert_array_equal(again.reference.pool.cov, first.reference.pool.cov)
    assert (again.digest, again.num_images, again.notes) == (first.digest, None, first.notes)
    other = Network(name="stub 2")
    assert open_reference(tmp_path / "adm.npz", other, 50, tmp_path, lock).digest != first.digest
    assert other.most == 20


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, {8}), (16, {16}), (40, {24}), (1000, {24})])
def test_all_batches_are_of_one_size_and_may_be_of_several_parts(tmp_path, batch_size, sizes):
  layout, seen = make_layout({"data": -1}, ()), []
  labels = np.arange(22, dtype=np.int32)

  @jax.jit
  def sampler(noise, classes, keys):
    seen.append(len(noise))
    return noise + classes[:, None]

  parts = Parts(tmp_path, {}, count=20, size=8)
  drawing = Drawing(layout, batch_size, draws((3,), 0), labels, Lock(tmp_path, "test", active=False))
  drawing.fill(parts, "x", {"x": sampler}, first=2)
  assert set(seen) == sizes
  assert len(seen) == 1
  expected = draws((3,), 0)(np.arange(2, 22))[0] + labels[2:, None]
  np.testing.assert_allclose(parts.rows("x")[0:20], expected, rtol=1e-6)


def test_the_command(student_run, tmp_path, capsys):
  flags = ["--protocol=adm", "--features=inception.pt", f"--reference={reference_of(tmp_path)}", "--num=64"]
  cli.main(
    ["evaluate", f"--workdir={student_run}", *flags, "--paired=0", f"--out={tmp_path / 'out'}", "--nfe=2", "--draws=2"]
  )
  assert "| NFE |" in capsys.readouterr().out
  rows = json.loads((tmp_path / "out" / "adm.json").read_text())["rows"]
  assert [(row["nfe"], row["seed"]) for row in rows] == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
  ("flags", "problem"),
  [
    (["--num=64"], "are of --protocol=adm"),
    (["--draws=3"], "are of --protocol=adm"),
    (["--protocol=adm"], "reference: expected a file of moments"),
    (["--protocol=adm", "--reference=x.npz", "--also=y"], "also: expected one run"),
    (["--protocol=adm", "--reference=x.npz"], "features: expected the file of a feature network"),
  ],
)
def test_flags_that_do_not_fit_are_refused(student_run, flags, problem, capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(["evaluate", f"--workdir={student_run}", *flags])
  assert ended.value.code == 2
  assert problem in capsys.readouterr().err
