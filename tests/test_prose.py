"""Docstrings are plain sentences with Google's sections, one argument a line, and name what the code has."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pflow_jax"

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "References")
NAMED = ("Args", "Attributes")  # sections of names
OPENING = re.compile(r"(What|Who|Whose|How|Where|Which|Whether|In which)\b")
FRAGMENT = re.compile(r"(True|False|Of)\b")
ERROR = re.compile(r"; (raises )?\w*Error\b")
TITLE = re.compile(rf"({'|'.join(SECTIONS)}):(.*)")
FOLDED = re.compile(rf"\S\s+({'|'.join(SECTIONS)}):(\s|$)")
ENTRY = re.compile(r"\*{0,2}(\w+)( \([^)]*\))?: \S")
SECOND_ENTRY = re.compile(r"\s{2,}\*{0,2}\w+: ")
REFERENCE = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`")
LIBRARIES = ("jax", "pf")  # a reference may begin with these
SEVERAL = re.compile(r"\*{0,2}\w+(, ?\*{0,2}\w+)+: ")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


def classes_of(trees):
  """Class definitions by name, those of one name in a list."""
  found = {}
  for tree in trees:
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef):
        found.setdefault(node.name, []).append(node)
  return found


def arguments_of(function):
  """Names of a function's arguments."""
  a = function.args
  both = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(one for one in (a.vararg, a.kwarg) if one)]
  return {one.arg for one in both}


def names_of(node, classes):
  """Names that a docstring's Args or Attributes may have: arguments, or a class's fields and those of its bases."""
  if isinstance(node, FUNCTIONS):
    return arguments_of(node)
  names = set()
  for part in ast.walk(node):
    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
      names.add(part.target.id)
    elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
      names.add(part.attr)
  for part in node.body:
    if isinstance(part, FUNCTIONS):
      names |= arguments_of(part) if part.name == "__init__" else {part.name}
    elif isinstance(part, ast.Assign):
      names |= {target.id for target in part.targets if isinstance(target, ast.Name)}
  for base in node.bases:
    name = (base.value if isinstance(base, ast.Subscript) else base).__dict__
    for parent in classes.get(name.get("id") or name.get("attr"), ()):
      if parent is not node:
        names |= names_of(parent, classes)
  return names


def defined_in(body):
  """Names that a module or a class defines or imports."""
  for node in body:
    if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
      yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
      yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def is_there(reference, known, classes):
  """Whether a dotted name says a room, a module in it and a thing of that, a class and its part, or an argument's."""
  first, second, *_ = parts = reference.removeprefix("pflow_jax.").split(".")
  if first in (*LIBRARIES, *known):
    return True
  if first in classes:
    return any(second in names_of(one, classes) for one in classes[first])
  modules = [end for end in range(1, len(parts) + 1) if ".".join(parts[:end]) in DEFINED]
  return bool(modules) and (modules[-1] == len(parts) or parts[modules[-1]] in DEFINED[".".join(parts[: modules[-1]])])


def faults_of(node, classes):
  """What is wrong with the docstring of a module, a class or a function."""
  text = ast.get_docstring(node)
  if text is None:
    return
  lines = text.split("\n")
  if OPENING.match(text):
    yield f"opens with a question word: {lines[0]}"
  if FRAGMENT.match(text):
    yield f"opens without a subject: {lines[0]}"
  if not isinstance(node, ast.Module) and ERROR.search(lines[0]):
    yield f"has an error in its first line: {lines[0]}"
  for reference in REFERENCE.findall(text):
    known = () if isinstance(node, ast.Module) else names_of(node, classes)
    if not is_there(reference, known, classes):
      yield f"refers to what there is not, or not from a room on: {reference}"
  section = None
  for before, line in zip(["", *lines], lines, strict=False):
    if FOLDED.search(line):
      yield f"has a section in running text: {line}"
    if title := TITLE.match(line):
      section = title[1]
      if title[2].strip():
        yield f"has text beside the title of a section: {line}"
      if before.strip():
        yield f"has no blank line before a section: {line}"
    elif line and not line.startswith(" "):
      section = None
    elif section in NAMED and re.match(r" {2}\S", line):
      entry = ENTRY.match(line.strip())
      if SEVERAL.match(line.strip()) or SECOND_ENTRY.search(line.strip()):
        yield f"has several arguments on a line: {line}"
      elif entry is None:
        yield f"has a line without an argument's name: {line}"
      elif not isinstance(node, ast.Module) and entry[1] not in names_of(node, classes):
        yield f"names an argument that there is not: {entry[1]}"


def missing_in(tree, known):
  """Public functions, classes and methods without a docstring; a method may have it where it is declared first."""
  for node in tree.body:
    if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
      if ast.get_docstring(node) is None:
        yield node.name
      for part in node.body if isinstance(node, ast.ClassDef) else ():
        own = isinstance(part, FUNCTIONS) and not (part.name.startswith("_") or node.bases or part.name in known)
        if own and ast.get_docstring(part) is None:
          yield f"{node.name}.{part.name}"


def declared_by(classes):
  """Names of methods that interfaces describe."""
  interfaces = [one for ones in classes.values() for one in ones if any("Protocol" in ast.dump(b) for b in one.bases)]
  return {part.name for one in interfaces for part in one.body if isinstance(part, FUNCTIONS)}


def problems(tree, classes):
  """All that is wrong with a module's docstrings, a line each."""
  found = [f"{name} has no docstring" for name in missing_in(tree, declared_by(classes))]
  for node in ast.walk(tree):
    if isinstance(node, DOCUMENTED):
      found += [f"{getattr(node, 'name', 'the module')} {fault}" for fault in faults_of(node, classes)]
  return found


TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

DEFINED = {
  name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): set(defined_in(tree.body))
  for name, tree in TREES.items()
}


def test_docstrings():
  classes = classes_of(TREES.values())
  found = {}
  for name, tree in TREES.items():
    if faults := problems(tree, classes):
      found[name] = faults
  assert not found, "\n".join(f"{name}: {fault}" for name, faults in sorted(found.items()) for fault in faults)


SOUND = '''
"""A module.

References:
  arXiv:0000.00000.
"""

class Base:
  """A base.

  Attributes:
    width: of a layer.
  """

  width: int

class Derived(Base):
  """A class with a field of its base.

  Attributes:
    width: of a layer.
    depth: number of layers,
      in all.
  """

  depth: int = 1

  def over(self):
    return 0

def public(a, *, b=0, **more):
  """Returns a.

  Args:
    a: a number: any.
    b: another.
    **more: not used; `a.b`, `Derived.depth`, `checkpoints.stream.Leaf`, `core.policies`, `jax.vmap`.

  Returns:
    the number.

  Raises:
    ValueError: never.
  """

def _private():
  return 0
'''


def test_sound_module_passes():
  tree = ast.parse(SOUND)
  assert problems(tree, classes_of([tree])) == []


@pytest.mark.parametrize(
  ("old", "new", "fault"),
  [
    ("Returns a.", "What is a.", "public opens with a question word"),
    ("Returns a.", "Whether it is a.", "public opens with a question word"),
    ("A module.", "In which things are.", "the module opens with a question word"),
    ("Returns a.", "True of a.", "public opens without a subject"),
    ("A base.", "Of a base.", "Base opens without a subject"),
    ("Returns a.", "Returns a; ValueError for others.", "public has an error in its first line"),
    ("A base.", "How it is based.", "Base opens with a question word"),
    ("a: a number: any.\n    b:", "a: a number.   b:", "public has several arguments on a line"),
    ("    b: another.\n", "    b, more: others.\n", "public has several arguments on a line"),
    ("Args:\n    a:", "Args: a:", "public has text beside the title of a section"),
    ("Returns:\n    the number.", "Returns: the number.", "public has text beside the title of a section"),
    ("the number.\n\n  Raises:", "the number.\n  Raises:", "public has no blank line before a section"),
    ("the number.\n\n  Raises:", "the number.   Raises:", "public has a section in running text"),
    ("    b: another.", "    another number.", "public has a line without an argument's name"),
    ("    b: another.", "    c: another.", "public names an argument that there is not: c"),
    ("    depth: number", "    height: number", "Derived names an argument that there is not: height"),
    ('  """Returns a.', '  f"""Returns a.', "public has no docstring"),
    ('  """A base.', '  f"""A base.', "Base has no docstring"),
    ("class Derived(Base)", "class Derived", "Derived.over has no docstring"),
    ("b: another.", "b: of `stream.Leaf`.", "public refers to what there is not, or not from a room on: stream.Leaf"),
    ("b: another.", "b: of `checkpoints.stream.Leaves`.", "public refers to what there is not"),
    ("b: another.", "b: of `Base.height`.", "public refers to what there is not"),
    ("A module.", "A module of `a.b`.", "the module refers to what there is not"),
  ],
)
def test_faults_are_found(old, new, fault):
  assert SOUND.count(old) == 1
  tree = ast.parse(SOUND.replace(old, new))
  assert any(found.startswith(fault) for found in problems(tree, classes_of([tree])))
