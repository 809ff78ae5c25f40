"""Data sets and the batches drawn from them (NumPy and grain; no JAX)."""

from pflow_jax.data.dataset import Dataset as Dataset
from pflow_jax.data.dataset import Embedding as Embedding
from pflow_jax.data.dataset import augment as augment
from pflow_jax.data.dataset import from_arrays as from_arrays
from pflow_jax.data.dataset import text_length as text_length
from pflow_jax.data.description import Description as Description
from pflow_jax.data.emoji import fetch_emoji as fetch_emoji
from pflow_jax.data.fingerprint import Fingerprint as Fingerprint
from pflow_jax.data.fingerprint import changes as changes
from pflow_jax.data.fingerprint import fingerprint as fingerprint
from pflow_jax.data.latent_shards import write_latents as write_latents
from pflow_jax.data.pipeline import batches as batches
from pflow_jax.data.pipeline import examples as examples
from pflow_jax.data.prompts.buckets import BucketRecords as BucketRecords
from pflow_jax.data.prompts.dataset import pinned as pinned
from pflow_jax.data.prompts.files import read_prompts as read_prompts
from pflow_jax.data.records import ArrayRecords as ArrayRecords
from pflow_jax.data.records import AugmentedRecords as AugmentedRecords
from pflow_jax.data.records import GeneratedRecords as GeneratedRecords
from pflow_jax.data.records import SourceRecords as SourceRecords
from pflow_jax.data.registry import load as load
from pflow_jax.data.registry import register_source as register_source
from pflow_jax.data.registry import sources as sources
