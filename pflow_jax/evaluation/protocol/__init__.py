"""Samples of a run measured as papers on ImageNet report them, by ADM's protocol."""

from pflow_jax.evaluation.protocol.evaluate import evaluate_by_protocol as evaluate_by_protocol
from pflow_jax.evaluation.protocol.settings import Protocol as Protocol
