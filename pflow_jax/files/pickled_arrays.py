"""Pickles of NumPy's arrays among plain values, read without running what a pickle may ask to run."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import numpy as np

from pflow_jax.files.foreign import check_memory, decoding, read_bytes, shown
from pflow_jax.files.inert import Made, Named, read_inert

MAX_PICKLE = 4 * 2**30  # bytes; the features of 50,000 images are a tenth of that
MAX_OPERATIONS = 2**22  # of a pickle, of which each may make a value; one of arrays has a hundred

_DTYPE = re.compile(r"[<>|=]?[biuf]\d{1,2}")
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict", "torch_utils.misc.EasyDict")
_BYTES = ("builtins.bytes", "__builtin__.bytes")  # protocol 2 has no bytes, and calls for none
# NumPy's modules have other names from version 2 on, and files keep those of the version that wrote them.
_NUMPY = re.compile(r"numpy\.(?:_?core\.)?(?:multiarray\.|numeric\.)?(?P<name>\w+)")


def read_pickled(path: str | os.PathLike) -> Any:
  """Reads a pickle of dicts, lists, tuples, text, bytes, numbers, None and arrays of numbers.

  Args:
    path: of the file.

  Returns:
    the value; arrays are NumPy's and cannot be written to, and of NumPy's numbers 0-dimensional ones.

  Raises:
    ValueError: the pickle has anything else, is damaged, has more than MAX_OPERATIONS, or is larger than MAX_PICKLE or
      a third of the memory.
  """
  check_memory(f"{path}", 3 * os.stat(path).st_size if os.path.isfile(path) else 0)
  data = read_bytes(path, MAX_PICKLE)
  with decoding(f"{path} cannot be read as a pickle of arrays"):
    value, _ = read_inert(data, _make, limit=MAX_OPERATIONS)
    return _plain(value, {})


def _make(name: str, arguments: tuple[Any, ...]) -> Any:
  """Returns what stands for an object: an array or a dtype of NumPy, an empty dict, or bytes of protocol 2."""
  if name in _DICTS and not arguments:
    return {}
  if name in _BYTES and not arguments:
    return b""
  if name == "_codecs.encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
    return arguments[0].encode("latin1")
  if (found := _NUMPY.fullmatch(name)) and found["name"] in ("_reconstruct", "scalar", "dtype", "_frombuffer"):
    return Made(found["name"], arguments=arguments)
  raise ValueError(f"it holds more than arrays, a call of {shown(name).strip(chr(39))}, and was not loaded")


def _plain(value: Any, known: dict[int, Any]) -> Any:
  """Returns a value with arrays in place of what stands for them; `known` has those that were met, by identity."""
  if isinstance(value, Named):
    raise ValueError(f"expected arrays and plain values, got {shown(value.name)}")
  if not isinstance(value, (Made, dict, list, tuple)):
    return value
  if id(value) not in known:
    if isinstance(value, Made):
      known[id(value)] = _array(value)
    elif isinstance(value, dict):
      made: dict[Any, Any] = {}
      known[id(value)] = made
      made.update((key, _plain(inner, known)) for key, inner in value.items())
    else:
      listed: list[Any] = []
      known[id(value)] = listed
      listed += [_plain(inner, known) for inner in value]
      known[id(value)] = listed if isinstance(value, list) else tuple(listed)
  return known[id(value)]


def _array(made: Made) -> np.ndarray:
  """Returns the array of what NumPy's pickles call: values are the bytes that the pickle has."""
  if made.name == "_reconstruct" and isinstance(made.state, tuple) and len(made.state) == 5:
    _, shape, dtype, fortran_order, data = made.state
    order = "F" if fortran_order is True else "C"
  elif made.name == "_frombuffer" and len(made.arguments) == 4:
    data, dtype, shape, order = made.arguments
  elif made.name == "scalar" and len(made.arguments) == 2:
    dtype, data = made.arguments
    shape, order = (), "C"
  else:
    raise ValueError(f"expected an array, got {shown(made.name)} with other arguments than NumPy's")
  known = _dtype(dtype)
  whole = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in shape) and len(shape) <= 32
  if not whole or order not in ("C", "F") or not isinstance(data, (bytes, bytearray)):
    raise ValueError(f"expected an array with its bytes, got one of shape {shown(shape)} with {type(data).__name__}")
  if math.prod(shape) * known.itemsize != len(data):
    raise ValueError(f"an array says it is {known} of shape {shown(shape)}, for which there are {len(data)} bytes")
  return np.ndarray(shape, known, data, order="F" if order == "F" else "C")


def _dtype(made: Any) -> np.dtype:
  """Returns the dtype in a pickle: letter and width are among its arguments, the byte order is in its state."""
  code = made.arguments[0] if isinstance(made, Made) and made.name == "dtype" and made.arguments else None
  if not isinstance(code, str) or not _DTYPE.fullmatch(code):
    raise ValueError(f"expected an array of numbers, got {shown(code)}")
  order = made.state[1] if isinstance(made.state, tuple) and len(made.state) > 1 else "="
  return np.dtype(code).newbyteorder(">" if order == ">" else "<" if order == "<" else "=")
