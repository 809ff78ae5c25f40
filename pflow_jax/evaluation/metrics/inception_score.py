"""Inception score: how sure a classifier is of single samples, and how unsure of all of them together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from pflow_jax.evaluation.metrics.rows import Rows, Samples


class InceptionScore(NamedTuple):
  """Mean of the scores of parts of a set, and their standard deviation (of the parts, not of the mean)."""

  mean: float
  deviation: float


def inception_score(logits: Samples, splits: int = 10) -> InceptionScore:
  """Inception score, exp E KL(p(class | sample) || p(class)), of parts of the samples in their order.

  Published numbers are of the network of 2015 with its last layer's bias left out, and 50,000 samples in ten parts. The
  order matters: parts of fewer classes score lower.

  Args:
    logits: (N, K), without the bias.
    splits: number of parts, as equal as may be.

  Returns:
    A mean from 1 to K, and the deviation.

  Raises:
    ValueError: there are fewer samples than parts.

  References:
    Salimans et al., arXiv:1606.03498, Sec. 4.
  """
  rows = Rows(logits, "logits")
  count = len(rows)
  if not 1 <= splits <= count:
    raise ValueError(f"splits: expected 1 <= splits <= {count}, the number of samples, got {splits}")
  scores = []
  for split in range(splits):
    start, end = split * count // splits, (split + 1) * count // splits
    total, negative_entropy = np.zeros(rows.dim), 0.0
    for _, block in rows.blocks(start=start, end=end):
      log_p = log_softmax(block.astype(np.float64, copy=False), axis=1)
      p = np.exp(log_p)
      total += p.sum(axis=0)
      negative_entropy += float((p * log_p).sum())
    mean = total / (end - start)
    own = float(np.sum(mean * np.log(np.where(mean > 0, mean, 1.0))))
    scores.append(np.exp(negative_entropy / (end - start) - own))
  return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
