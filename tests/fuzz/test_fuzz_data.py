"""Damaged files of data end in a ValueError of one sentence, soon, and with little memory."""

import pathlib

import pytest

from tests.fuzz.cases import MANY, check_cases, problem_of_reader
from tests.fuzz.mutations import damage
from tests.fuzz.seeds_data import SEEDS, SLOW_SEEDS

KINDS = SEEDS | SLOW_SEEDS if MANY else SEEDS


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_a_sentence(kind, tmp_path):
  folder = tmp_path / "data"  # what is read lies there
  folder.mkdir()
  path, read = KINDS[kind](folder)
  read()
  within = path.relative_to(folder)
  check_cases(kind, folder, lambda: problem_of_reader(read), lambda rng, copied: damage(rng, copied / within), 30)


def test_every_set_that_is_read_from_files_has_a_seed():
  from pflow_jax.data import registry

  text = pathlib.Path(__file__).with_name("seeds_data.py").read_text()
  for pattern in registry._OPEN_SOURCES:
    assert f'"{pattern.partition(":")[0]}:' in text, pattern
