"""`pflow push`: an export on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from pflow_jax.conversion.origin import README, front_matter
from pflow_jax.files import foreign
from pflow_jax.files.folders import expanded
from pflow_jax.torch_io.tensors import CONFIG, INDEX, open_tensors

# A run of the converter may have left more, and so may the user.
_FILES = (README, CONFIG, INDEX, "*.safetensors", "LICENSE*")


def push(folder: str | os.PathLike, repo: str, *, private: bool = False) -> str:
  """Uploads an export to the Hugging Face Hub; after an interruption the same call goes on with the files that lack.

  The token is that of `hf auth login`, or the variable HF_TOKEN.

  Args:
    folder: what `convert` made of a run.
    repo: USER/NAME of the repository, which is made if there is none.
    private: whether others may not see it.

  Returns:
    Address of the repository.

  Raises:
    ValueError: the folder is no export, there is no token, or it may not write there.
    ConnectionError: the Hub cannot be reached.
    ImportError: huggingface_hub is not installed.
  """
  path = pathlib.Path(expanded(folder, "folder"))
  _check_export(path)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
    raise ValueError(f"repo: expected USER/NAME, got {foreign.shown(repo)}")
  try:
    from huggingface_hub import HfApi, get_token
  except ImportError as error:
    raise ImportError("push needs huggingface_hub: pip install 'pflow-jax[hub]'") from error
  token = get_token()
  if token is None:
    raise ValueError("push: expected a token that may write: run `hf auth login`, or set HF_TOKEN")
  if not (path / README).exists():
    raise ValueError(f"{path}: expected its card, {README}; `pflow convert` with the same flags writes it")
  if front_matter(path / README).get("license", "unknown") == "unknown":
    print(f"the card has no licence: fill in what {path / README} does not know, and push again")
  api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="pflow_jax")
  with _in_a_sentence(repo, token):
    address = str(api.create_repo(repo, private=private, exist_ok=True))
    if private and not api.repo_info(repo).private:
      raise ValueError(f"private: {repo} is public already; change that in its settings on the Hub, or leave it out")
    message = f"Upload {path.resolve().name} with pflow_jax"
    api.upload_folder(repo_id=repo, folder_path=path, commit_message=message, allow_patterns=list(_FILES))
  return address


def _check_export(path: pathlib.Path) -> None:
  """Raises ValueError unless the folder holds a whole model for PyTorch."""
  wanted = f"{path}: expected a folder that `pflow convert --source RUN --out FOLDER` made"
  if not path.is_dir():
    raise ValueError(f"{wanted}, there is none")
  if not (path / CONFIG).exists():
    raise ValueError(f"{wanted}, it has no {CONFIG}")
  if "_class_name" not in foreign.read_json(path / CONFIG):
    raise ValueError(f"{wanted}, it is a run: convert it first")
  open_tensors(path)  # which says what is missing


@contextlib.contextmanager
def _in_a_sentence(repo: str, token: str) -> Iterator[None]:
  """Context that makes one sentence, without the token, of what the Hub and the way there raise."""
  from huggingface_hub.errors import HfHubHTTPError

  network: Any = HfHubHTTPError.__bases__[0]  # of whichever HTTP client the library has: the base of its errors
  try:
    yield
  except (network, ConnectionError, RuntimeError) as error:
    # The library wraps what stops the sending of a large file.
    reason: Any = error.__cause__ if isinstance(error, RuntimeError) else error
    if not isinstance(reason, (network, ConnectionError)):
      raise
    refused = isinstance(reason, HfHubHTTPError) and reason is error
    raise _refused(reason, repo, token) if refused else _interrupted(reason, token) from None


def _refused(error: Any, repo: str, token: str) -> Exception:
  """The error to raise for an answer of the Hub."""
  status, said = error.response.status_code, _plain(error.server_message or "no reason given", token)
  if status == 401:
    return ValueError(f"push: the Hub does not take the token ({said}); take one that may write: `hf auth login`")
  if status in (403, 404):
    owner = repo.partition("/")[0]
    return ValueError(
      f"repo: the token may not write to {repo} ({said}); give a repository of your own, or a token that may write for "
      f"{owner}"
    )
  if status < 500 and status != 429:
    return ValueError(f"push: the Hub refused it with status {status} ({said})")
  return _interrupted(error, token)


def _interrupted(error: BaseException, token: str) -> Exception:
  return ConnectionError(
    f"push: the Hub cannot be reached, or stopped answering ({_plain(error, token)}); the same command goes on "
    "with the files that lack"
  )


def _plain(said: Any, token: str) -> str:
  return foreign.shown(str(said).strip().replace(token, "***"), 200)
