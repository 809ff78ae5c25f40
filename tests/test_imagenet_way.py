"""From pictures in a folder to the papers' table, by the programs, one after another, with small networks of all kinds.

tests/training, conversion and evaluation kill each of the programs; benchmarks/imagenet_way.py does both at once.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.commands import cli
from pflow_jax.evaluation import feature_networks
from tests.programs import load_module

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float32")]

ROOT = pathlib.Path(__file__).parents[1]


def test_the_way_from_pictures_to_the_table(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  way = load_module(ROOT / "benchmarks" / "imagenet_way.py")
  monkeypatch.setattr(feature_networks, "PICTURES_A_DEVICE", 4)
  monkeypatch.setattr(way.Way, "run", lambda self, name, argv, pattern="": cli.main(argv))
  way.main([f"--folder={tmp_path}", "--quicktest", "--size=32", "--pictures=128", "--samples=128", "--paired=8"])

  told = capsys.readouterr().out
  assert "taken for sit as --convention says: time from noise, 0, to data, 1, velocity x0 - eps" in told
  trained = load_params(tmp_path / "trained" / "checkpoints", which="ema")
  back = load_params(tmp_path / "teacher" / "checkpoints", which="params")
  jax.tree.map(np.testing.assert_array_equal, trained, back)
  for n in (1, 2):
    report = json.loads((tmp_path / f"student{n}" / "adm" / "adm.json").read_text())
    (row,) = report["rows"]
    assert (row["nfe"], report["num_samples"]) == (n, 128)
    assert {"fid", "kid", "precision", "recall", "density", "coverage", "alignment", "diversity_ratio"} <= row.keys()
    assert report["network"].endswith(", 64 features")
    with np.load(tmp_path / f"student{n}" / "adm" / f"{n}_nfe" / "samples.npz") as file:
      assert file["arr_0"].shape == (128, 32, 32, 3)
  assert told.rstrip().splitlines()[-4].startswith("| NFE |")
