"""launch/gke.yaml and launch/Dockerfile, as far as they can be looked at without a cluster."""

import functools
import pathlib
import re

import yaml

from pflow_jax.commands import cli, programs
from pflow_jax.commands.command import run_command
from pflow_jax.mesh.chips import parse_topology

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "launch" / "gke.yaml").read_text()


def parts():
  """The JobSet's specification, its job's, its pod's and the container."""
  jobset = yaml.safe_load(TEXT)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (group,) = jobset["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  return jobset["spec"], job, pod, container


def test_hosts_chips_and_topology_fit_together():
  spec, job, pod, container = parts()
  chip = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert parse_topology(f"{chip}:{topology}")[2] == job["parallelism"] * chips
  assert job["completions"] == job["parallelism"]
  assert spec["replicatedJobs"][0]["replicas"] == 1


def test_what_fails_is_started_again_but_for_a_mistake():
  spec, job, pod, container = parts()
  assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
  assert spec["failurePolicy"]["maxRestarts"] == 10
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
  assert (rule["action"], spec["failurePolicy"]["rules"][0]["action"]) == ("FailJob", "FailJobSet")
  assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_its_command_is_one_of_pflow_and_finds_its_data(monkeypatch):
  _, _, pod, container = parts()
  monkeypatch.chdir(ROOT)
  seen = {}

  @functools.wraps(programs.train)
  def train(**given):
    seen.update(given)

  assert container["command"][:2] == ["pflow", "train"]
  run_command(train, container["command"][2:], source=cli._config_file)
  assert seen["workdir"].startswith("gs://BUCKET/")
  assert seen["config"].teacher.workdir.startswith("gs://BUCKET/")
  (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
  assert mount["name"] == volume["name"]
  assert seen["config"].data.name.partition(":")[2].startswith(f"{mount['mountPath']}/")
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "BUCKET"


def test_what_is_to_be_filled_in_is_named():
  comment, _, rest = TEXT.partition("apiVersion")
  assert "It has not been run" in comment
  named = re.search(r"To fill in: (.*?)\.", comment, re.S)[1]
  for word in set(re.findall(r"\b[A-Z]{4,}\b", re.sub(r"#.*", "", rest))):
    assert word in named, word


def test_the_image_has_what_the_workers_of_a_tpu_have():
  image = (ROOT / "launch" / "Dockerfile").read_text()
  worker = (ROOT / "launch" / "tpu_worker.sh").read_text()
  for line in re.findall(r'"\$\{pip\[@\]\}" (install --no-deps.*)', worker):
    same = line.replace('"$lock"', "launch/requirements-tpu.txt").replace("editable src", "editable .")
    assert same.removeprefix("install ") in image, line
  assert "FROM python:3.11" in image
  assert "sys.version_info[:2] != (3, 11)" in worker
