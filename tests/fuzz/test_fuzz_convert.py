"""Damaged models and runs end in a ValueError of one sentence, soon, with little memory, and without running code."""

import functools

import pytest

from tests.fuzz.cases import check_cases, problem_of_reader
from tests.fuzz.mutations import damage
from tests.fuzz.pickles import OF_PICKLES
from tests.fuzz.seeds_convert import SEEDS

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("float32")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("seeds")


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_models_end_in_a_sentence(name, shared, monkeypatch):
  folder = shared / name
  folder.mkdir()
  monkeypatch.chdir(folder)
  path, read = SEEDS[name](folder)
  read()
  check_cases(name, path, lambda: problem_of_reader(read), functools.partial(damage, **OF_PICKLES), 25)
  assert not (folder / "ran").exists()
