"""Every block of Python and every command on README and in docs/ is executed, shrunk.

The blocks of a page run one after another, in a folder of theirs. A fence or a command that no rule covers fails, and
so does a flag, a key or an error's message that a line names and that the code does not have.
"""

import ast
import functools
import inspect
import os
import re
import shlex
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

import pflow_jax as pf
from pflow_jax.commands import cli, programs
from pflow_jax.commands.command import define_join_flags, run_command
from pflow_jax.commands.flags import define_flags
from pflow_jax.conversion import cache as caching
from pflow_jax.data import registry
from pflow_jax.families import text as texts
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.planning import plan as planner
from pflow_jax.settings.config_file import read_config_file
from pflow_jax.settings.tree import OWNERS, Settings
from pflow_jax.training.workdir import claim
from tests.encoders import StubEncoder
from tests.pages import PAGES, ROOT, fences, spans
from tests.programs import CONFIGS, load_module, write_random
from tests.prompt_folders import write as write_prompts
from tests.test_rooms import ROOMS

# Pages whose blocks, all of Python, another test executes.
ELSEWHERE = {"extending.md": "test_extending.py"}
# Fences that are what a command prints, by page.
OUTPUT = {"tpu.md": 1}
# Pages whose folder another page has filled before: those that go on with its runs.
GOES_ON_WITH = {"index.md": "README.md", "methods.md": "README.md", "pytorch.md": "README.md"}

# What is changed in a block of Python before it runs: fewer steps, a smaller network, data that are here.
SMALLER = {
  r"steps=\d+": "steps=2, batch_size=8",
  r"width=64, depth=4": "width=16, depth=1",
  r"student\.evaluate\(\)": (
    "student.evaluate(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2, quiet=True)"
  ),
  r"/data/(flowers|mine\.npz)": r"\1",
  r"(latents|prompts):/data/mine": r"\1:\1",
}
# Data sets that have to be downloaded: of these the keys alone are looked at.
DOWNLOADED = ("tfds", "emoji")
# Commands that are parsed, config and flags, and not called, and why.
PARSED = {
  r"pflow compare ": "trains 22 students a seed; tests/evaluation/test_compare.py trains some",
  r"pflow data emoji": "downloads 74 MB",
  r"pflow train .*wandb": "a service of others; tests/training/test_weights_biases.py reads what is sent",
  r"pflow \w+ .*(flux|FLUX\.1|runs/theirs)": (
    "weights of 12 billion parameters; tests/evaluation/test_text_to_image.py goes the same way with tiny ones"
  ),
  r"pflow convert .*(last\.pt|SiT-XL-2|_imagenet|runs/sit )": (
    "weights of 675 million parameters; tests/conversion/test_authors.py converts tiny ones"
  ),
  r"pflow (convert|sample) .*edm2": "280 million parameters; tests/conversion/test_edm2.py has tiny ones",
  r"pflow (plan|train) .*imagenet64": "the same; tests/test_configs.py reads, traces and counts",
  r"pflow ema .*ayf_s64": "the same; an average of another run is tested beside `conversion.averages`",
  r"pflow (convert|sample) .*runs/(repa|released)": (
    "weights of REPA's teacher; tests/evaluation/test_sample.py samples a small one by the same flags"
  ),
  r"pflow (sample|convert) .*runs/student .*(--pipeline|--out student$)": "the student of FLUX.1",
  r"pflow plan .*--bytes": "the TPU compiler; tests/planning/test_operations.py lists those of a program of the CPU",
  r"pflow evaluate .*--protocol adm": (
    "weights of Inception; tests/test_imagenet_way.py and tests/evaluation/protocol evaluate with others"
  ),
  r"pflow reference ": "weights of Inception; tests/evaluation/test_references.py makes references",
  r"pflow train .*runs/repa": "latents of ImageNet; tests/test_imagenet_way.py goes the same way with digits",
  r"pflow push ": "the Hub; tests/conversion/test_push.py pushes to a stand-in",
  r"pflow sample .*gs://BUCKET": "the run of a pod",
  r"pflow latents .*/data/": "ImageNet; tests/conversion/test_latents.py and its neighbours encode a few pictures",
  r"pflow demo ": "listens until it is stopped; tests/outside/test_page.py opens it in a browser",
  r"(sbatch .*launch/slurm.sh|PROCESSES=2 launch/local.sh|launch/tpu.sh run --) .*--config": (
    "other machines, or processes; tests/test_launch.py runs the scripts"
  ),
}
# Recipes of students, by the teachers whose configs are left in place of a conversion.
STUDENTS = {"FLUX.1-dev/transformer": "flux.py:gm", "repa_imagenet.pth": "imagenet.py:gmrepa_1nfe"}
STUDENTS |= {"edm2-img64-s-1073741-0.045.pkl": "imagenet64.py:ayf_emd"}
STUDENTS |= {"edm2-img512-s-2147483-0.070.pkl": "imagenet512.py:ayf_emd"}
# Released students, by the recipes whose configs are left in place of a conversion.
RELEASED = {"gmrepa_k32_imagenet_piid_1step": "imagenet.py:gmrepa_1nfe"}
# Blocks of Python whose calls are compared with the functions' arguments, and not run, and why.
PARSED_BLOCKS = {r'pf\.convert\("FLUX': "weights of 12 billion parameters, as for the commands"}
# Runs that are made of random parameters and their config, and not trained, and why.
UNTRAINED = {
  r"pflow train .*configs/emoji": "tests/test_configs.py trains them; what is drawn from them is looked at here"
}
# Flags that a command gets beside those on the page.
FLAGS = {"pflow evaluate .*runs/emd": ["--config.sample.nfe=(1, 2)"]}
# Commands of others, which install, download or sign in.
NOT_OURS = (r"git clone ", r"hf (auth login|download)", r"tensorboard ", r"\. \.venv/bin/activate")
NOT_OURS += (r"gcloud ", r"git archive HEAD \| docker build ", r"docker push ", r"kubectl ", r"POOL=")

pytestmark = pytest.mark.usefixtures("float32")


class Shelf:
  """Runs pages, each once, in the folders of a test run.

  Attributes:
    names: what the blocks of a page have defined, by page.
    folders: where a page has run, by page.
  """

  def __init__(self, root):
    self.root, self.names, self.folders, self.env = root, {}, {}, dict(os.environ)
    self._blocks, self._commands = {}, set()

  def run(self, name):
    """Runs a page, and before it the one that it goes on with."""
    if name in self.names:
      return self.names[name]
    before = GOES_ON_WITH.get(name)
    if before:
      self.run(before)
    folder = self.folders[name] = self.folders[before] if before else self.root / name
    folder.mkdir(exist_ok=True)
    names = {"__name__": name, **prepared(name, folder)}
    (page,) = (page for page in PAGES if page.name == name)
    outputs = OUTPUT.get(name, 0)
    with pytest.MonkeyPatch.context() as patch:
      patch.chdir(folder)
      for fence in fences(page):
        if fence.language == "python":
          self._run_block(fence, names)
        elif fence.language in ("sh", "bash"):
          for words in fence.commands:
            self._run_command(words, fence.where)
        else:
          assert (fence.language, outputs > 0) == ("text", True), f"{fence.where}: no rule says how this is tested"
          outputs -= 1
    assert outputs == 0, f"{name}: fewer outputs than in OUTPUT"
    self.names[name] = names
    return names

  def _run_block(self, fence, names):
    if fence.text not in self._blocks:
      block = fence.text
      if any(re.search(pattern, block) for pattern in PARSED_BLOCKS):
        names["pf"] = pf
        check_calls(fence)
        return
      for pattern, small in SMALLER.items():
        block = re.sub(pattern, small, block)
      exec(compile(block, fence.where, "exec", dont_inherit=True), names)
      self._blocks[fence.text] = names
    names |= {key: value for key, value in self._blocks[fence.text].items() if key not in names}

  def _run_command(self, words, where):
    line = " ".join(words)
    if line in self._commands and where.startswith(tuple(GOES_ON_WITH)):
      return  # done already, in this folder
    self._commands.add(line)
    matches = lambda table: any(re.match(pattern, line) for pattern in table)
    if matches(PARSED):
      parse(words, claimed)
    elif matches(UNTRAINED):
      parse(words, write_emoji)
    elif not matches(NOT_OURS):
      assert words[0] in COMMANDS, f"{where}: no rule says how `{line}` is tested"
      more = [flag for pattern, flags in FLAGS.items() if re.match(pattern, line) for flag in flags]
      COMMANDS[words[0]](self, [*words[1:], *more])


def check_calls(fence):
  """Compares the calls of a block with the arguments of this package's functions, and of a run's methods."""
  calls = [node for node in ast.walk(ast.parse(fence.text)) if isinstance(node, ast.Call)]
  assert calls, fence.where
  for call in calls:
    assert isinstance(call.func, ast.Attribute), f"{fence.where}: no rule says how this is tested"
    own = ast.unparse(call.func.value) == "pf"
    function = getattr(pf if own else pf.Run, call.func.attr)
    given = [None] * (len(call.args) + (not own))
    inspect.signature(function).bind(*given, **{str(word.arg): None for word in call.keywords})


# ---- Commands


def pflow(shelf, args):
  """In this process, with the config's quicktest."""
  command, *flags = args
  if command == "plan":  # in a process of its own it would plan on the CPU; here are no other devices
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(planner.Slice, "devices", no_compiler)
      return run_command(programs.plan, in_checkout([*flags, "--nosampling", "--nosearch"]), source=cli._config_file)
  args = in_checkout(args, quicktest=True)
  if any(flag.startswith("--config=") for flag in args):
    args.append("--config.train.tensorboard=False")
  return cli.main(args)


def no_compiler(slice_):
  raise planner.NoCompiler("install it")


def in_checkout(args, quicktest=False):
  """Arguments with the config file of this checkout, as --config=PATH."""
  line = re.sub(r"--config (\S+)", r"--config=\1", shlex.join(args).replace("gs://", ""))
  line = re.sub(r"--config=(configs/\S+)", rf"--config={ROOT}/\1{',quicktest' * quicktest}", line)
  return shlex.split(line)


def parse(words, leave):
  """Reads flags and config of a command, and calls `leave` in place of a training or a conversion."""
  args = words[words.index("train") if "train" in words else 1 :]
  if words[:2] == ["launch/tpu.sh", "run"]:
    args = ["train", *words[words.index("--") + 1 :]]
  command, *flags = in_checkout(args)
  if command == "data":
    assert flags == ["emoji"]
    return
  function, source, joins = PROGRAMS[command]

  @functools.wraps(function)
  def read_only(**given):
    if command in ("train", "convert"):
      leave(**given)

  run_command(read_only, flags, source=source, joins=joins)


def claimed(config=None, workdir=None, source=None, out=None, base=None, **others):
  """Leaves a run with nothing but its config, which later commands read."""
  if config is not None:
    claim(workdir.lstrip("/"), Settings.of(config))  # nothing outside the folder of the test
  elif recipe := next((RELEASED[name] for name in RELEASED if source.endswith(name)), None):
    config = read_config_file(f"{ROOT}/configs/{recipe}")
    config.teacher.workdir = base
    claim(out, Settings.of(config))
  elif student := next((STUDENTS[name] for name in STUDENTS if source.endswith(name)), None):
    student = read_config_file(f"{ROOT}/configs/{student}")
    values = {"seed": 0, "model": student.model.to_dict(), "data": student.data.to_dict(), "source": {}}
    values |= {"head": {"kind": "velocity"}, "objective": {"kind": "pretrained"}}
    claim(out, Settings.of(values, converted=True))


def write_emoji(config, workdir, **others):
  """Leaves a run of random parameters on embeddings of names, as small as the config's quicktest."""
  data = config.data.to_dict()
  load_module(ROOT / "configs" / "emoji.py").quicktest(config)
  config.data = data
  assert "teacher" not in config or os.path.exists(config.teacher.workdir)
  write_random(config, workdir)


def tpu(shelf, args):
  """As it would call gcloud."""
  script = [ROOT / "launch" / "tpu.sh", "--dry-run", *args]
  run = subprocess.run(["bash", *script], env=shelf.env, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert "gcloud compute tpus" in run.stdout


def export(shelf, args):
  shelf.env |= dict(word.split("=", 1) for word in args)


def make(shelf, args):
  """Of targets and variables that the Makefile has."""
  text = (ROOT / "Makefile").read_text()
  for word in args:
    name, equals, _ = word.partition("=")
    assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", text, re.M), word


def pip(shelf, args):
  """The extras that are installed are there."""
  assert args[0] == "install"
  known = re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(), re.M)
  for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(args)):
    assert set(extra.split(",")) <= set(known), extra


def script(shelf, args):
  """Of this checkout, with flags that it has."""
  text = (ROOT / args[0]).read_text()
  assert all(f'"{flag}"' in text for flag in args if flag.startswith("--")), args


def suite(shelf, args):
  """Of tests that are there."""
  assert args[:2] == ["-m", "pytest"]
  assert all((ROOT / path).exists() for path in args[2:])


def shell(shelf, args):
  line = " ".join(word if word in (">", "|") else shlex.quote(word) for word in ["printf", *args])
  subprocess.run(["bash", "-c", line], check=True)


COMMANDS = {"pflow": pflow, "launch/tpu.sh": tpu, "export": export, "make": make, "pip": pip, "python": script}
COMMANDS |= {"printf": shell, ".venv/bin/python": suite}


def program_of(command):
  """A command's function, where its config is from, and whether processes join for it."""
  if command == "plan":
    return programs.plan, cli._config_file, False
  partial = cli.COMMANDS[command]
  return partial.args[0], partial.keywords["source"], partial.keywords["joins"]


PROGRAMS = {command: program_of(command) for command in cli.COMMANDS if command != "data"}


# ---- What blocks find


class Changed:
  """A config that a page changes: each section `data` is loaded, or its keys are checked."""

  def __setattr__(self, section, values):
    assert section == "data"
    source, _ = registry._find(values["name"])
    if values["name"].partition(":")[0] in DOWNLOADED:
      options = {key: value for key, value in values.items() if key != "name"}
      assert set(options) <= set(inspect.signature(source).parameters)
      registry.check_arguments(source, options, where=values["name"])
    else:
      assert next(pf.data.batches(pf.data.load(**values), 2, seed=0))["x0"].shape[0] == 2


def prepared(name, folder):
  """Names and files that a page's blocks find."""
  if name == "methods.md":
    return {"config": read_config_file(f"{ROOT}/configs/digits.py:ayf_emd,quicktest")}
  if name == "data.md":
    for number in range(4):
      path = folder / "flowers" / "ab"[number % 2] / f"{number}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (40, 40)).save(path)
    write_prompts(folder / "prompts", shape=(64, 64, 4))
    write_autoencoder(folder / "taesd/taef1")
    return {"config": Changed()}
  if name == "text_to_image.md":
    write_autoencoder(folder / "taesd/taef2")
  return {}


def write_autoencoder(folder):
  """Leaves a tiny autoencoder of random weights."""
  levels = dict(encoder_widths=(4, 4), encoder_depths=(1, 1), decoder_widths=(4, 4), decoder_depths=(1, 1))
  tiny = TinyAutoencoder(latent_channels=5, **levels)
  pf.Codec(tiny, tiny.init(jax.random.key(0), np.zeros((1, 2, 2, 3), np.float32))["params"]).save(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
  """Emoji are three pictures, and what embeds prompts is a stand-in without PyTorch."""

  def emoji(*, split, size, skin_tones, names, classes):
    return pf.data.from_arrays(
      np.zeros((3, 8, 8, 3), np.float32), np.arange(3), texts=("cat", "dog", "red heart"), name="emoji"
    )

  def load_encoder(model, folder, *, max_length=None, dtype=None):
    return StubEncoder(model, max_length or 12)

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry._SOURCES, "emoji", functools.wraps(registry.emoji)(emoji))
    patch.setattr(caching, "load_encoder", load_encoder)
    patch.setattr(texts, "load_encoder", load_encoder)
    yield Shelf(tmp_path_factory.mktemp("pages"))


# ---- Tests


@pytest.mark.slow
@pytest.mark.parametrize("name", [page.name for page in PAGES if fences(page) and page.name not in ELSEWHERE])
def test_a_page_runs(name, shelf):
  shelf.run(name)


def test_what_the_readme_makes_is_there(shelf):
  names, folder = shelf.run("README.md"), shelf.folders["README.md"]
  assert names["x"].shape == (16, 8, 8, 1)
  np.testing.assert_allclose(pf.load(folder / "runs/s").sample(16, labels=[3, 7], seed=1), names["x"], atol=1e-5)
  table = (folder / "runs/student/evaluation/evaluation.md").read_text()
  assert "student, 1 NFE" in table
  assert len(list((folder / "runs/student/samples").glob("*.png"))) == 1


def test_what_the_methods_make_is_there(shelf):
  names, folder = shelf.run("methods.md"), shelf.folders["methods.md"]
  assert names["x"].shape == (16, 8, 8, 1)
  assert set(names["arc"].settings.adapters.rows[0].pattern.split("|")) >= {"proj", "mlp_in"}
  assert pf.load(folder / "runs/plain").settings.adapters.table == ()
  settings = Settings.of(names["config"])
  assert (settings.teacher.weak_step, settings.sample.guidance) == (500, 1.5)


def test_a_student_of_the_page_on_pytorch_comes_back(shelf):
  names = shelf.run("pytorch.md")
  own = pf.load(shelf.folders["pytorch.md"] / "runs/s").sample(16, seed=1)
  np.testing.assert_allclose(names["x"], own, atol=1e-5)


def test_the_teacher_that_is_a_function_is_that_of_a_normal_distribution(shelf):
  """Its ODE keeps what is standard normal so, which a fine Euler walk shows."""
  names = shelf.run("teacher.md")
  assert names["loss"].shape == (16,)
  noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  end = pf.sample_teacher(names["velocity"], noise, None, steps=1000)
  np.testing.assert_allclose(end, noise, atol=5e-3)


def test_emoji_are_drawn(shelf):
  shelf.run("text_to_image.md")
  drawn = shelf.folders["text_to_image.md"] / "runs/emoji_gmflow/samples"
  with np.load(next(drawn.rglob("samples.npz"))) as arrays:
    assert arrays["x0"].shape == (4, 4, 4, 5)
  (picture, *_) = drawn.rglob("0000.png")
  assert Image.open(picture).size == (8, 8)


def test_what_another_test_executes_is_python():
  for page in PAGES:
    if page.name in ELSEWHERE:
      assert {fence.language for fence in fences(page)} == {"python"}, page
      assert page.name in (ROOT / "tests" / ELSEWHERE[page.name]).read_text()


def test_every_rule_is_for_something():
  found = [fence for page in PAGES for fence in fences(page)]
  blocks = "".join(fence.text for fence in found if fence.language == "python")
  commands = [" ".join(words) for fence in found if fence.language == "sh" for words in fence.commands]
  for pattern in (*SMALLER, *PARSED_BLOCKS):
    assert re.search(pattern, blocks), pattern
  for pattern in (*PARSED, *UNTRAINED, *FLAGS, *NOT_OURS):
    assert any(re.match(pattern, command) for command in commands), pattern


def test_a_fence_or_a_command_without_a_rule_fails(shelf, monkeypatch, tmp_path):
  page = tmp_path / "new.md"
  monkeypatch.setattr("tests.test_pages.PAGES", [page])
  for text, message in (
    ("```\npflow\n```\n", "new.md, line 1: no rule says how this is tested"),
    ("```sh\nrm -r x\n```\n", "no rule says how `rm -r x` is tested"),
    ("```python\n1 / 0\n```\n", "division by zero"),
    ("```sh\npflow compare --config configs/compare/digits.py --workdri x\n```\n", "2"),
  ):
    page.write_text(text)
    shelf.names.pop("new.md", None)
    with pytest.raises((AssertionError, ZeroDivisionError, SystemExit), match=message):
      shelf.run("new.md")


# ---- What a line names


@functools.cache
def flags_of(command):
  from absl import flags

  values = flags.FlagValues()
  function, source, joins = PROGRAMS[command]
  define_flags(function, values)
  if joins:
    define_join_flags(values)
  return {*values, *(["config"] if source is cli._config_file else []), "help"}


@functools.cache
def keys():
  """config.SECTION.KEY of the sections' classes, of all variants of all configs, and of the comparisons."""
  found = {f"{name}.{key}" for name, owner in OWNERS.items() for key in owner.__dataclass_fields__} | {"seed", "flops"}
  for path in CONFIGS:
    module = load_module(path)
    for variant in module.VARIANTS:
      values = module.get_config(variant)
      found |= {f"{name}.{key}" for name in values if hasattr(values[name], "keys") for key in values[name]}
  return {f"config.{key}" for key in found}


def unknown(span):
  """The flags and commands of a span that nobody has."""
  if not re.match(r"(pflow \w|--\w|launch/|sbatch |PROCESSES)", span):
    return []
  named = re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", span)
  if span.startswith("pflow "):
    command = span.split()[1]
    if command == "data":
      return [] if span == "pflow data emoji" else [span]
    if command not in PROGRAMS:
      return [] if command == "COMMAND" else [command]
    known = flags_of(command)
  else:
    known = {flag for command in PROGRAMS for flag in flags_of(command)}
    known |= {flag for file in ROOT.glob("launch/*.sh") for flag in re.findall(r"--([\w-]+)", file.read_text())}
    known |= {flag for file in ROOT.glob("examples/*.py") for flag in re.findall(r'"--([\w-]+)"', file.read_text())}
    known |= {"exclude"}  # of `hf download`
  return [name for name in named if name not in known | keys() and not name.startswith("config.objective.guidance")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_keys_that_a_line_names_are_there(page):
  wrong = {span: missing for span in spans(page) if (missing := unknown(span))}
  assert not wrong
  for span in spans(page):
    words = span.split()
    if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
      text = (ROOT / words[1]).read_text()
      assert all(f'"{flag}"' in text for flag in words if flag.startswith("--")), span
    if words[0] == "make" and len(words) > 1:
      make(None, words[1:])
    if re.match(r"(pflow_jax|configs|launch|tests|benchmarks|examples|docs)/\S*$", span):
      assert (ROOT / span.partition(":")[0]).exists(), span


def test_the_map_of_the_code_has_the_rooms_in_order():
  (page,) = (page for page in PAGES if page.name == "design.md")
  assert tuple(re.findall(r"^\| `(\w+)/` \|", page.read_text(), re.M)) == ROOMS


def test_what_nobody_has_is_found():
  assert unknown("pflow train --config.train.step=1") == ["config.train.step"]
  assert unknown("pflow sample --number 3") == ["number"]
  assert unknown("pflow trian --config x") == ["trian"]
  assert unknown("--config.mesh.fspd") == ["config.mesh.fspd"]
  assert unknown("pflow train --config FILE --help") == []


def test_messages_on_the_page_for_trouble_are_the_code_s():
  """Every piece of a message, between its dots, stands in a text of the package."""
  said: set[str] = set()
  for path in (ROOT / "pflow_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        said.add(" ".join(text.split()))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        said.add(" ".join(node.value.split()))
  (page,) = (page for page in PAGES if page.name == "troubleshooting.md")
  messages = [span for span in spans(page) if "..." in span or span.count(" ") > 5]
  assert len(messages) > 30
  missing = []
  for message in messages:
    pieces = [piece.strip(" '`.:") for piece in message.split("...")]
    missing += [piece for piece in pieces if piece and not any(piece in one for one in said)]
  assert not missing
