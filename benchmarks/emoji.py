"""Emoji: trains the teachers and students of configs/emoji.py, draws their picture and measures them.

    python benchmarks/emoji.py --folder runs/emoji --autoencoder taesd/taef2

Runs that are complete are not repeated. The folder gets emoji_known.png and emoji_new.png (prompts that are in the set,
and that are not: the nearest training picture, the teacher and its students from the same noise), table.md, and
seconds.json, what every run took.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

import pflow_jax as pf
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.features import train_classifier
from pflow_jax.evaluation.metrics import frechet_distance
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.samplers import student_samplers, velocity_samplers
from pflow_jax.evaluation.tables import markdown_table
from pflow_jax.families.text import load_encoder
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.sample import sample_keys

ROOT = pathlib.Path(__file__).parents[1]
SAMPLES = 512  # of every sampler in the table
STUDENTS = {"gmflow": 1, "gmflow_2nfe": 2, "gmflow_4nfe": 4}
KNOWN = (
  *("red apple", "heart", "panda face", "cat face", "pizza", "soccer ball", "automobile", "penguin"),
  *("octopus", "rocket", "watermelon", "guitar", "honeybee", "frog face", "crown", "rainbow"),
)
NEW = (
  *("a purple apple", "a pink heart with stars", "a brown bear", "an angry orange cat", "a slice of cheese pizza"),
  *("a blue ball", "a yellow sports car", "a bird in the snow", "a green fish", "a red spaceship"),
  *("half a lemon", "a violin on fire", "a black and yellow beetle", "a smiling turtle", "a golden ring"),
  "sunset over the sea",
)


def pflow(*args):
  start = time.time()
  command = [sys.executable, "-m", "pflow_jax", *map(str, args)]
  subprocess.run(command, check=True, cwd=ROOT)
  return time.time() - start


def prepare(folder, autoencoder):
  """Writes the latents and the embeddings of the names."""
  options = ["size=64", "skin_tones=false", "names=all", "classes=picture"]
  latents, names = folder / "latents", folder / "names"
  if not (latents / "info.json").exists():
    flags = [word for option in options for word in ("--option", option)]
    pflow("latents", "--images", "emoji", *flags, "--autoencoder", autoencoder, "--out", latents)
  pflow("cache", "--prompts", f"data:latents:{latents}", "--model", "minilm", "--out", names)
  return latents, names


def train(folder, latents, names, seeds, flags):
  """Trains what is missing; returns the workdirs of students by teacher's name, and adds to the seconds."""
  log = folder / "seconds.json"
  seconds = json.loads(log.read_text()) if log.exists() else {}
  students = {}
  for prefix in ("", "classes_"):
    data = [f"--config.data.name=latents:{latents}", *([f"--config.data.embeddings={names}"] if not prefix else [])]
    teacher = folder / f"{prefix}teacher"
    runs = [(f"{prefix}teacher", teacher, [])]
    for variant in STUDENTS:
      for seed in seeds if variant == "gmflow" and not prefix else seeds[:1]:
        own = folder / (f"{prefix}{variant}" + (f"_seed{seed}" if seed != seeds[0] else ""))
        runs.append((f"{prefix}{variant}", own, [f"--config.seed={seed}", f"--config.teacher.workdir={teacher}"]))
    for variant, workdir, own in runs:
      if workdir.name not in seconds:
        config = f"--config={ROOT}/configs/emoji.py:{variant}"
        seconds[workdir.name] = pflow("train", config, "--workdir", workdir, *data, *own, *flags)
        log.write_text(json.dumps(seconds, indent=2) + "\n")
    students[teacher.name] = [workdir for _, workdir, _ in runs[1:]]
  return students, seconds


def picture(folder):
  """Draws emoji_known.png and emoji_new.png: rows of samplers, columns of prompts, one noise a column."""
  prompts = [*KNOWN, *NEW]
  cond = {"pooled": load_encoder("minilm").encode(prompts)["pooled"]}
  keys = sample_keys(len(prompts), 1)
  rows = {}
  for variant in reversed(STUDENTS):
    run = pf.load(folder / variant)
    experiment = build(run.settings)
    data, layout = experiment.dataset, layout_of(run.settings)
    noise = np.asarray(jax.random.normal(jax.random.key(1), (len(prompts), *data.shape)))
    samplers = student_samplers(experiment.method, run.settings.sample, run.params)
    if not rows:
      frozen = experiment.load_frozen(layout)
      steps = pf.EvaluateSettings(teacher_steps=(128, 4))
      samplers = [*velocity_samplers(experiment.method, experiment.teacher.velocity, frozen, steps), *samplers]
    rows |= {one.name: np.asarray(one.run(noise, cond, keys)) for one in samplers}
  assert set(KNOWN) <= set(data.texts), set(KNOWN) - set(data.texts)
  assert not set(NEW) & set(data.texts)
  latents = data.records.x0.reshape(len(data.texts), -1)
  near = rows["teacher, 128 steps"].reshape(len(prompts), -1)
  distance = (latents**2).sum(axis=1) - 2 * near @ latents.T
  rows = {"nearest training picture": data.records.x0[distance.argmin(axis=1)]} | rows
  rows = {name: as_pictures(data, x) for name, x in rows.items()}
  np.savez(folder / "picture.npz", prompts=np.array(prompts), **rows)
  for name, title, part in (
    ("known", "Prompts that are in the set", slice(0, len(KNOWN))),
    ("new", "Prompts that are not in the set", slice(len(KNOWN), None)),
  ):
    cut = {row: x[part] for row, x in rows.items()}
    figure = figures.image_grid(cut, column_labels=prompts[part], title=title, scale=2)
    figures.save(figure, folder / f"emoji_{name}.png")


def table(folder, students):
  """Writes table.md: alignment, Fréchet distance in features of ten categories, and diversity."""
  categories = pf.data.load("emoji", size=64, skin_tones=False, names="all")
  rows = []
  for teacher, workdirs in students.items():
    found = {}
    for workdir in workdirs:
      run = pf.load(workdir)
      report = run.evaluate(num_samples=SAMPLES)
      x0 = pf.data.load(**run.settings.data).records.take(np.arange(len(categories.texts)))["x0"]
      classifier = train_classifier(x0, categories.records.label, categories.num_classes, steps=600)
      distance = {name: frechet_distance(*map(classifier.features, (x, x0))) for name, x in report.samples.items()}
      reference = next(name for name in report.samples if "128" in name)
      for row in report.rows:
        name = row["name"] if row["name"].startswith("teacher") else workdir.name.partition("_seed")[0]
        values = [row.get("alignment_ratio", (np.nan,))[0], distance[row["name"]] / distance[reference]]
        values += [np.ravel(row["diversity_ratio"])[0]]
        found.setdefault((name, row["nfe"]), []).append(values)
    for (name, nfe), values in found.items():
      values = np.array(values) if not name.startswith("teacher") else np.array(values)[:1]
      mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else [None] * 3
      entry = {"teacher": teacher, "sampler": name, "NFE": nfe, "seeds": len(values)}
      for key, value, error in zip(("alignment", "FD", "diversity"), mean, spread, strict=True):
        entry[key] = None if np.isnan(value) else (value, error) if error is not None else value
      rows.append(entry)
  text = markdown_table(rows)
  (folder / "table.md").write_text(text)
  print(text)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "emoji")
  parser.add_argument("--autoencoder", default="taesd/taef2")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("flags", nargs="*", help="passed to every training, after --: --config.train.tensorboard=False")
  args = parser.parse_args()
  folder = args.folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  latents, names = prepare(folder, args.autoencoder)
  students, seconds = train(folder, latents, names, args.seeds, args.flags)
  picture(folder)
  table(folder, students)
  print(
    f"{sum(seconds.values()) / 3600:.2f} h: " + ", ".join(f"{name} {s / 60:.1f} min" for name, s in seconds.items())
  )


if __name__ == "__main__":
  main()
