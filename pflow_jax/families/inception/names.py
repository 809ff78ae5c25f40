"""Names of Inception's tensors in the files that people have.

* Of pytorch-fid and of torch-fidelity, "6726825d" both: torchvision's names, and a batch norm with a scale.
* Of StyleGAN's program, inception-2015-12-05.pt, and of the state dict of that name with which consistency models are
  measured: the graph's names, and a batch norm without a scale.

The program was not at hand. That its tensors have these names is known from code that reads it
(tools/inception_convert_weights.py of github miemie2013/miemieGAN), and that there are no others from a network that
loads the state dict strictly (evaluations/inception_v3.py of github openai/consistency_models).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from pflow_jax.families.inception.network import CLASSES, WIDTH, kernel_shapes


@dataclasses.dataclass(frozen=True)
class Names:
  """Names of tensors in one kind of file.

  Attributes:
    origin: who writes such files.
    stem: returns the beginning of the names of a convolution's tensors, by its path in the graph.
    kernel: end of the name of a convolution's weights, (O, I, H, W).
    scale: end of the name of its batch norm's scale; None is 1.
    offset: of its batch norm's offset.
    mean: of its batch norm's mean.
    variance: of its batch norm's variance.
    output: name of the last layer's weights, (1008, 2048).
    unused: pattern of further names, of which nothing is needed.
  """

  origin: str
  stem: Callable[[str], str]
  kernel: str
  scale: str | None
  offset: str
  mean: str
  variance: str
  output: str
  unused: str

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors that are needed, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for path, (h, w, i, o) in kernel_shapes()[0].items():
      stem = self.stem(path)
      found[stem + self.kernel] = (o, i, h, w)
      norm = (self.scale, self.offset, self.mean, self.variance)
      found |= {stem + end: (o,) for end in norm if end is not None}
    return found | {self.output: (CLASSES, WIDTH)}


_BLOCKS = {
  **{"mixed": "5b", "mixed_1": "5c", "mixed_2": "5d"},
  **{"mixed_3": "6a", "mixed_4": "6b", "mixed_5": "6c", "mixed_6": "6d", "mixed_7": "6e"},
  **{"mixed_8": "7a", "mixed_9": "7b", "mixed_10": "7c"},
}
_STEMS = {
  **{"conv": "1a_3x3", "conv_1": "2a_3x3", "conv_2": "2b_3x3"},
  **{"conv_3": "3b_1x1", "conv_4": "4a_3x3"},
}
# torchvision's names of the branches: the first convolution alone, and those of the two towers.
_TOWERS = {
  "5": ("branch1x1", "branch5x5_{}", "branch3x3dbl_{}"),
  "6a": ("branch3x3", "branch3x3dbl_{}", ""),
  "6": ("branch1x1", "branch7x7_{}", "branch7x7dbl_{}"),
  "7a": ("", "branch3x3_{}", "branch7x7x3_{}"),
  "7": ("branch1x1", "branch3x3_{}", "branch3x3dbl_{}"),
}
_LAYER = re.compile(r"(?:tower(?P<tower>_[12])?_)?(?P<split>mixed_)?conv(?:_(?P<number>\d))?")


def _of_torchvision(path: str) -> str:
  block, _, name = path.rpartition("/")
  if not block:
    return f"Conv2d_{_STEMS[name]}"
  letter = _BLOCKS[block]
  found = _LAYER.fullmatch(name)
  assert found is not None
  first, tower, tower_1 = _TOWERS.get(letter) or _TOWERS[letter[0]]
  number = int(found["number"] or 0)
  if not name.startswith("tower"):
    branch = first
  elif found["tower"] == "_2":
    branch = "branch_pool"
  else:
    own = tower_1 if found["tower"] else tower
    # The layers after a split are the last of their tower: 2a and 2b, 3a and 3b.
    last = "3" if found["tower"] else "2"
    branch = own.format(f"{last}{'ab'[number]}" if found["split"] else number + 1)
  return f"Mixed_{letter}.{branch}"


def _of_the_graph(path: str) -> str:
  block, _, name = path.rpartition("/")
  if block not in ("", "mixed_9", "mixed_10"):  # these two have all layers side by side, with "_" as here
    name = re.sub(r"^(tower(_\d)?)_", r"\1.", name)
  return ".".join(("layers", *([block] if block else []), name))


NAMES = (
  Names(
    *("pytorch-fid or torch-fidelity", _of_torchvision, ".conv.weight", ".bn.weight", ".bn.bias"),
    *(".bn.running_mean", ".bn.running_var", "fc.weight", r"fc\.bias|.*\.bn\.num_batches_tracked"),
  ),
  Names(
    *("StyleGAN", _of_the_graph, ".weight", None, ".beta"),
    *(".mean", ".var", "output.weight", r"output\.bias"),
  ),
)
