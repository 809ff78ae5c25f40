"""All settings of a run: parsed once, written and read back, and understood by the names that they had."""

import dataclasses

import pytest

from pflow_jax.core.objectives import OBJECTIVES, PRETRAINED, kind_of
from pflow_jax.settings.defaults import default_config
from pflow_jax.settings.renamed import renewed, renewed_flag
from pflow_jax.settings.tree import Settings
from tests.programs import quick


def test_settings_are_parsed_once_and_come_back():
  config = quick("digits", "arc_adapters")
  settings = Settings.of(config)
  assert Settings.of(settings) is settings
  assert Settings.of(settings.plain()) == settings
  assert Settings.of(settings.config()) == settings
  assert dataclasses.replace(settings, seed=1) != settings


def test_a_config_is_not_changed():
  config = quick("digits", "gmflow")
  before = config.to_dict()
  changed = Settings.of(config).changed("train", steps=7).changed("model", depth=9).changed("data", held_out=2)
  assert (changed.train.steps, changed.model.get("depth"), changed.data["held_out"]) == (7, 9, 2)
  assert config.to_dict() == before
  with pytest.raises(dataclasses.FrozenInstanceError):
    changed.seed = 3


def test_old_names_are_understood_and_told(caplog):
  old = Settings.of(quick("flux", "gm_data_free")).plain()
  new = dict(old)
  old["policy"] = old.pop("head")
  old["objective"] = {k: v for k, v in old["objective"].items() if k != "data_free"} | {"kind": "imitation_data_free"}
  assert Settings.of(old) == Settings.of(new)
  assert "config.policy is called config.head now" in caplog.text
  assert "kind='imitation' with data_free=True" in caplog.text
  caplog.clear()
  Settings.of(old, quiet=True)
  assert not caplog.text, "a finished run is not to be edited"
  with pytest.raises(ValueError, match="both are given"):
    renewed({"policy": {}, "head": {}})
  assert renewed_flag("--config.policy.num_components=3") == "--config.head.num_components=3"
  assert "--config.policy is called --config.head now" in caplog.text
  assert renewed_flag("--policy=1") == "--policy=1"
  assert default_config("imitation_data_free").objective.data_free


def test_a_section_that_is_needed_says_what_of_it():
  values = Settings.of(quick("digits", "gmflow")).plain()
  del values["train"], values["optimizer"]["learning_rate"]
  settings = Settings.of(values)
  with pytest.raises(ValueError, match=r"config\.train: steps, batch_size must be set"):
    settings.need("train")
  with pytest.raises(ValueError, match=r"config\.optimizer: learning_rate must be set"):
    settings.need("optimizer")
  with pytest.raises(ValueError, match="no key 'warmup_step'; did you mean 'warmup_steps'"):
    Settings.of(values | {"optimizer": {"warmup_step": 3}})


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != PRETRAINED])
def test_an_objective_knows_its_kind(kind):
  assert kind_of(OBJECTIVES[kind]()) == kind
  assert kind_of(OBJECTIVES[kind](shift=2.5)) == kind
  with pytest.raises(ValueError, match="objective: expected settings such as"):
    kind_of(3)
