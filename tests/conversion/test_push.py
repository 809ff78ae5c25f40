"""Uploads to a stand-in for the Hugging Face Hub: a server on this machine that HF_ENDPOINT names."""

import base64
import hashlib
import http.server
import json
import re
import threading

import huggingface_hub
import pytest

import pflow_jax as pf
from pflow_jax.commands import cli
from pflow_jax.conversion.program import convert
from pflow_jax.torch_io.tensors import WEIGHTS

TOKEN = "hf_secretsecretsecretsecretsecret"


class Hub(http.server.ThreadingHTTPServer):
  """Repositories in memory, of the calls that an upload makes.

  Attributes:
    repos: whether each is private, by name.
    files: bytes by repository and path.
    objects: large files by their SHA-256, complete.
    cards: that it looked at.
    puts: how many large files were sent.
    status: code that every upload of a large file is refused with, or None.
    owners: who may be written for.
    tokens: that it takes.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.repos, self.files, self.objects, self.cards, self.puts = {}, {}, {}, [], 0
    self.status, self.owners, self.tokens = None, {"me"}, {TOKEN}
    self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def body(self):
    if "chunked" in self.headers.get("Transfer-Encoding", ""):
      parts = []
      while size := int(self.rfile.readline(), 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(parts)
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def answer(self, value, status=200):
    content = json.dumps(value).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(content)))
    if status >= 400:
      self.send_header("X-Error-Message", value["error"])
    self.end_headers()
    self.wfile.write(content)

  def do_GET(self):
    self.body()
    name, repos = self.path.removeprefix("/api/models/"), self.server.repos
    if name in repos:
      return self.answer({"id": name, "private": repos[name], "siblings": [], "tags": []})
    return self.answer({"error": f"nothing at {self.path}"}, 404)

  def do_PUT(self):
    content, hub = self.body(), self.server
    hub.puts += 1
    if hub.status:
      return self.answer({"error": "try later"}, hub.status)
    hub.objects[self.path.rpartition("/")[2]] = content
    return self.answer({})

  def do_POST(self):
    content, hub = self.body(), self.server
    if self.headers.get("Authorization", "").removeprefix("Bearer ") not in hub.tokens:
      return self.answer({"error": f"Invalid credentials {TOKEN}"}, 401)
    if self.path == "/api/repos/create":
      asked = json.loads(content)
      name = f"{asked.get('organization') or 'me'}/{asked['name']}"
      if name.partition("/")[0] not in hub.owners:
        return self.answer({"error": "You don't have the rights"}, 403)
      if name in hub.repos:
        return self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
      hub.repos[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
      return self.answer({"url": f"{hub.url}/{name}"})
    if self.path == "/api/validate-yaml":
      hub.cards.append(json.loads(content)["content"])
      return self.answer({"errors": [], "warnings": []})
    repo = re.match(r"/(?:api/models/)?(\w+/[\w-]+)", self.path)[1]
    if repo.partition("/")[0] not in hub.owners:
      return self.answer({"error": "You don't have the rights"}, 403)
    if "/preupload/" in self.path:
      large = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
      files = [{"path": one["path"], "uploadMode": large(one["path"])} for one in json.loads(content)["files"]]
      return self.answer({"files": [one | {"shouldIgnore": False} for one in files]})
    if self.path.endswith("/info/lfs/objects/batch"):
      asked = json.loads(content)["objects"]
      upload = lambda oid: {"actions": {"upload": {"href": f"{hub.url}/upload/{oid}"}}}
      objects = [{**one, **({} if one["oid"] in hub.objects else upload(one["oid"]))} for one in asked]
      return self.answer({"transfer": "basic", "objects": objects})
    if "/commit/" in self.path:
      files = hub.files.setdefault(repo, {})
      for line in map(json.loads, content.splitlines()):
        value = line["value"]
        if line["key"] == "file":
          files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
          files[value["path"]] = hub.objects[value["oid"]]
      return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{repo}/commit/{'0' * 40}"})
    return self.answer({"error": f"nothing at {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
  server = Hub()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setenv("HF_ENDPOINT", server.url)
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture(scope="module")
def export(student_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("export") / "student"
  convert(student_run, folder)
  (folder / "notes.txt").write_text("mine alone")
  return folder


def push(*args):
  cli.main(["push", *map(str, args)])


def refused(capsys, *args):
  """Exit code, and what is printed of a push that ends in a sentence."""
  with pytest.raises(SystemExit) as stopped:
    push(*args)
  out, err = capsys.readouterr()
  assert TOKEN not in out + err
  assert "Traceback" not in err
  return stopped.value.code, err


def test_an_export_is_uploaded_whole_and_nothing_else(hub, export, capsys):
  push("--folder", export, "--repo", "me/student", "--private")
  out, err = capsys.readouterr()
  assert f"{hub.url}/me/student" in out
  assert TOKEN not in out + err
  assert hub.repos == {"me/student": True}
  names = {"config.json", "README.md", WEIGHTS}
  assert hub.files["me/student"] == {name: (export / name).read_bytes() for name in names}
  assert set(hub.cards) == {(export / "README.md").read_text()}
  # What was not filled in is said.
  assert "the card has no licence" in out
  # The same again sends no weights.
  push("--folder", export, "--repo", "me/student", "--private")
  assert hub.puts == 1


def test_a_notebook_does_the_same(hub, export):
  assert pf.push(export, "me/mine") == f"{hub.url}/me/mine"
  assert hub.repos == {"me/mine": False}


def test_after_an_interruption_only_what_lacks_is_sent(hub, export, capsys):
  hub.status = 400
  code, err = refused(capsys, "--folder", export, "--repo", "me/student")
  assert (code, "the same command goes on with the files that lack" in err) == (1, True)
  assert "me/student" not in hub.files
  hub.status, sent = None, hub.puts
  push("--folder", export, "--repo", "me/student")
  assert hub.puts == sent + 1
  assert hashlib.sha256(hub.files["me/student"][WEIGHTS]).hexdigest() in hub.objects


def test_a_repository_of_another_is_refused(hub, export, capsys):
  code, err = refused(capsys, "--folder", export, "--repo", "them/student")
  assert code == 2
  assert "--repo: the token may not write to them/student" in err
  assert hub.repos == {}


def test_a_public_repository_is_not_taken_for_a_private_one(hub, export, capsys):
  hub.repos["me/student"] = False
  code, err = refused(capsys, "--folder", export, "--repo", "me/student", "--private")
  assert (code, "--private: me/student is public already" in err) == (2, True)
  assert hub.files == {}


def test_a_token_that_the_hub_does_not_take(hub, export, capsys):
  hub.tokens = set()
  code, err = refused(capsys, "--folder", export, "--repo", "me/student")
  assert (code, "does not take the token" in err) == (2, True)


def test_without_a_token(hub, export, capsys, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  code, err = refused(capsys, "--folder", export, "--repo", "me/student")
  assert (code, "run `hf auth login`" in err) == (2, True)


def test_without_a_network_another_try_may_succeed(export, capsys, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  code, err = refused(capsys, "--folder", export, "--repo", "me/student")
  assert (code, "the Hub cannot be reached" in err) == (1, True)


def test_without_the_library(export, capsys, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
  code, err = refused(capsys, "--folder", export, "--repo", "me/student")
  assert (code, "pip install 'pflow-jax[hub]'" in err) == (2, True)


def test_a_folder_that_is_no_export_is_refused(hub, export, student_run, tmp_path, capsys):
  cut = tmp_path / "cut"
  cut.mkdir()
  (cut / "config.json").write_bytes((export / "config.json").read_bytes())
  bare = tmp_path / "bare"
  bare.mkdir()
  for name in ("config.json", WEIGHTS):
    (bare / name).write_bytes((export / name).read_bytes())
  for folder, message in (
    (tmp_path / "none", "there is none"),
    (tmp_path, "it has no config.json"),
    (student_run, "convert it first"),
    (cut, "expected"),
    (bare, "expected its card, README.md"),
  ):
    code, err = refused(capsys, "--folder", folder, "--repo", "me/student")
    assert (code, message in err) == (2, True), err
  assert hub.repos == {}


@pytest.mark.parametrize(
  "repo", ["student", "me/student/x", "me/", "https://huggingface.co/me/x", "../x", "me/..", "me/a b"]
)
def test_a_name_that_is_none_is_refused(hub, export, capsys, repo):
  assert refused(capsys, "--folder", export, "--repo", repo)[0] == 2
  assert hub.repos == {}
