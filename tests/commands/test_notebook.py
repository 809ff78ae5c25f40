"""What a notebook shows: cells run in a kernel of their own, and the outputs that are stored are looked at."""

import base64
import io
import re

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

CELLS = {
  "start": """
import os, signal
import numpy as np
import pflow_jax as pf
from pflow_jax.training import sample as sampling
from pflow_jax.training.keeping import Keeper

stop = lambda: os.kill(os.getpid(), signal.SIGINT)  # the stop button
metrics, to_host = Keeper.metrics, sampling.to_host
data = pf.data.from_arrays(np.random.default_rng(0).normal(size=(64, 2)), np.arange(64) % 3)
network = pf.MLP(width=8, depth=1)
sampling.SHOWN = 0.0  # seconds
""",
  "train": "run = pf.train(pf.FlowMatching(), data, network, steps=4, batch_size=8, log_every=2)",
  "run": "run",
  "data": 'pf.data.load("digits")',
  "state": "run._state",
  "teacher": "run.as_teacher()",
  "stop a training": """
def stopping(keeper, step, row):
  metrics(keeper, step, row)
  if step == 4:
    stop()

Keeper.metrics = stopping
stopped = pf.train(pf.FlowMatching(), data, network, steps=10**6, batch_size=8, log_every=2)
Keeper.metrics = metrics
print(4 < stopped.steps < 20, stopped.sample(2, nfe=1).shape)
""",
  "stop samples": """
drawn = []
def stopping(x):
  drawn.append(to_host(x))
  if len(drawn) == 2:
    stop()
  return drawn[-1]

sampling.to_host = stopping
x = run.sample(100, nfe=1, batch_size=8)
""",
  "stop an evaluation": """
drawn.clear()
few = dict(num_samples=64, teacher_steps=(4, 128), num_resamples=2)
report = run.evaluate(**few)
""",
  "evaluate": """
sampling.to_host = to_host
run.evaluate(**few)
""",
  "sample": """
sampling.to_host = to_host
x = run.sample(20, nfe=1, batch_size=8)
print(len(drawn), type(x).__name__, x.shape)
""",
  "figure": "pf.plot.samples(x)",
  "figure with pyplot": "import matplotlib.pyplot as plt\nfigure = pf.plot.losses(run)\nfigure",
  "readers": "_ = pf.train(pf.FlowMatching(), data, network, steps=2, batch_size=8, num_workers=1)",
  "shell": "%%bash\necho done",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
  """The outputs of every cell."""
  folder = tmp_path_factory.mktemp("notebook")
  book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS.values()])
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", "")
    client = nbclient.NotebookClient(
      book, timeout=300, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
  return {name: cell.outputs for name, cell in zip(CELLS, book.cells, strict=True)}


def only(outputs):
  (output,) = outputs
  return output


def test_a_training_shows_one_bar_with_its_last_state(outputs):
  shown = only(outputs["train"])
  assert shown.output_type == "display_data"
  assert re.fullmatch(r"flow_matching 4/4  [\d.]+ (steps/s|s/step)  in \d+:\d\d  loss [\d.]+", shown.data["text/plain"])
  assert '<progress value="4" max="4">' in shown.data["text/html"]


def test_what_was_stopped_is_there_and_says_so(outputs):
  bar, text = outputs["stop a training"][0], outputs["stop a training"][-1]
  assert re.match(r"flow_matching \d+/1000000  stopped  ", bar.data["text/plain"])
  assert text.text == "True (2, 2)\n"


def test_stopped_samples_raise_and_the_run_goes_on(outputs):
  bar, error = outputs["stop samples"]
  assert re.match(r"sampling (8|16)/100  stopped", bar.data["text/plain"])
  assert error.ename == "KeyboardInterrupt"
  assert outputs["sample"][-1].text == "2 ndarray (20, 2)\n"


def test_a_stopped_evaluation_raises_and_may_be_made_again(outputs):
  bar, error = outputs["stop an evaluation"]
  assert "stopped" in bar.data["text/plain"]
  assert error.ename == "KeyboardInterrupt"
  bar, report = outputs["evaluate"]
  assert re.match("evaluate 8448/8448  ", bar.data["text/plain"])
  assert "<td>teacher, 128 steps</td>" in report.data["text/html"]
  assert report.data["text/plain"].startswith("| sampler ")


def test_values_are_lines_with_pictures(outputs):
  for name, line, pixels in (
    ("run", r"Run\(flow_matching, mlp with head velocity, [\d,]+ parameters, on arrays, 4 steps\)", True),
    ("data", r"Dataset\(digits, 1,797 images of 8 x 8 x 1, 10 classes\)", True),
    ("state", r"TrainState\([\d,]+ parameters that train, step 4\)", False),
    ("teacher", r"Teacher\(Run\(.*\)\)", False),
  ):
    shown = only(outputs[name]).data
    assert re.fullmatch(line, shown["text/plain"]), shown["text/plain"]
    assert ("text/html" in shown) == pixels
    if pixels:
      picture = re.search(r'base64,([^"]+)"', shown["text/html"])[1]
      assert np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).std() > 10, "not of one colour"


@pytest.mark.parametrize("name", ["figure", "figure with pyplot"])
def test_a_figure_is_shown_once(name, outputs):
  assert "image/png" in only(outputs[name]).data


def test_nothing_is_warned_of(outputs):
  """No process is forked, not by those that read data: JAX warns of it."""
  said = {name: [o.text for o in shown if o.get("name") == "stderr"] for name, shown in outputs.items()}
  assert {name: text for name, text in said.items() if text and name != "stop a training"} == {}
  assert "fork" not in "".join(said["stop a training"])
  assert only(outputs["shell"]).text == "done\n"
  assert only(outputs["readers"]).output_type == "display_data"
