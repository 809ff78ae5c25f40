"""Files of prompts: what is read, what is left out, and errors that name the line."""

import json
import os

import pytest

from pflow_jax import data


def write(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def test_lines(tmp_path):
  path = write(tmp_path, "p.txt", '\ufeffa cat\r\n\n  ein Füßchen \na cat\n猫, "q"\n\t\nA cat')
  found = data.read_prompts(path)
  assert found.texts == ["a cat", "ein Füßchen", '猫, "q"', "A cat"]
  assert (found.blank, found.repeated, found.paths) == (2, 1, [])
  assert found.where[1] == f"{path}, line 3"


def test_json_lines(tmp_path):
  rows = [{"text": "a cat", "id": 1}, {"prompt": "a\ndog", "text": "no"}, {"caption": ""}, {"caption": "a cat"}]
  path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
  found = data.read_prompts(path)
  assert (found.texts, found.blank, found.repeated) == (["a cat", "a\ndog"], 2, 1)
  path = write(tmp_path, "q.jsonl", json.dumps({"prompt": "no", "long": "a red cat"}))
  assert data.read_prompts(path, field="long").texts == ["a red cat"]


def test_tables(tmp_path):
  path = write(tmp_path, "p.csv", '\ufeffid,caption\n1,"a cat, red\nand blue"\n2,a dog\n\n3,\n')
  found = data.read_prompts(path)
  assert found.texts == ["a cat, red\nand blue", "a dog"]
  assert found.blank == 1
  assert found.where[1] == f"{path}, line 4"
  assert data.read_prompts(path, field="id").texts == ["1", "2", "3"]


def test_a_file_beside_each(tmp_path):
  rows = [("a cat", "x/1.npy"), ("a cat", "x/2.npy"), ("a cat", "x/1.npy"), ("a dog", "/y/3.npy")]
  path = write(tmp_path, "p.csv", "\n".join(["prompt,latents", *(f"{a},{b}" for a, b in rows)]))
  found = data.read_prompts(path, file_field="latents")
  assert found.texts == ["a cat", "a cat", "a dog"]
  assert list(map(str, found.paths)) == [f"{tmp_path}/x/1.npy", f"{tmp_path}/x/2.npy", "/y/3.npy"]
  assert found.repeated == 1
  assert data.read_prompts(path).texts == ["a cat", "a dog"]


@pytest.mark.parametrize(
  ("name", "content", "options", "message"),
  [
    ("p.txt", b"a cat\n\xff\xfe\n", {}, "p.txt, line 2: expected UTF-8, got invalid start byte at byte 0"),
    ("p.txt", "\n \n", {}, "there are no prompts \\(2 blank lines\\)"),
    ("p.txt", "a", {"field": "prompt"}, "a line of a .txt is a prompt and has no field 'prompt'"),
    ("p.md", "a", {}, "ends with .txt, .jsonl, .csv"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', {}, "line 2: expected JSON, got '{\"prompt\":'"),
    ("p.jsonl", '["a"]', {}, "line 1: expected an object"),
    (
      "p.jsonl",
      '{"prompts": "a"}',
      {},
      "line 1: expected the field one of 'prompt', 'text', 'caption', got \\['prompts'",
    ),
    ("p.jsonl", '{"prompt": "a"}', {"field": "long"}, "line 1: expected the field 'long', got \\['prompt'\\]"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}', {}, "line 3: expected text in 'prompt', got 3"),
    ("p.jsonl", r'{"prompt": "a \ud83d"}', {}, "line 1: the prompt has half of a surrogate pair"),
    ("p.jsonl", '{"prompt": "a"}', {"file_field": "image"}, "line 1: expected the name of a file in 'image', got None"),
    ("p.csv", b"prompt\na\n\xff\n", {}, "line 3: expected UTF-8"),
    ("p.csv", 'prompt\n"a', {}, "line 2: expected comma-separated values"),
    ("p.csv", "id,prompt\n1,a\n2\n", {}, "line 3: expected text in 'prompt', got None"),
    ("p.csv", "id,title\n1,a\n", {}, "choose with --field"),
  ],
)
def test_errors_name_the_line(tmp_path, name, content, options, message):
  path = write(tmp_path, name, content)
  with pytest.raises(ValueError, match=message):
    data.read_prompts(path, **options)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_bytes_that_are_no_lines_of_text_are_refused_soon(tmp_path, name):
  for content, message in (
    ("a cat".encode("utf-16"), "line 1: expected UTF-8"),
    ("a cat".encode("utf-16-le"), "line 1: expected text, got a byte of 0; is it UTF-16"),
    (b"x" * (2**20 + 1), "line 1: expected at most 1,048,576 bytes; is this a file of prompts"),
    (b"\n" * 9 + b"x" * 2**21, "line 10: expected at most 1,048,576 bytes"),
  ):
    with pytest.raises(ValueError, match=message):
      data.read_prompts(write(tmp_path, name, content))
  with (tmp_path / name).open("wb") as stream:
    stream.truncate(2**40)
  with pytest.raises(ValueError, match="its prompts: takes 2 TiB of memory"):
    data.read_prompts(str(tmp_path / name))


def test_messages_do_not_show_the_whole_of_what_they_got(tmp_path):
  columns = write(tmp_path, "p.csv", ",".join(f"column {i}" for i in range(9999)) + "\n1\n")
  nested = write(tmp_path, "p.jsonl", json.dumps({"prompt": [["x" * 9999] * 99]}))
  for path in (columns, nested, write(tmp_path, "q.jsonl", "[" * 99_999), write(tmp_path, "r.jsonl", "1" * 9999)):
    with pytest.raises(ValueError, match="line [12]: expected") as caught:
      data.read_prompts(path)
    assert len(str(caught.value)) < 600


def test_columns_that_are_not_looked_at_cost_nothing_in_a_row(tmp_path):
  header = ",".join(["prompt", *(f"column {i}" for i in range(40_000))])
  rows = [f"prompt {i}" for i in range(3000)]  # short ones, which would have a value for every column
  assert data.read_prompts(write(tmp_path, "p.csv", "\n".join([header, *rows]))).texts == rows


def test_what_is_no_file_is_not_opened(tmp_path):
  for suffix in (".txt", ".jsonl", ".csv"):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, message in {"pipe": "pipe", "loop": "links", "zero": "device", "folder": "folder"}.items():
      with pytest.raises(ValueError, match=message):
        data.read_prompts(f"{tmp_path}/{name}{suffix}")
  for name in ("p.txt", "no\0.txt", "~nobody-of-this-name/p.txt"):
    with pytest.raises(ValueError, match="there is no such file|embedded null"):
      data.read_prompts(str(tmp_path / name) if name[0] != "~" else name)


def test_the_ending_may_be_in_capitals(tmp_path):
  assert data.read_prompts(write(tmp_path, "P.TXT", "a cat")).texts == ["a cat"]
