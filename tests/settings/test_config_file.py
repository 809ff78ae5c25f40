"""Config files are programs: whatever one does, what comes back is a config or a sentence with the line."""

import os

import pytest
from ml_collections import ConfigDict

from pflow_jax.settings.config_file import read_config_file, shipped

HEAD = "from ml_collections import ConfigDict, FrozenConfigDict\n"


def write(folder, text):
  path = folder / "config.py"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_a_variant_reaches_get_config(tmp_path):
  path = write(tmp_path, f"{HEAD}def get_config(name='a'):\n  return ConfigDict({{'name': name}})\n")
  assert read_config_file(str(path)).name == "a"
  assert read_config_file(f"{path}:b:c").name == "b:c"


def test_a_frozen_config_can_be_changed(tmp_path):
  path = write(tmp_path, f"{HEAD}def get_config():\n  return FrozenConfigDict({{'a': 1}})\n")
  config = read_config_file(str(path))
  config.a = 2
  assert type(config) is ConfigDict


def test_a_name_is_a_file_that_comes_with_the_package():
  assert {"digits", "flux", "compare/digits"} <= set(shipped())
  assert read_config_file("digits:gmflow").head.kind == "gmflow"
  with pytest.raises(ValueError, match="'digitss': expected a Python file, .* or one of checkerboard, compare/"):
    read_config_file("digitss:gmflow")


def test_a_file_from_before_the_rooms_is_understood_or_told_what_to_change(tmp_path, caplog):
  path = write(tmp_path, f"{HEAD}def get_config():\n  return ConfigDict({{'policy': {{'kind': 'dx'}}}})\n")
  assert read_config_file(str(path)).head.kind == "dx"
  assert "config.policy is called config.head now" in caplog.text
  path = write(tmp_path, "from pflow_jax.defaults import default_config\n")
  with pytest.raises(ValueError, match=r"line 1: .*default_config is in pflow_jax\.settings\.defaults now"):
    read_config_file(str(path))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\nimport numpyy\n", "line 2: ModuleNotFoundError: No module named 'numpyy'"),
    ("def get_config():\n  return foo\n", "line 2: NameError: name 'foo' is not defined"),
    ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
    (
      "def get_config():\n\n  raise ValueError('variant: expected\\n one of a')\n",
      "line 3: variant: expected one of a$",
    ),
    ("def get_config():\n  1 / 0\n", "line 2: ZeroDivisionError"),
    ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
    ("def get_config():\n  raise KeyError('a')\n", "line 2: KeyError: a"),
    ("def get_config():\n  return get_config()\n", "line 2: RecursionError"),
    (f"{HEAD}def get_config():\n  c = ConfigDict(); c.lock(); c.a = 1\n", "line 3: AttributeError: .*a"),
    ("def get_config(a, b):\n  return 1\n", "TypeError: .*missing 2 required"),
    ("get_config = 3\n", "expected a function get_config"),
    ("", "expected a function get_config"),
    ("def get_config():\n  return {'a': 1}\n", "expected a ConfigDict from get_config, got {'a': 1}"),
    ("def get_config():\n  pass\n", "expected a ConfigDict from get_config, got None"),
    (b"\xff\xfe\x00x\n", "Error: "),
    (b"x = 1\0\n", "null bytes"),
    (b"x = 'caf\xe9'\n", "SyntaxError: .*utf-8"),
  ],
)
def test_a_file_that_fails_is_told_by_its_line(text, message, tmp_path):
  path = write(tmp_path, text)
  with pytest.raises(ValueError, match=message) as caught:
    read_config_file(f"{path}")
  assert str(caught.value).startswith(str(path))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "text", "nothing", "NUL"])
def test_what_is_no_python_file_is_not_opened(kind, tmp_path):
  path = tmp_path / "config.py"
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  elif kind == "text":
    path = tmp_path / "config.json"
    path.write_text("{}")
  given = {"nothing": "", "NUL": "a\0b.py"}.get(kind, str(path))
  with pytest.raises(ValueError, match="expected a Python file, and perhaps a variant"):
    read_config_file(given)
