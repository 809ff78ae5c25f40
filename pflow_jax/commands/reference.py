"""The command `pflow reference`: a function whose arguments are the flags. Slow imports wait until they are needed."""

from __future__ import annotations

import os
import pathlib
from typing import Annotated

from pflow_jax.commands.command import options
from pflow_jax.commands.flags import Count, Repeated


def reference(
  images: str,
  features: str,
  out: str,
  size: Count | None = None,
  keep: Annotated[int, 0, None] = 0,
  width: Count = 2048,
  split: str = "train",
  option: Repeated = [],  # noqa: B006
) -> None:
  """Makes a reference of pictures, which samples are compared with.

  Args:
    images: a folder of pictures, or a data set of them by its name, tfds:imagenet2012, say
    features: file of the feature network, such as StyleGAN's inception-2015-12-05.pt
    out: file for the reference, a .npz
    size: side of the pictures in pixels, to which a folder's and those of tfds are cut and scaled
    keep: pictures whose features are kept, for precision and recall; ADM's protocol has 10000
    width: of the features, 64, 192, 768 or 2048; papers have 2048, and a distance needs twice as many pictures
    split: of the data set
    option: key=value of the data set, held_out=500, say; may be repeated
  """
  from pflow_jax import data
  from pflow_jax.evaluation.references import make_reference
  from pflow_jax.files.folders import checked_file

  given = options(option) | ({} if size is None else {"image_size": size})
  if not given.keys().isdisjoint(("name", "split")):
    raise ValueError("option: name and split have flags of their own, --images and --split")
  path = checked_file(out)
  if not path.endswith(".npz"):
    raise ValueError(f"out: expected a file that ends with .npz, got {out}")
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise ValueError(f"out: there is no folder for {out}")
  is_folder = images not in data.sources() and os.path.isdir(os.path.expanduser(images))
  name = f"folder:{images}" if is_folder else images
  made = make_reference(data.load(name, split=split, **given), features, width=width, keep=keep)
  made.save(path)
  kept = f" and features of {keep:,}" if keep else ""
  print(f"wrote {path}: moments of {made.num_images:,} pictures{kept}, {made.network}")
