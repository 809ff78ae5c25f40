"""Metrics of features that lie in parts, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pflow_jax.evaluation import metrics
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.settings import OF_A_CLASS, Protocol
from pflow_jax.evaluation.references import Reference
from pflow_jax.evaluation.tables import markdown_table
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS

GROUPS = 20  # of samples, of which each is left out once for the interval of the Fréchet distance
SPLITS = 10  # of the Inception score
SUBSET = 1000  # samples of a kernel distance
NEAREST = 3

COLUMNS = {
  "nfe": "NFE",
  "fid": "FID",
  "fid_interval": "FID at infinitely many samples",
  "sfid": "sFID",
  "inception_score": "IS",
  "kid": "KID x 1000",
  "precision": "precision",
  "recall": "recall",
  "density": "density",
  "coverage": "coverage",
  "alignment": "alignment error",
  "alignment_ratio": "alignment / teacher-4",
  "diversity_ratio": "diversity / teacher-128",
  "images_per_second": "samples/s",
}


def check_counts(protocol: Protocol, reference: Reference, num_features: int) -> None:
  """Raises ValueError for fewer samples than a metric needs, before any is drawn."""
  count, fewest = protocol.num_samples, metrics.SAMPLES_PER_FEATURE * num_features
  if count < fewest:
    raise ValueError(f"num: a Fréchet distance in {num_features} features needs at least {fewest} samples, got {count}")
  if reference.features is not None and len(reference.features) <= NEAREST:
    raise ValueError(
      f"reference: precision and recall need more than {NEAREST} features, got {len(reference.features)}; "
      "make it again with `pflow reference --keep=10000`"
    )


def measured(parts: Parts, reference: Reference) -> dict[str, Any]:
  """Returns the metrics of features in parts: pool, perhaps spatial and logits.

  Features stay in their files. What the reference has nothing for is left out.
  """
  pool = parts.rows("pool")
  groups, spatial = sums_of_groups(pool, GROUPS), reference.spatial
  # Without one of its groups a distance still needs samples enough.
  least = parts.count - max(group.count for group in groups)
  row: dict[str, Any] = {}
  if least >= metrics.SAMPLES_PER_FEATURE * pool.shape[1]:
    found = metrics.frechet_interval(groups, reference.pool)
    row["fid"] = (found.value, found.standard_error)
    row["fid_unbiased"], row["fid_interval"] = found.unbiased, f"{found.low:.3g} to {found.high:.3g}"
  else:
    row["fid"] = metrics.frechet_distance(merged(groups), reference.pool)
  del groups
  if spatial is not None and parts.has("spatial"):
    row["sfid"] = metrics.frechet_distance(merged(sums_of_groups(parts.rows("spatial"), 1)), spatial)
  if parts.has("logits"):
    row["inception_score"] = tuple(metrics.inception_score(parts.rows("logits"), min(SPLITS, parts.count)))
  if reference.features is not None:
    size = min(SUBSET, parts.count, len(reference.features))
    mean, deviation = metrics.kernel_distance(reference.features, pool, subset_size=size)
    row["kid"] = (1000 * mean, 1000 * deviation)
    row |= metrics.prdc(reference.features, pool, NEAREST)._asdict()
  return row


def paired_measures(parts: Parts, nfe: int) -> dict[str, Any]:
  """Returns alignment and diversity of a student's samples, beside those of its teacher."""
  names = (f"student_{nfe}", f"teacher_{REFERENCE_STEPS}", f"teacher_{YARDSTICK_STEPS}")
  x, best, yardstick = (parts.rows(name)[0 : parts.count] for name in names)
  errors = metrics.alignment_errors(x, best)
  ratio = metrics.ratio_of_means(errors, metrics.alignment_errors(yardstick, best))
  row: dict[str, Any] = {"alignment": ratio.value, "alignment_ratio": (ratio.ratio, ratio.standard_error)}
  labels = np.arange(parts.count) // OF_A_CLASS
  if parts.count > 1:
    row["diversity_ratio"] = metrics.diversity(x, labels) / metrics.diversity(best, labels)
  return row


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows as a table in Markdown."""
  return markdown_table(rows, {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)})


def as_markdown(report: Mapping[str, Any], protocol: Protocol) -> str:
  """Returns the text of adm.md: the table, and how it was made."""
  rows = report["rows"]
  told = [
    f"{protocol.num_samples:,} samples of {protocol.labels} classes, seed {protocol.seed}",
    f"features of {report['network']}",
    f"reference {report['reference']}"
    + (f", of {report['reference_images']:,} images" if report["reference_images"] else ""),
    f"precision and recall with k = {NEAREST}",
  ]
  if any("alignment" in row for row in rows):
    told.append(
      f"alignment and diversity on {protocol.num_paired:,} samples more, {OF_A_CLASS} of a class, beside the teacher's "
      f"{REFERENCE_STEPS} Euler steps from the same noise"
    )
  return f"# {report['workdir']}\n\n{table(rows)}\n{'; '.join(told)}.\n"


def sums_of_groups(features: metrics.Joined, groups: int) -> list[metrics.MomentSums]:
  """Returns sums of groups of the rows, of which each has every n-th."""
  sums = [metrics.MomentSums(math.prod(features.shape[1:])) for _ in range(groups)]
  size = groups * 512  # a product of matrices, of which each group has enough rows to be fast
  for start in range(0, features.shape[0], size):
    block = features[start : start + size]
    for group in range(min(groups, len(block))):
      sums[group].update(block[group::groups])
  return [one for one in sums if one.count]


def merged(groups: list[metrics.MomentSums]) -> metrics.Moments:
  """Returns the moments of the samples of all groups."""
  every = metrics.MomentSums(len(groups[0].mean))
  for group in groups:
    every.merge(group)
  return every.moments()
