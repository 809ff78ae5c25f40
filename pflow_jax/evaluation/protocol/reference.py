"""The reference of an evaluation: opened once, compared as far as it can be, and its pictures' features kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

from pflow_jax.evaluation.feature_networks import FeatureNetwork
from pflow_jax.evaluation.metrics import SAMPLES_PER_FEATURE
from pflow_jax.evaluation.protocol.scores import NEAREST
from pflow_jax.evaluation.reference_files import read_reference
from pflow_jax.evaluation.references import Reference, load_reference
from pflow_jax.files.foreign import regular_file
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import agreed, is_first


@dataclasses.dataclass(frozen=True)
class Known:
  """A reference as an evaluation has it.

  Attributes:
    digest: of its file and of the feature network.
    num_images: that its moments are of; None where it is not known.
    notes: sentences on what it is not compared by.
    reference: in the first process, which measures; None in the others.
  """

  digest: str
  num_images: int | None
  notes: tuple[str, ...]
  reference: Reference | None


def open_reference(
  path: str | os.PathLike, network: FeatureNetwork, num_samples: int, folder: pathlib.Path, lock: Lock
) -> Known:
  """Opens a reference, for all processes together; features that it takes to make are kept in `folder`.

  Args:
    path: of its file, see `evaluation.references.load_reference`.
    network: that the samples' features are made with.
    num_samples: of the samples.
    folder: of the results.
    lock: of that folder.

  Raises:
    ValueError: it is no reference, of another network, or of too few images.
  """
  name = functools.partial(_described, path, network)
  digest, to_make = agreed(name)
  kept = folder / f"reference_{digest}.npz"
  found: Reference | None = None
  if to_make and not agreed(kept.exists):
    found = load_reference(path, network)
    if is_first():
      with lock.writing():
        dataclasses.replace(found, network=network.name).save(kept)

  def compared() -> tuple[int | None, list[str]]:
    nonlocal found
    found, notes = comparable(found or load_reference(kept if to_make else path, network), network, num_samples)
    return found.num_images, notes

  num_images, notes = agreed(compared)
  return Known(digest, num_images, tuple(notes), found if is_first() else None)


def comparable(reference: Reference, network: FeatureNetwork, num_samples: int) -> tuple[Reference, list[str]]:
  """Returns a reference with what samples can be compared with, and sentences on what they cannot.

  Raises:
    ValueError: it is of fewer images, or has fewer features, than a metric needs.
  """
  fewest, count = SAMPLES_PER_FEATURE * network.num_features, reference.num_images
  if count is not None and count < fewest:
    raise ValueError(
      f"reference: a Fréchet distance in {network.num_features} features needs at least {fewest} images, this one is "
      f"of {count}; make it of more"
    )
  if reference.features is not None and len(reference.features) <= NEAREST:
    raise ValueError(
      f"reference: precision and recall need more than {NEAREST} features, got {len(reference.features)}; "
      "make it again with `pflow reference --keep=10000`"
    )
  notes = []
  if problem := _without_spatial(reference, network, num_samples):
    reference = dataclasses.replace(reference, spatial=None)
    notes.append(f"no sFID: {problem}")
  if reference.features is None:
    notes.append("no KID, precision, recall, density and coverage: the reference has moments alone")
  return reference, notes


def _without_spatial(reference: Reference, network: FeatureNetwork, num_samples: int) -> str:
  """Returns the reason why spatial features cannot be compared; "" where they can."""
  spatial, width = reference.spatial, network.num_spatial
  if spatial is None:
    return "the reference has no moments of spatial features"
  if not width:
    return "the feature network has no spatial features"
  if len(spatial.mean) != width:
    return f"the reference has {len(spatial.mean)} spatial features, the feature network {width}"
  counts = {"samples": num_samples, "images of the reference": spatial.count}
  fewest = SAMPLES_PER_FEATURE * width
  few = [f"{n} {what}" for what, n in counts.items() if n is not None and n < fewest]
  return f"{width} spatial features need {fewest} of each, there are {' and '.join(few)}" if few else ""


def _described(path: str | os.PathLike, network: FeatureNetwork) -> tuple[str, bool]:
  """Returns a digest of a reference's file and of the network, and whether features of its images are to be made."""
  with regular_file(path).open("rb") as file:
    digest: Any = hashlib.file_digest(file, "sha256")
  digest.update(network.name.encode())
  return digest.hexdigest()[:16], read_reference(path, "fid").lacks_features
