"""Nearest names of error messages."""

from pflow_jax.files.nearest import did_you_mean, nearest


def test_the_most_alike_come_first_in_their_own_spelling():
  known = ["batch_size", "Steps", "step_size", "seed"]
  assert nearest("batchsize", known) == ["batch_size"]
  assert nearest("STEP", known, 2) == ["Steps", "step_size"]
  assert nearest("xyz", known) == []


def test_a_hint_is_a_clause_of_a_message():
  assert did_you_mean("sed", ["seed"]) == "; did you mean 'seed'?"
  assert did_you_mean("xyz", ["seed"]) == ""
  assert did_you_mean("xyz", ["seed"], ".") == "."
