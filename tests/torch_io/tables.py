"""The way back of `to_flax`, in memory: `pflow convert` itself writes a layer at a time."""

import numpy as np
from flax.traverse_util import flatten_dict

from pflow_jax.torch_io.table import rows_for, tensors_of_layer


def to_torch(table, params):
  """Tensors by name of all leaves of nested `params`, adapters too."""
  flat = {"/".join(keys): np.asarray(leaf) for keys, leaf in flatten_dict(params).items()}
  rows = rows_for(table, flat)
  tensors = {}
  for path, leaf in flat.items():
    row = rows[path]
    for index in range(len(leaf)) if row.stacked else [None]:
      pairs = tensors_of_layer(row, leaf if index is None else leaf[index], index)
      tensors |= {name: np.ascontiguousarray(tensor) for name, tensor in pairs}
  return tensors
