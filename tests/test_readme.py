"""What the README points at exists, and its lines of Python run."""

import pathlib
import re

import numpy as np
import pytest

import pflow_jax as pf

ROOT = pathlib.Path(__file__).parents[1]


def test_links_and_pictures_exist():
  links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
  local = [link for link in links if "://" not in link]
  assert len(local) >= 3
  assert not [link for link in local if not (ROOT / link.partition("#")[0]).exists()]


SHRUNK = {
  r"steps=\d+": "steps=2, batch_size=8",
  r"width=64, depth=4": "width=16, depth=1",
  r"student\.evaluate\(\)": (
    "student.evaluate(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2, quiet=True)"
  ),
}


@pytest.mark.usefixtures("float32")
def test_lines_of_the_notebook_run(tmp_path, monkeypatch):
  """All of the library's, with fewer steps and a smaller network; then a teacher that is a function."""
  monkeypatch.chdir(tmp_path)
  text = (ROOT / "README.md").read_text()
  blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "pf.distill" in block]
  assert len(blocks) == 2
  names = {"velocity": lambda x, t, cond: 0.5 * x}
  for block in blocks:
    for pattern, small in SHRUNK.items():
      block = re.sub(pattern, small, block)
    exec(block, names)
  assert names["x"].shape == (16, 8, 8, 1)
  np.testing.assert_allclose(pf.load(tmp_path / "runs/s").sample(16, labels=[3, 7], seed=1), names["x"], atol=1e-5)
