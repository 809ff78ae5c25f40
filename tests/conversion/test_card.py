"""Cards of exports: what they say, what they do not know, and whose they are."""

import json
import shutil

import pytest
import yaml

from pflow_jax.conversion.card import UNKNOWN, is_own
from pflow_jax.conversion.origin import data_name, front_matter, told_by_folder
from pflow_jax.conversion.program import convert
from pflow_jax.training import workdir
from tests.conversion.folders import write_run, write_torch

pytestmark = pytest.mark.usefixtures("float32")

FRONT = """---
license: other  # a comment
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
language:
- en
---
# FLUX.1
"""


def pipeline(folder, front=FRONT):
  """A pipeline's folder with a card; returns its transformer's, which is empty."""
  (folder / "transformer").mkdir(parents=True)
  (folder / "model_index.json").write_text("{}")
  if front is not None:
    (folder / "README.md").write_text(front)
  return folder / "transformer"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
  """An adapter's run; its teacher was converted from the Hub's cache."""
  folder = tmp_path_factory.mktemp("flux")
  source = pipeline(folder / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "0a1b")
  convert(write_torch(source, "flux"), folder / "run" / "flux")
  write_run(folder / "gmflux_3nfe", "flux", "gmflow", folder)
  return folder


def test_an_adapters_card_has_its_teacher_and_that_ones_licence(flux, tmp_path):
  convert(flux / "gmflux_3nfe", tmp_path / "out")
  card = tmp_path / "out" / "README.md"
  link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
  assert front_matter(card) == {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": link,
    "base_model": "black-forest-labs/FLUX.1-dev",
    "base_model_relation": "adapter",
    "pipeline_tag": "text-to-image",
    "library_name": "pflow_jax",
    "tags": ["pflow_jax", "gmflow", "few-step"],
  }
  text = card.read_text()
  for line in (
    "# gmflux_3nfe\n",
    "| network | `GMFluxTransformer2DModel`, low-rank adapters of rank 3, 4 |",
    "| NFE | 3, the last segment 0.5 as long as the others |",
    "| teacher | black-forest-labs/FLUX.1-dev |",
    f"| licence of the teacher | [flux-1-dev-non-commercial-license]({link}), by its own card;",
    'pf.load("FOLDER", base="TEACHER")',
    'pipe.load_lakonlab_adapter("FOLDER", target_module_name="transformer")',
    "ComfyUI-piFlow",
  ):
    assert line in text
  assert str(flux) not in text  # nothing of this machine is published
  assert "\n## Evaluation\n" not in text


def test_a_card_is_the_same_again_and_has_what_was_measured_since(flux, tmp_path):
  run, out = shutil.copytree(flux / "gmflux_3nfe", tmp_path / "gmflux_3nfe"), tmp_path / "out"
  convert(run, out)
  before = (out / "README.md").read_text()
  assert not convert(run, out)
  assert (out / "README.md").read_text() == before
  row = {"name": "student, 3 NFE", "nfe": 3, "alignment_ratio": [0.5, 0.01], "fd_ratio": [1.2, 0.1]}
  report = {"data": "folder:/home/me/flowers", "num_samples": 256, "num_real": 1797, "rows": [row]}
  (run / "evaluation").mkdir()
  (run / "evaluation" / "evaluation.json").write_text(json.dumps(report))
  assert not convert(run, out)
  text = (out / "README.md").read_text()
  assert "student, 3 NFE" in text
  assert "0.500 ± 0.010" in text
  assert "256 samples, 1797 data, folder:flowers)" in text
  assert "/home/me" not in text
  (run / "evaluation" / "evaluation.json").write_text(json.dumps(report | {"step": 10**6}))
  assert not convert(run, out)
  assert (out / "README.md").read_text() == before, "what was measured of another step is not of this export"
  assert is_own(out / "README.md")


@pytest.mark.parametrize("report", ["[]", "{}", '{"rows": [3]}', '{"rows": []}', "{", '{"rows": {"a": 1}}'])
def test_a_report_of_another_kind_is_left_out(flux, tmp_path, report):
  run = shutil.copytree(flux / "gmflux_3nfe", tmp_path / "gmflux_3nfe")
  (run / "evaluation").mkdir()
  (run / "evaluation" / "evaluation.json").write_text(report)
  convert(run, tmp_path / "out")
  assert "## Evaluation" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
  "change", [lambda text: text.replace("# gm", "# My gm"), lambda text: "# Mine\n", lambda text: ""]
)
def test_a_card_that_was_edited_is_left_alone(flux, tmp_path, capsys, change):
  convert(flux / "gmflux_3nfe", tmp_path / "out")
  card = tmp_path / "out" / "README.md"
  card.write_text(change(card.read_text()))
  edited = card.read_text()
  capsys.readouterr()
  convert(flux / "gmflux_3nfe", tmp_path / "out")
  assert card.read_text() == edited
  assert "was edited, or is not of pflow_jax" in capsys.readouterr().out


def test_what_is_not_known_is_said_to_be_so(tmp_path, teachers):
  write_run(tmp_path / "run", "flux", "constant", teachers)
  convert(tmp_path / "run", tmp_path / "out")
  card = (tmp_path / "out" / "README.md").read_text()
  assert f"| licence of the teacher | {UNKNOWN} |" in card
  assert "| teacher | flux |" in card  # its folder's name
  assert front_matter(tmp_path / "out" / "README.md")["license"] == "unknown"
  assert "base_model" not in card
  assert "ComfyUI" not in card  # it reads no constant log-std


def test_a_teacher_that_is_gone_is_unknown(flux, tmp_path):
  run = shutil.copytree(flux / "gmflux_3nfe", tmp_path / "run")
  config = json.loads((run / workdir.CONFIG).read_text())
  config["teacher"]["workdir"] = str(tmp_path / "gone")
  (run / workdir.CONFIG).write_text(json.dumps(config))
  convert(run, tmp_path / "out")
  card = (tmp_path / "out" / "README.md").read_text()
  assert f"| teacher | {UNKNOWN} |" in card
  assert f"| licence of the teacher | {UNKNOWN} |" in card


@pytest.mark.parametrize(
  ("name", "told"),
  [("digits", "digits"), ("folder:/home/me/flowers", "folder:flowers"), ("/home/me/x.npz", "x.npz"), (None, "unknown")],
)
def test_of_data_in_a_folder_the_last_part_is_told(name, told):
  assert data_name(name) == told


def test_a_student_of_a_teacher_from_here_names_its_data(student_run, tmp_path):
  convert(student_run, tmp_path / "out")
  card = (tmp_path / "out" / "README.md").read_text()
  assert "| teacher | trained with pflow_jax on digits |" in card
  assert f"| data | digits, licence {UNKNOWN} |" in card
  assert "1 network evaluation: it predicts" in card


@pytest.mark.parametrize(
  ("front", "told"),
  [
    (None, {}),
    ("# no front matter\n", {}),
    ("---\nlicense: [a, b\n---\n", {}),
    ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
    ("---\nlicense: 'a | b\n  `c`'\n---\n", {}),
    ("---\n- license\n---\n", {}),
    ("---\nlicense: " + "[" * 5000 + "\n---\n", {}),
    ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", {}),
    ("---\nlicense_name: alone\n---\n", {}),
    ("---\nlicense: other\nlicense_link: LICENSE.md\n---\n", {"license": "other"}),  # a link to nowhere known
  ],
)
def test_what_a_teachers_card_tells(tmp_path, front, told):
  assert told_by_folder(pipeline(tmp_path / "model", front)) == told


def test_a_card_of_an_unrelated_folder_above_is_not_the_models(tmp_path):
  (tmp_path / "transformer").mkdir()
  (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
  assert told_by_folder(tmp_path / "transformer") == {}


def test_front_matter_is_yaml(flux, tmp_path):
  convert(flux / "run" / "flux", tmp_path / "out")
  head = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
  assert yaml.safe_load(head)["base_model"] == "black-forest-labs/FLUX.1-dev"
  assert "base_model_relation" not in head
