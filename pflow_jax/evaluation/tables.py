"""Tables of numbers, in Markdown and in HTML: the same cells, the same marks."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
Columns = Sequence[str] | Mapping[str, str] | None
Marks = Collection[tuple[int, str]]


def markdown_table(rows: Rows, columns: Columns = None, bold: Marks = ()) -> str:
  """Writes a Markdown table that is also aligned as plain text, ending with a newline.

  Args:
    rows: one dict a row. Floats get about three digits, a pair (value, error) becomes
      "value ± error", None or an absent key "-".
    columns: keys in order, or key -> heading; by default all keys in order of appearance.
    bold: (row, key) of the cells that are set in bold.

  Raises:
    ValueError: there are no rows, or no row has a column.
  """
  aligned = []
  for key, title in _titles(rows, columns).items():
    values = [row.get(key) for row in rows]
    cells = [cell(value).replace("|", "\\|") for value in values]
    cells = [title, *(f"**{text}**" if (i, key) in bold else text for i, text in enumerate(cells))]
    width = max(3, *map(len, cells))
    if _is_text(values):
      aligned.append([cells[0].ljust(width), "-" * width, *(c.ljust(width) for c in cells[1:])])
    else:
      aligned.append([cells[0].rjust(width), "-" * (width - 1) + ":", *(c.rjust(width) for c in cells[1:])])
  return "".join(f"| {' | '.join(line)} |\n" for line in zip(*aligned, strict=True))


def html_table(rows: Rows, columns: Columns = None, bold: Marks = ()) -> str:
  """Writes the table that `markdown_table` writes as an HTML element; texts are escaped, numbers are on the right."""
  titles = _titles(rows, columns)
  right = {key: "" if _is_text([row.get(key) for row in rows]) else ' style="text-align:right"' for key in titles}

  def data(i: int, key: str) -> str:
    text = html.escape(cell(rows[i].get(key)))
    return f"<td{right[key]}>{f'<b>{text}</b>' if (i, key) in bold else text}</td>"

  head = "".join(f"<th{right[key]}>{html.escape(title)}</th>" for key, title in titles.items())
  body = "\n".join(f"<tr>{''.join(data(i, key) for key in titles)}</tr>" for i in range(len(rows)))
  return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


def _titles(rows: Rows, columns: Columns) -> dict[str, str]:
  """Returns key -> heading of a table's columns, which some row must have."""
  if not rows:
    raise ValueError("rows: expected at least one row, got none")
  if columns is None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
  titles = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
  unknown = [key for key in titles if not any(key in row for row in rows)]
  if unknown:
    raise ValueError(f"columns: no row has {unknown}; rows have {list(dict.fromkeys(k for r in rows for k in r))}")
  return titles


def _is_text(values: Sequence[Any]) -> bool:
  """Says whether a column is on the left."""
  return all(isinstance(value, (str, type(None))) for value in values)


def cell(value: Any) -> str:
  """Writes one value as tables show it."""
  if value is None:
    return "-"
  if isinstance(value, tuple) and len(value) == 2:
    decimals = _decimals(value[0])
    return f"{value[0]:,.{decimals}f} ± {value[1]:,.{decimals}f}"
  if isinstance(value, (float, np.floating)):
    number = float(value)
    tiny = 0 < abs(number) < 1e-3
    return f"{number:.1e}" if tiny else f"{number:,.{_decimals(number)}f}"
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    return f"{value:,}"
  return str(value)


def _decimals(value: float) -> int:
  """Decimals for about three significant digits: 0.123, 1.23, 12.3, 123."""
  size = abs(value)
  return 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
