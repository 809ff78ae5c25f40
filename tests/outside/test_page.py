"""The page of `pflow demo` in a real browser; `make page` runs this, and `make test` does not.

Pictures for people are written to build/screenshots: of the workdirs in PFLOW_PAGE_RUNS, or of tiny runs.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import time
from urllib.parse import urlsplit

import httpx
import jax
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

import pflow_jax as pf
from pflow_jax.page.pictures import GAP, LINE, PAD, Grid
from tests.programs import ROOT, command, environment, listening, quick, write_random

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
SHOTS = ROOT / "build" / "screenshots"
EIGHT = Grid((8, 8), 8)  # of digits side by side
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 120_000  # milliseconds; programs are compiled meanwhile
# What the server would ask of other machines fails there, and is written down.
GUARD = """
import os, socket
def guard(function):
  def guarded(*args, **options):
    host = args[0] if function is ask else args[1][0] if isinstance(args[1], tuple) else "local"
    if host not in ("127.0.0.1", "localhost", "::1", "local", None, "", b"127.0.0.1", "0.0.0.0"):
      open(os.environ["ASKED"], "a").write(f"{host}\\n")
      raise OSError(f"{host}: not from a test")
    return function(*args, **options)
  return guarded
ask = socket.getaddrinfo
socket.getaddrinfo = guard(ask)
socket.socket.connect = guard(socket.socket.connect)
"""


@dataclasses.dataclass
class Page:
  """A running `pflow demo`.

  Attributes:
    process: its process.
    address: of the page.
    log: what it prints.
    asked: hosts that it asked for.
  """

  process: subprocess.Popen
  address: str
  log: pathlib.Path
  asked: pathlib.Path


@contextlib.contextmanager
def served(folder, *args, env=None):
  folder.mkdir()
  page = Page(None, "", folder / "log", folder / "asked")
  (folder / "sitecustomize.py").write_text(GUARD)
  env = environment() | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "ASKED": str(page.asked)} | (env or {})
  env["TMPDIR"] = str(folder / "tmp")
  (folder / "tmp").mkdir()
  with page.log.open("w") as log:
    page.process = subprocess.Popen(command("demo", *args), stdout=log, stderr=log, env=env, cwd=ROOT)
  try:
    for _ in range(600):
      found = re.search(r"the page is at (\S+)", page.log.read_text())
      if found or page.process.poll() is not None:
        break
      time.sleep(0.1)
    assert found, page.log.read_text()
    page.address = found[1]
    yield page
  finally:
    page.process.terminate()
    page.process.wait(30)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
  """Opens pages, each in a profile of its own, and closes them."""
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
    yield browser
    browser.close()


@pytest.fixture
def visit(chromium):
  """Returns a function that opens a page as a new visitor; looks afterwards that nothing was loaded from elsewhere."""
  contexts, requests = [], []

  def visit(page, viewport=DESKTOP, colours="light", **options):
    context = chromium.new_context(viewport=viewport, color_scheme=colours, **options)
    contexts.append(context)
    tab = context.new_page()
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.address)
    tab.wait_for_selector("#save a", timeout=PATIENCE)
    return tab

  yield visit
  hosts = {urlsplit(url).hostname for url in requests if urlsplit(url).scheme not in ("data", "blob")}
  assert hosts == {"127.0.0.1"}
  for context in contexts:
    context.close()


@pytest.fixture(scope="module")
def runs(teacher_run, student_run, tmp_path_factory):
  """A teacher, its student, and the student in PyTorch's files."""
  out = tmp_path_factory.mktemp("exported") / "torch"
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    pf.convert(student_run, out)
  return teacher_run, student_run, out


@pytest.fixture(scope="module")
def digits(runs, tmp_path_factory):
  with served(tmp_path_factory.mktemp("digits") / "page", *(f"--workdir={run}" for run in runs)) as page:
    yield page


def draw(tab, button="#draw"):
  before = tab.get_attribute("#save a", "href")
  tab.click(button)
  wait_for_another(tab, before)


def wait_for_another(tab, before):
  tab.wait_for_function("h => document.querySelector('#save a').href !== h", arg=before, timeout=PATIENCE)
  tab.wait_for_timeout(500)


def fill(tab, **fields):
  """Fills fields: seed, what (the class), nfe (a number a row)."""
  if "seed" in fields:
    tab.fill("#seed input", str(fields["seed"]))
  if "what" in fields:
    tab.click("#what input")
    tab.get_by_role("option", name=fields["what"], exact=True).click()
  for i, nfe in enumerate(fields.get("nfe", ())):
    tab.locator(".nfe input").nth(i).fill(str(nfe))


def saved(tab):
  """The file that the link saves: its pixels and its settings."""
  with tab.expect_download() as download:
    tab.click("#save a")
  image = Image.open(io.BytesIO(pathlib.Path(download.value.path()).read_bytes()))
  return download.value.suggested_filename, np.asarray(image.convert("RGB")), json.loads(image.text["parameters"])


def samples_in(pixels, row):
  """Samples of a row of a saved file, as a run draws them but for 8 bits."""
  height, width = EIGHT.cell
  top, middle = PAD + row * (LINE + height - GAP + PAD) + LINE, EIGHT.scale // 2
  corners = [(top, PAD + i * width) for i in range(EIGHT.count)]
  picked = [pixels[y + middle :: EIGHT.scale, x + middle :: EIGHT.scale][:8, :8, :1] for y, x in corners]
  return np.stack(picked) / 127.5 - 1


def click(tab, row, column, pixel):
  """Clicks the middle of a sample's pixel (down, right)."""
  picture = tab.locator(".samples img").nth(row)
  shown = picture.bounding_box()["width"] / (EIGHT.columns * EIGHT.cell[1] - GAP)
  x, y = column * EIGHT.cell[1] + (pixel[1] + 0.5) * EIGHT.scale, (pixel[0] + 0.5) * EIGHT.scale
  picture.click(position={"x": x * shown, "y": y * shown})


def errors_of(tab, message):
  """Waits for a message on the page, and returns all."""
  tab.get_by_text(re.compile(message)).first.wait_for(timeout=PATIENCE)
  return tab.inner_text("body")


@pytest.mark.usefixtures("float32")
def test_what_is_drawn_and_saved_is_what_the_runs_draw(digits, runs, visit):
  tab = visit(digits)
  assert re.findall(r"^(teacher\d|student\d|torch|teacher\d, few steps)$", tab.inner_text("body"), re.M)[2] == "torch"
  assert "128 evaluations" in tab.inner_text("body")
  assert tab.inner_text("body").count("compiled in") == 4
  fill(tab, seed=5, what="3", nfe=(3, 2, 2, 1))
  draw(tab)
  name, pixels, told = saved(tab)
  assert name == "pflow-seed5.png"
  assert (told["class"], told["seeds"], told["temperature"]) == ("3", list(range(5, 13)), None)
  assert [row["nfe"] for row in told["rows"]] == [row["evaluations"] for row in told["rows"]] == [3, 2, 2, 1]
  for row, (run, nfe) in enumerate(zip([*runs, runs[0]], (3, 2, 2, 1), strict=True)):
    own = pf.load(run)
    for column in (0, 4):
      x0 = own.sample(1, labels=[3], seed=5 + column, nfe=nfe)[0]
      np.testing.assert_allclose(samples_in(pixels, row)[column], np.clip(x0, -1, 1), atol=0.02)
  draw(tab)
  assert "compiled" not in tab.inner_text("body"), "the same evaluations again"
  tab.get_by_label("16").check()
  draw(tab, "#new-seed")
  _, _, told = saved(tab)
  assert len(told["seeds"]) == 16
  assert told["seeds"][0] != 5
  assert "compiled" not in tab.inner_text("body"), "more of them, and another seed"


def test_a_click_on_a_pixel_shows_its_way(digits, visit):
  tab = visit(digits)
  click(tab, 1, column=2, pixel=(6, 3))
  tab.wait_for_selector("#chart svg[role=img]", timeout=PATIENCE)
  told = tab.inner_text("#chart")
  assert "Seed 2: the pixel in row 7, column 4" in told
  assert "value of the pixel" in told
  assert len(re.findall("teacher|student|torch", told)) >= 4, "a line a row"
  before = tab.inner_html("#chart")
  click(tab, 1, column=2, pixel=(6, -0.7))  # between two pictures
  tab.wait_for_timeout(1500)
  assert tab.inner_html("#chart") == before


def test_bad_input_is_answered_in_a_sentence(digits, visit):
  tab = visit(digits)
  fill(tab, seed=-1)
  tab.click("#draw")
  said = errors_of(tab, "Seed: expected a whole number from 0 to 4,294,967,287, got -1")
  fill(tab, seed=0, nfe=(0,))
  tab.click("#draw")
  said += errors_of(tab, r"Evaluations of teacher\d: expected a whole number from 1 to 1,000, got 0")
  fill(tab, nfe=(10**9,))
  tab.click("#draw")
  said += errors_of(tab, "got 1000000000")
  fill(tab, nfe=(1,), seed="")
  tab.click("#draw")
  said += errors_of(tab, "Seed: .*got nothing")
  fill(tab, seed=2**40)
  tab.click("#draw")
  said += errors_of(tab, "got 1099511627776")
  assert "Traceback" not in said + digits.log.read_text()
  fill(tab, seed=3, nfe=(1,))
  draw(tab)
  assert saved(tab)[2]["seeds"][0] == 3, "and it goes on"


def test_two_visitors_at_once_have_their_own(digits, visit):
  tabs = [visit(digits), visit(digits)]
  for i, tab in enumerate(tabs):
    fill(tab, seed=40 + i, what=str(i), nfe=(2, 1, 1, 1))
  before = [tab.get_attribute("#save a", "href") for tab in tabs]
  for tab in tabs:
    tab.click("#draw")
  for tab, href in zip(tabs, before, strict=True):
    wait_for_another(tab, href)
  for i, tab in enumerate(tabs):
    told = saved(tab)[2]
    assert (told["seeds"][0], told["class"]) == (40 + i, str(i))
  for i, tab in reversed(list(enumerate(tabs))):
    tab.locator(".samples img").first.click(position={"x": 20, "y": 20})
    tab.get_by_text(f"Seed {40 + i}: ").wait_for(timeout=PATIENCE)


def test_a_point_shows_its_way(tmp_path, visit):
  """The run is of random parameters."""
  write_random(quick("checkerboard", "teacher"), tmp_path / "board")
  with served(tmp_path / "page", f"--workdir={tmp_path / 'board'}") as page:
    tab = visit(page)
    assert not tab.get_by_text("Class").is_visible()
    tab.locator(".samples img").first.click(position={"x": 100, "y": 100})
    tab.wait_for_selector("#chart svg[role=img]", timeout=PATIENCE)
    assert "from noise (ring) to data (dot)" in tab.inner_text("#chart")
    assert saved(tab)[2]["seeds"] == [0]
    look(tab, "points")


def test_it_listens_here_alone_and_asks_nobody(digits, visit):
  visit(digits)
  port = urlsplit(digits.address).port
  assert {at for at in listening(digits.process.pid) if at[1] == port} == {("127.0.0.1", port)}
  assert {host for host, _ in listening(digits.process.pid)} == {"127.0.0.1"}
  assert not digits.asked.exists(), digits.asked.read_text()


def test_a_visitor_reads_and_leaves_no_files(digits):
  api = f"{digits.address}gradio_api"
  assert httpx.get(f"{api}/file={ROOT / 'README.md'}").status_code == 403
  assert httpx.get(f"{api}/file=/etc/hostname").status_code == 403
  assert "exceeded maximum allowed size" in httpx.post(f"{api}/upload", files={"files": b"some bytes"}).text


def test_pictures_are_for_this_user_alone(digits, visit):
  visit(digits)
  folder = digits.log.parent / "tmp"
  (own,) = folder.glob("pflow_demo_*")
  assert own.stat().st_mode & 0o777 == 0o700
  assert list(own.rglob("*.png"))
  assert not (folder / "gradio").exists()


def test_a_place_that_is_none_is_told(digits, runs):
  port = urlsplit(digits.address).port
  for flag, told in (
    (f"--port={port}", f"127.0.0.1, port {port} (Address already"),
    ("--host=1.2.3", "1.2.3, port any ("),
  ):
    args = command("demo", "--workdir=nowhere", flag)
    run = subprocess.run(args, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.startswith(f"pflow: --host, --port: cannot listen on {told}")
  for where, told in (
    (dict(port=65536), "port: expected one from 1"),
    (dict(host="a..b"), "host, port: cannot listen"),
  ):
    with pytest.raises(ValueError, match=told):
      pf.demo("nowhere", **where)


def test_a_notebook_opens_and_closes_it(runs):
  page = pf.demo(pf.load(runs[1]), runs[0])
  assert "pflow demo" in httpx.get(page.local_url).text
  page.close(verbose=False)
  with pytest.raises(httpx.ConnectError):
    httpx.get(page.local_url)


def test_it_is_looked_at(tmp_path, visit, runs):
  """Screenshots on a desk, light and dark, and on a phone, where nothing is wider than the screen."""
  given = shlex.split(os.environ.get("PFLOW_PAGE_RUNS", ""))
  env = {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "none")} if given else {}
  with served(tmp_path / "page", *(f"--workdir={run}" for run in given or runs[:2]), env=env) as page:
    for name, viewport, colours in (("page", DESKTOP, "light"), ("dark", DESKTOP, "dark"), ("phone", PHONE, "light")):
      tab = visit(page, viewport, colours)
      click(tab, 1, column=3, pixel=(5, 2))
      tab.wait_for_selector("#chart svg[role=img]", timeout=PATIENCE)
      assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
      look(tab, name)


def look(tab, name):
  SHOTS.mkdir(parents=True, exist_ok=True)
  tab.wait_for_timeout(1500)
  tab.screenshot(path=SHOTS / f"{name}.png", full_page=True)
  assert (SHOTS / f"{name}.png").stat().st_size < 300_000
