"""One look for all figures: a method has its colour and marker in every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INK, MUTED, PALE, GRID = "#1f2328", "#6e7781", "#c9ced3", "#e3e6e9"
# The first six are Okabe and Ito's, https://jfly.uni-koeln.de/color. The others were searched for at the largest
# distance from those, from INK and from one another in CIELAB, as seen with protanopia and with deuteranopia.
COLOURS = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
  *("#AFC566", "#2B23A2", "#E4274B", "#684313", "#B77CFF", "#502863"),
)
MARKERS = "osDvP^Xh*<p>"
# Colour of each method, by its name in configs and its title in tables.
METHODS = (
  *(("gmflow", "π-Flow, GMFlow", 0), ("dx", "π-Flow, DX", 1)),
  *(("arc", "ArcFlow", 2), ("arc", "ArcFlow, all weights", 2), ("arc_adapters", "ArcFlow, adapters", 6)),
  *(("ayf_emd", "AYF-EMD", 4), ("ayf_emd_autoguided", "AYF-EMD + autoguidance", 9)),
  *(("ayf_emd_adversarial", "AYF-EMD + adversarial", 8), ("ayf_lmd", "AYF-LMD", 5)),
  *(("mean_flow", "MeanFlow", 3), ("consistency", "consistency", 10)),
  # From 12 on a colour is taken again, with a hollow marker.
  *(("free_flow", "FreeFlow", 7), ("decoupled_mean_flow", "DMF", 11), ("improved_mean_flow", "iMF", 15)),
  *(("gmflow_adversarial", "π-Flow, GMFlow + adversarial", 12), ("gmflow_from_map", "π-Flow, GMFlow from AYF-EMD", 16)),
  ("gmflow_twice", "π-Flow, GMFlow, twice the training", 14),
)
_KNOWN = {label: place for name, title, place in METHODS for label in (name, title)}


def places(labels: Sequence[str]) -> dict[str, int]:
  """Finds each label's place in COLOURS: that of a known method, else the next that no label here has."""
  found = {label: _KNOWN[label] for label in labels if label in _KNOWN}
  order = [i for i in range(len(COLOURS)) if i not in found.values()] or list(range(len(COLOURS)))
  others = [label for label in dict.fromkeys(labels) if label not in found]
  return found | {label: order[i % len(order)] + i // len(order) * len(COLOURS) for i, label in enumerate(others)}


def styles(labels: Sequence[str], references: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
  """Returns the options of each label's line; a colour that is taken again has a hollow marker.

  Args:
    labels: of the lines.
    references: those of `labels` that are drawn in black dashes.
  """
  looks = {}
  for label, place in places([label for label in labels if label not in references]).items():
    again, i = divmod(place, len(COLOURS))
    colour, marker = COLOURS[i], MARKERS[(i + again) % len(MARKERS)]
    fill: dict[str, Any] = dict(mfc="white", mec=colour, mew=1.2) if again else dict(mec="white", mew=0.6)
    looks[label] = dict(marker=marker, ms=7.5 if marker in "P*X" else 5.0, color=colour, **fill)
  reference = dict(color=INK, ls="--", marker="o", ms=4.5, mfc="white")
  return {label: reference if label in references else looks[label] for label in labels}
