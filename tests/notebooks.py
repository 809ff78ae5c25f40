"""The notebooks, and how they are executed: shrunk, by other numbers for those of the cell tagged "settings"."""

import ast
import os
import pathlib

import nbformat

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a notebook runs on where it only has to run.
SMALL = {
  "quickstart": dict(teacher_steps=2, student_steps={1: 2, 2: 2, 4: 2}, components=2, examples=4),
  "your_images": dict(image_size=8, width=64, depth=1, teacher_steps=2, student_steps=2, batch_size=4),
  "your_teacher": dict(module_steps=3, student_steps=2, torch_steps=2),
  "which_method": dict(teacher_steps=2, policy_steps=2, flow_map_steps=2, adversarial_steps=2, examples=16),
  "flux": dict(size=16),
  "tpu_pod": dict(slice_type="v5e-8", config="digits:teacher,quicktest"),
}
# Cells of these tags are left out: they sign in, download or upload.
LEFT_OUT = {"download"}
# A command that fails, after a !, has to fail its cell.
STRICT = """
import subprocess as _subprocess
def _system(command):
  command = get_ipython().var_expand(command, depth=1)
  run = _subprocess.run(["bash", "-c", command], text=True, stdout=_subprocess.PIPE, stderr=_subprocess.STDOUT)
  print(run.stdout, end="")
  if run.returncode:
    raise SystemError(f"{command}: ended with {run.returncode}")
get_ipython().system = _system
"""


def read(path):
  return nbformat.read(path, as_version=4)


def tags(cell):
  return set(cell.metadata.get("tags", ()))


def tagged(notebook, tag):
  """The source of the one cell of a tag."""
  (cell,) = (cell for cell in notebook.cells if tag in tags(cell))
  return cell.source


def assigned(source):
  """Names that a cell assigns at its top."""
  targets = [target for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets]
  return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def with_settings(notebook, settings):
  """A copy in which a cell after that of the settings has others; those that it does not assign are refused."""
  if unknown := set(settings) - assigned(tagged(notebook, "settings")):
    raise ValueError(f"settings: the notebook has no {sorted(unknown)}")
  notebook, cells = notebook.copy(), []
  for cell in notebook.cells:
    if not tags(cell) & LEFT_OUT:
      cells.append(cell)
    if "settings" in tags(cell) and settings:
      source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
      cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": ["injected"]}))
  notebook.cells = [nbformat.v4.new_code_cell(STRICT, metadata={"tags": ["injected"]}), *cells]
  return notebook


def execute(notebook, folder, env=None, timeout=3600):
  """Runs all cells in a kernel of its own, in `folder`; the notebook gets their outputs."""
  from nbclient import NotebookClient

  own = os.environ | (env or {}) | {"XLA_FLAGS": "", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
  own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}})
  client.execute(env=own)
  notebook.cells = [cell for cell in notebook.cells if "injected" not in tags(cell)]
  return notebook
