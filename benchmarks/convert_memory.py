"""Memory that `pflow convert` takes, against the largest tensor of the model.

    python benchmarks/convert_memory.py [--folder /tmp/convert] [--gigabytes 2]

It writes a random FLUX.1 folder in bfloat16, with the published width and few blocks, in shards; converts it to a
workdir, to one laid out for a mesh, and back to a PyTorch folder, each in a process of its own; and checks that the
result equals the first folder, bit by bit. The peak is the process's largest resident set less that after its imports.
The bar is twice the largest tensor and a constant.

Measured on two cores, 2.62 GB in 6 files whose largest tensor has 108 MB: 153 MB to a workdir (1.4 times the largest
tensor), 160 MB to one for a mesh of 8 devices, 124 MB back (1.1 times); with the memory of a tiny model, the constant,
added, 211, 218 and 132 MB. About 35 s each way on a shared machine, most of it zstd's.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from pflow_jax.conversion.models import Model, model_of_torch
from pflow_jax.families.flux.names import NAMES as flux
from pflow_jax.torch_io.shards import ModelFolder, Planned
from pflow_jax.torch_io.table import same_bits
from pflow_jax.torch_io.tensors import open_tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MB = 2**20

# A process of its own prints the peak beyond the start, in bytes. Linux keeps the peak, and lets it be reset.
RUN = """
import json, pathlib, re, sys
import jax, torch, safetensors
from pflow_jax.conversion.program import convert
source, out, mesh, warm = json.loads(sys.argv[1])
status = lambda: pathlib.Path("/proc/self/status").read_text()
resident = lambda name: int(re.search(name + r":\\s+(\\d+) kB", status())[1]) * 1024
if warm:
  convert(warm[0], warm[1], mesh=mesh)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
convert(source, out, mesh=mesh)
print(resident("VmHWM") - before)
"""


def write_folder(folder: pathlib.Path, gigabytes: float) -> Model:
  """Writes a random model of about this size, in five files."""
  model, size = _model(1, 1), 0
  for blocks in range(1, 20):
    model = _model(blocks, 2 * blocks)
    size = 2 * sum(int(np.prod(shape)) for shape in model.torch_shapes().values())
    if size >= gigabytes * 10**9:
      break
  _write(folder, model, size // 5)
  return model


def _model(depth: int, single_depth: int) -> Model:
  config = {"_class_name": "FluxTransformer2DModel", "num_layers": depth, "num_single_layers": single_depth}
  return model_of_torch(config | {"guidance_embeds": True}, {})


def _write(folder: pathlib.Path, model: Model, max_bytes: int) -> None:
  rng, shapes = np.random.default_rng(0), model.torch_shapes()
  planned = [Planned(name, shape, BFLOAT16) for name, shape in shapes.items()]
  make = lambda name: rng.standard_normal(shapes[name], np.float32).astype(BFLOAT16)
  ModelFolder(folder, flux.config_from_model(model.attributes), planned, "random", {}, max_bytes).write(make)


def measure(source: pathlib.Path, out: pathlib.Path, mesh: dict[str, int], warm: list[str]) -> tuple[float, float]:
  """Measures (peak beyond the start in bytes, seconds)."""
  start = time.perf_counter()
  arguments = json.dumps([str(source), str(out), mesh, warm])
  run = subprocess.run([sys.executable, "-c", RUN, arguments], capture_output=True, text=True, check=False)
  if run.returncode:
    raise RuntimeError(run.stderr)
  return int(run.stdout.splitlines()[-1]), time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", help="for the files, removed at the end; default: a temporary one")
  parser.add_argument("--gigabytes", type=float, default=2.0)
  args = parser.parse_args()
  root = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
  try:
    model = write_folder(root / "torch", args.gigabytes)
    tensors = open_tensors(root / "torch")
    largest = max(place.nbytes for place in tensors.places.values())
    print(
      f"{tensors.nbytes / 10**9:.2f} GB in {len(list((root / 'torch').glob('*.safetensors')))} files, "
      f"{model.attributes['depth']} double and {model.attributes['single_depth']} single blocks; largest tensor "
      f"{largest / MB:.0f} MB, bar {2 * largest / MB:.0f} MB and a constant"
    )
    _write(root / "tiny", _tiny(), 10**9)
    for title, source, out, mesh in (
      ("to a workdir", "torch", "run", {}),
      ("to a workdir for a mesh of 8", "torch", "mesh", {"fsdp": 4, "tensor": 2}),
      ("back to PyTorch", "run", "back", {}),
      ("back to PyTorch from the mesh's", "mesh", "mesh_back", {}),
    ):
      # Libraries take memory at their first use, whatever the size: this constant is taken before the measurement.
      warm = [str(root / f"tiny{'' if source == 'torch' else '_run'}"), str(root / f"tiny_{out}")]
      cold, seconds = measure(root / source, root / out, mesh, [])
      shutil.rmtree(root / out)
      peak, seconds = measure(root / source, root / out, mesh, warm)
      print(f"{title}: {peak / MB:.0f} MB ({peak / largest:.2f} of the largest tensor), {seconds:.0f} s; ", end="")
      print(f"with what a tiny model takes too, the constant, {cold / MB:.0f} MB", flush=True)
    for name in ("back", "mesh_back"):
      back = open_tensors(root / name)
      if set(back.places) != set(tensors.places):
        raise RuntimeError("other tensors came back")
      if not all(same_bits(back.read(tensor), tensors.read(tensor)) for tensor in tensors.places):
        raise RuntimeError("other bits came back")
    print("what came back is what was written")
  finally:
    shutil.rmtree(root)


def _tiny() -> Model:
  config = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "in_channels": 16}
  sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10}
  return model_of_torch(config | sizes | {"axes_dims_rope": [4, 6, 6], "guidance_embeds": True}, {})


if __name__ == "__main__":
  main()
