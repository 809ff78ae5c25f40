"""Fields of a model's config.json: their types, and what this package's networks do with each.

A class of PyTorch has a dataclass here or beside its table of names, with a field for each of its constructor's
arguments, and the same defaults. A type of one value is one that our network has no other for. `Any` is for what says
nothing of a network's output. A field that the dataclass does not have is refused, since it may change the output.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Len

from pflow_jax.files.foreign import in_bytes, parse_json, shown
from pflow_jax.torch_io.places import Tensors

# Sizes of tensors, which the files must hold too, see `check_sizes`.
Size = Annotated[int, Ge(1), Le(2**20)]
Depth = Annotated[int, Ge(1), Le(1024)]  # layers of a transformer; those that are published have up to 60
Blocks = Annotated[int, Ge(1), Le(64)]  # of one resolution of an autoencoder
Sizes = Annotated[tuple[Size, ...], Len(1, 16)]
Side = Annotated[int, Ge(1), Le(2**14)]  # of latents, which no tensor has
# Numbers that float32 computes with.
Number = Annotated[float, Ge(-1e6), Le(1e6)]
Positive = Annotated[float, Gt(0), Le(1e6)]
Epsilon = Annotated[float, Gt(0), Le(1)]

_NO_SIZES = (Any, Side)
_COUNTS = (Depth, Blocks)
_Whole = Annotated[int, Ge(0), Le(2**20)]


@functools.cache
def schema_of(module: Any, hidden: tuple[str, ...]) -> type:
  """Returns a dataclass whose fields are a Flax module's attributes, with their defaults.

  An int is a whole number, and one that is called depth is a `Depth`; an attribute that is annotated with bounds of its
  own keeps those.

  Args:
    module: the module's class.
    hidden: names of the attributes that are left out.
  """
  hints = _types_of(module)

  def type_of(name: str) -> Any:
    whole = Depth if name == "depth" or name.endswith("_depth") else _Whole
    return whole if hints[name] is int else hints[name]

  fields = [
    (field.name, type_of(field.name), dataclasses.field(default=field.default))
    for field in dataclasses.fields(module)
    if field.name not in ("parent", "name", *hidden)
  ]
  return dataclasses.make_dataclass("Fields", fields, frozen=True, kw_only=True)


@functools.cache
def joined(*schemas: type) -> type:
  """Returns a dataclass with the fields of several; the first that has a field decides its type and its default."""
  fields: dict[str, tuple[str, Any, Any]] = {}
  for schema in schemas:
    types = _types_of(schema)
    for field in dataclasses.fields(schema):
      own = dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]
      fields.setdefault(field.name, (field.name, types[field.name], own))
  return dataclasses.make_dataclass("Fields", fields.values(), frozen=True, kw_only=True)


def read_fields(config: Mapping[str, Any], schema: type, name: str | None = None) -> dict[str, Any]:
  """Returns the fields of a config.json by name, those that it leaves unsaid too.

  Names that begin with an underscore are about the file. An unknown field that is null is as good as absent.

  Args:
    config: a config.json.
    schema: dataclass of the fields.
    name: of the class, where the config need not tell.

  Raises:
    ValueError: fields are of another type or value, or are none of the schema's. All are named.
  """
  where = f"config.json of {config.get('_class_name', name)}"
  said = {key: value for key, value in config.items() if not key.startswith("_")}
  known = {field.name for field in dataclasses.fields(schema)}
  unknown = sorted(key for key in said.keys() - known if said[key] is not None)
  if unknown:
    got = ", ".join(f"{shown(key).strip(chr(39))} = {shown(said[key])}" for key in unknown[:8])
    raise ValueError(
      f"{where}: got fields that this package does not know, and that may change what the model computes: {got}; "
      "remove those that do not"
    )
  fields = parse_json(json.dumps({key: said[key] for key in said.keys() & known}), schema, where=where)
  return {field.name: getattr(fields, field.name) for field in dataclasses.fields(schema)}


def check_sizes(
  config: Mapping[str, Any], schema: type, tensors: Tensors, names: Collection[str] | None = None
) -> None:
  """Refuses sizes that the tensors cannot have: before anything is built, the files bound what a config says.

  Args:
    config: all fields of a config.json, see `read_fields`.
    schema: dataclass of the fields.
    tensors: of the model's files.
    names: of the fields that the tensors have; None is all.

  Raises:
    ValueError: a size is too large. Its field is named.
  """
  count, nbytes, types = len(tensors.places), tensors.nbytes, _types_of(schema)

  def check(name: str, size: int, limit: int, held: str) -> None:
    if size > limit:
      raise ValueError(f"config.json: {name}: {size} cannot be in files of {held}")

  for field in dataclasses.fields(schema):
    value = config[field.name]
    sizes = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) is int]
    if sizes and types[field.name] not in _NO_SIZES and (names is None or field.name in names):
      if types[field.name] in _COUNTS:
        check(field.name, max(sizes), count, f"{count} tensors")
      check(field.name, max(sizes), nbytes, f"{in_bytes(nbytes)} of tensors")
  if names is None and "attention_head_dim" in config:  # there are square matrices of the network's width
    width = config["num_attention_heads"] * config["attention_head_dim"]
    check("the square of num_attention_heads x attention_head_dim", width**2, nbytes, f"{in_bytes(nbytes)} of tensors")


def _types_of(schema: Any) -> dict[str, Any]:
  """Returns the types of a class's fields, with their bounds; the annotations may be strings."""
  return typing.get_type_hints(schema, include_extras=True)


def check_outputs(outputs: int, inputs: int, count: int, other: str = "") -> None:
  """Refuses another number of output channels than a head asks for.

  Args:
    outputs: the field out_channels.
    inputs: the field in_channels.
    count: velocities that the field out_channels counts.
    other: words for what else is expected.

  Raises:
    ValueError: it is another, naming the field.
  """
  if outputs != count * inputs:
    what = f"{count} times in_channels, {count * inputs}" if count > 1 else f"in_channels, {inputs}"
    raise ValueError(f"config.json: out_channels: expected {what}{other}, got {outputs}")
