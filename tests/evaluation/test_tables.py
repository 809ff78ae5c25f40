"""Tables in Markdown and HTML."""

import re
import xml.etree.ElementTree as ET

import pytest

from pflow_jax.evaluation.tables import html_table, markdown_table

ROWS = [{"name": "a|b <i>", "fd": (1.234, 0.056)}, {"name": "c", "fd": None, "rate": 12345.6}]


def test_markdown_table_aligns_and_formats():
  rows = [
    {"name": "a|b", "nfe": 128, "ratio": (1.234, 0.056), "rate": 12345.6, "tiny": 2e-7},
    {"name": "c", "nfe": 1, "ratio": None, "rate": 0.12345},
  ]
  table = markdown_table(rows, {"name": "Name", "nfe": "NFE", "ratio": "FD", "rate": "img/s"})
  assert table == (
    "| Name | NFE |          FD |  img/s |\n"
    "| ---- | --: | ----------: | -----: |\n"
    "| a\\|b | 128 | 1.23 ± 0.06 | 12,346 |\n"
    "| c    |   1 |           - |  0.123 |\n"
  )
  assert "| 2.0e-07 |" in markdown_table(rows)
  assert markdown_table(rows, ["nfe"]).startswith("| nfe |")


def test_markdown_table_refuses_no_rows_and_unknown_columns():
  with pytest.raises(ValueError, match="at least one row"):
    markdown_table([])
  with pytest.raises(ValueError, match=r"no row has \['b'\]"):
    markdown_table([{"a": 1}], ["a", "b"])


def test_marked_cells_are_bold_in_both():
  bold = {(0, "fd")}
  table = markdown_table(ROWS, bold=bold)
  assert re.findall(r"\*\*(.*?)\*\*", table) == ["1.23 ± 0.06"]
  assert len({len(line) for line in table.splitlines()}) == 1, "still aligned"
  root = ET.fromstring(html_table(ROWS, bold=bold))
  assert [one.text for one in root.iter("b")] == ["1.23 ± 0.06"]


def test_html_has_the_cells_of_markdown_and_escapes_texts():
  root = ET.fromstring(html_table(ROWS, {"name": "<Name>", "fd": "FD", "rate": "img/s"}))
  cells = [["".join(one.itertext()) for one in row] for row in root.iter("tr")]
  assert cells == [["<Name>", "FD", "img/s"], ["a|b <i>", "1.23 ± 0.06", "-"], ["c", "-", "12,346"]]
  rows = [list(row) for row in root.iter("tr")]
  assert ["style" in one.attrib for one in rows[1]] == [False, True, True], "numbers are on the right"
