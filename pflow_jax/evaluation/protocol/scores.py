"""Metrics of features that lie in parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pflow_jax.evaluation import metrics
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.settings import OF_A_CLASS
from pflow_jax.evaluation.references import Reference
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS

GROUPS = 20  # of samples, of which each is left out once for the interval of the Fréchet distance
SPLITS = 10  # of the Inception score
SUBSET = 1000  # samples of a kernel distance
NEAREST = 3


def check_count(num_samples: int, num_features: int) -> None:
  """Raises ValueError for fewer samples than a Fréchet distance needs."""
  fewest = metrics.SAMPLES_PER_FEATURE * num_features
  if num_samples < fewest:
    raise ValueError(
      f"num: a Fréchet distance in {num_features} features needs at least {fewest} samples, got {num_samples}"
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


def paired_measures(student: Parts, teacher: Parts) -> dict[str, Any]:
  """Returns alignment and diversity of a student's samples, beside those of its teacher."""
  x, best, yardstick = (
    parts.rows(name)[0 : parts.count]
    for parts, name in ((student, "x"), (teacher, str(REFERENCE_STEPS)), (teacher, str(YARDSTICK_STEPS)))
  )
  errors = metrics.alignment_errors(x, best)
  ratio = metrics.ratio_of_means(errors, metrics.alignment_errors(yardstick, best))
  labels = np.arange(student.count) // OF_A_CLASS
  return {
    "alignment": ratio.value,
    "alignment_ratio": (ratio.ratio, ratio.standard_error),
    "diversity_ratio": metrics.diversity(x, labels) / metrics.diversity(best, labels),
  }


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
