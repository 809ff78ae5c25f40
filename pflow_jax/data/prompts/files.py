"""Prompts in files: a line each, JSON lines, or a column of a table."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from pflow_jax.files.foreign import check_memory, regular_file, shown

FIELDS = ("prompt", "text", "caption")
MAX_LINE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts without blank and repeated ones, in the order of the file.

  Attributes:
    texts: n prompts.
    paths: the file beside each, or empty.
    where: place of each, for messages: "prompts.txt, line 3".
    blank: number of blank prompts left out.
    repeated: number of repeated ones left out.
  """

  texts: list[str]
  paths: list[pathlib.Path]
  where: list[str]
  blank: int = 0
  repeated: int = 0


def read_prompts(path: str, field: str | None = None, file_field: str | None = None) -> Prompts:
  """The prompts of a .txt, .jsonl or .csv file in UTF-8, without the white space around them.

  Args:
    path: of the file.
    field: field of a JSON line, or column of the table, with the prompt; by default the first of `FIELDS` found.
    file_field: field or column that names a file beside each prompt, relative to the folder of `path`. A prompt then
      counts as repeated only where its file is repeated too.

  Raises:
    ValueError: for a file without prompts, or one that cannot be read; the message names the line.
  """
  file = pathlib.Path(os.path.expanduser(path))
  readers, suffix = {".txt": _lines, ".jsonl": _json_lines, ".csv": _table}, file.suffix.lower()
  if suffix not in readers:
    raise ValueError(f"{path}: expected a file of prompts that ends with {', '.join(readers)}.")
  size = regular_file(file).stat().st_size
  check_memory(f"{path}: its prompts", 2 * size, "give them in several files")
  if suffix == ".txt" and (field or file_field):
    raise ValueError(f"{path}: a line of a .txt is a prompt and has no field {field or file_field!r}; give a .jsonl.")
  texts, paths, where, seen, blank, repeated = [], [], [], set(), 0, 0
  for line, text, beside in readers[suffix](file, field, file_field):
    text, place = text.strip(), f"{path}, line {line}"
    if not text:
      blank += 1
      continue
    if (text, beside) in seen:
      repeated += 1
      continue
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"{place}: the prompt has half of a surrogate pair, which is no character.") from error
    seen.add((text, beside))
    texts.append(text)
    where.append(place)
    if beside is not None:
      paths.append(file.parent / beside)
  if not texts:
    raise ValueError(f"{path}: there are no prompts ({blank} blank lines).")
  return Prompts(texts, paths, where, blank, repeated)


_Line = tuple[int, str, str | None]  # number of the line, prompt, file beside it


def _text_lines(file: pathlib.Path) -> Iterator[str]:
  number = 0
  with file.open("rb") as lines:
    while line := lines.readline(MAX_LINE + 1):
      number += 1
      place = f"{file}, line {number}"
      if len(line) > MAX_LINE:
        raise ValueError(f"{place}: expected at most {MAX_LINE:,} bytes; is this a file of prompts?")
      try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(f"{place}: expected UTF-8, got {error.reason} at byte {error.start}; save it so.") from error
      if "\0" in text:
        raise ValueError(f"{place}: expected text, got a byte of 0; is it UTF-16? Save it as UTF-8.")
      yield text


def _lines(file: pathlib.Path, field: str | None, file_field: str | None) -> Iterator[_Line]:
  del field, file_field
  for number, line in enumerate(_text_lines(file), 1):
    yield number, line, None


def _json_lines(file: pathlib.Path, field: str | None, file_field: str | None) -> Iterator[_Line]:
  for number, line in enumerate(_text_lines(file), 1):
    if not line.strip():
      yield number, "", None
      continue
    try:
      values = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{file}, line {number}: expected JSON, got {shown(line.strip())} ({error}).") from error
    if not isinstance(values, dict):
      raise ValueError(f'{file}, line {number}: expected an object such as {{"prompt": ...}}, got {shown(values)}.')
    yield _row(f"{file}, line {number}", number, values, field, file_field)


def _table(file: pathlib.Path, field: str | None, file_field: str | None) -> Iterator[_Line]:
  reader, line = csv.reader(_text_lines(file), strict=True), 0
  try:
    columns = {name: i for i, name in enumerate(next(reader, []))}
    # Rows are read with the columns that are needed. If none fits, all are read, for the message.
    fitting = [name for name in ((field,) if field else FIELDS) if name in columns]
    columns = {name: columns[name] for name in (*fitting, file_field) if name in columns} if fitting else columns
    line = reader.line_num
    for row in reader:
      line = reader.line_num
      if row:
        values = {name: row[i] if i < len(row) else None for name, i in columns.items()}
        yield _row(f"{file}, line {line}", line, values, field, file_field)
  except csv.Error as error:
    # The line is the one on which the unreadable row begins.
    raise ValueError(f"{file}, line {line + 1}: expected comma-separated values, got {error}.") from error


def _row(place: str, number: int, values: dict, field: str | None, file_field: str | None) -> _Line:
  found = [name for name in ((field,) if field else FIELDS) if name in values]
  if not found:
    expected = repr(field) if field else "one of " + ", ".join(map(repr, FIELDS))
    got = shown(sorted(map(str, values)), 200)
    raise ValueError(f"{place}: expected the field {expected}, got {got}; choose with --field.")
  text, beside = values[found[0]], None
  if not isinstance(text, str):
    raise ValueError(f"{place}: expected text in {found[0]!r}, got {shown(text)}.")
  if file_field:
    beside = values.get(file_field)
    if not isinstance(beside, str) or not beside:
      raise ValueError(f"{place}: expected the name of a file in {file_field!r}, got {shown(beside)}.")
  return number, text, beside
