"""`launch/tpu.sh check`, against a stand-in for gcloud whose answers a test changes."""

import os
import pathlib
import signal
import subprocess

import pytest

from pflow_jax.mesh.chips import parse_topology
from tests.test_launch import Cloud, until

WHERE = ("--name=pod", "--zone=us-west4-a", "--type=v5e-16")
RUN = ("--config=configs/x.py:y z", "--config.train.steps", "5", "--workdir=gs://results/a/w", "--force")
PLAN = 'printf "%s\\0" "$@" >$STANDIN/planned; echo "  fits: peak 1.99 GiB of 15.75 GiB"'
# What asks and changes nothing, and the object that is written and removed.
HARMLESS = {"list", "describe", "get-value", "cp", "cat", "rm"}
WORKER = "123-compute@developer.gserviceaccount.com"
QUOTA = "beta quotas info list"


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  cloud.put("pflow", PLAN)
  yield cloud
  cloud.clean()


def check(cloud, *settings, code=0, run=RUN):
  """The report's lines, each with the one that mends it; nothing was changed by it."""
  calls = len(cloud.read("calls"))
  assert cloud("check", *WHERE, *settings, "--", *run) == code, cloud.out.read_text() + cloud.err.read_text()
  for call in cloud.read("calls")[calls:]:
    words = call.split("\t")
    assert HARMLESS & set(words), call
    assert not {"create", "enable", "update", "delete", "add-iam-policy-binding"} & set(words), call
  assert not list((cloud.state / "objects").glob("*"))
  report = {}
  for line in cloud.out.read_text().splitlines():
    state, _, text = line.partition(" ")
    if state:
      what, _, told = text.strip().partition(": ")
      last = (state, what, told)
      report[last] = None
    else:
      assert report[last] is None
      report[last] = text.strip()
  return report


def states(report):
  return [(state, what) for state, what, _ in report]


def test_all_is_well(cloud):
  report = check(cloud)
  assert states(report) == [
    ("ok", what)
    for what in ("account", "project", "API", "type", "runtime", "quota", "addresses", "SSH", *["bucket"] * 3, "config")
  ]
  assert (
    "ok",
    "bucket",
    f"{WORKER}, as which the workers act, writes, reads and removes objects in gs://results/a/w",
  ) in report
  assert ("ok", "config", "it parses, and fits: peak 1.99 GiB of 15.75 GiB") in report
  planned = (cloud.state / "planned").read_text().split("\0")[:-1]
  flags = ["--config=configs/x.py:y z", "--config.train.steps", "5"]
  assert planned == ["plan", *flags, "--topology=v5litepod-16", "--slices=1", "--nosampling", "--nosearch"]
  assert "nothing that could be looked at is missing" in cloud.err.read_text()
  # In a dry run the same is shown, and nothing is called.
  calls = cloud.read("calls")
  assert cloud("check", *WHERE, "--dry-run", "--", *RUN) == 0
  lines = cloud.out.read_text().splitlines()
  assert len(lines) == len(calls) + 2  # ssh-add, pflow, and gcloud's project
  for line in lines:
    subprocess.run(["bash", "-nc", line], check=True)
  assert cloud.read("calls") == calls


def error(text):
  return f"ERROR: {text}"


ABSENT = error("NOT_FOUND: Resource was not found")


@pytest.mark.parametrize(
  ("settings", "answers", "missing"),
  [
    ((), {"auth list": ""}, {"account: nobody is signed in": "gcloud auth login"}),
    ((), {"config get-value": ""}, {"project: none is set": "gcloud config set project PROJECT"}),
    (
      (),
      {"projects describe": error("Reauthentication failed")},
      {"project: ERROR: (gcloud) Reauth": "gcloud auth login"},
    ),
    (
      ("--project=q",),
      {"projects describe": error("no permission to access it")},
      {"project: ERROR: (gcloud) no permission": "gcloud projects list"},
    ),
    (
      *(("--spot", "--slices=3", "--version=v9", "--service-account=gone@p.iam.gserviceaccount.com"),),
      {
        "services list": "",
        "compute tpus tpu-vm accelerator-types describe": ABSENT,
        "compute tpus tpu-vm versions describe": ABSENT,
        QUOTA: "TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI,us-west4-a,,32,us-west4-a",
        "compute regions describe": "IN_USE_ADDRESSES,4.0,1.0",
        "storage buckets describe": "US-EAST1,region",
        "iam service-accounts describe": ABSENT,
      },
      {
        "API: tpu.googleapis.com is not enabled": "gcloud services enable tpu.googleapis.com --project=p",
        "type: us-west4-a does not offer v5litepod-16": (
          "gcloud compute tpus tpu-vm accelerator-types list --zone=us-west4-a --project=p  # what it offers"
        ),
        "runtime: us-west4-a does not offer v9": "gcloud compute tpus tpu-vm versions list --zone=us-west4-a",
        "quota: TPUV5sPreemptibleLitepod allows 32 in us-west4-a, and 48 are needed": (
          "gcloud beta quotas preferences create --service=tpu.googleapis.com --project=p"
          " --quota-id=TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI --preferred-value=48"
          " --dimensions=zone=us-west4-a"
        ),
        "addresses: us-west4 has 3 external ones left, the workers take 12": "--internal-ips (with a Cloud NAT), or",
        "service account: there is no gone@p.iam.gserviceaccount.com": "gcloud iam service-accounts create gone",
        "bucket: gs://results is in US-EAST1 (region), the TPU in us-west4: what it reads costs money and time": (
          "another --zone, or: gcloud storage buckets create gs://NEW --location=us-west4"
        ),
      },
    ),
    (
      *(("--type=v5e-8", "--internal-ips", "--scopes=logging.write"),),
      {
        QUOTA: "TPUV5sLitepodServingPerProjectPerZoneForTPUAPI,,,4,us-west4-a;us-east1-d",
        "compute routers list": "default,0\nother,1",
        "storage buckets describe": error("gs://results not found: 404."),
        "storage cp": error("gs://results not found: 404."),
      },
      {
        "quota: TPUV5sLitepodServing allows 4 in us-west4-a, and 8 are needed": "gcloud beta quotas preferences create",
        "NAT: the network default has none in us-west4, and without one nothing is installed on the workers": (
          "gcloud compute routers create pflow --network=default --region=us-west4 --project=p && gcloud compute"
          " routers nats create pflow --router=pflow --region=us-west4 --project=p --auto-allocate-nat-external-ips"
          " --nat-all-subnet-ip-ranges  # costs by the hour"
        ),
        "scopes: with these the workers cannot write to buckets": "--scopes=cloud-platform, or none",
        "bucket: there is no gs://results": "gcloud storage buckets create gs://results --location=us-west4",
      },
    ),
    (
      *(("--internal-ips", "--network=projects/host/global/networks/net", "--subnetwork=regions/r/subnetworks/sub"),),
      {"compute routers list": "net,2", "compute networks subnets describe": "False"},
      {
        "Private Google Access: the subnetwork sub in us-west4 does not have it": (
          "gcloud compute networks subnets update sub --region=us-west4 --project=host"
          " --enable-private-ip-google-access"
        )
      },
    ),
  ],
)
def test_all_that_is_missing_is_told_with_the_command_that_mends_it(cloud, settings, answers, missing):
  for command, answer in answers.items():
    cloud.write(f"answers/{command}", answer)
  report = check(cloud, *settings, code=1)
  found = {f"{what}: {text}": mend for (state, what, text), mend in report.items() if state == "missing"}
  assert len(found) == len(missing)
  for (told, mend), (start, remedy) in zip(found.items(), missing.items(), strict=True):
    assert told.startswith(start)
    assert mend.startswith(remedy)
    if mend.startswith("gcloud"):
      subprocess.run(["bash", "-nc", mend], check=True)
  assert f"launch/tpu.sh: {len(missing)} missing; below each is what mends it" in cloud.err.read_text()


@pytest.mark.parametrize(
  ("settings", "answers", "unknown"),
  [
    (
      (),
      {
        "services list": error("PERMISSION_DENIED"),
        "compute tpus tpu-vm accelerator-types describe": error("PERMISSION_DENIED: or it may not exist"),
        QUOTA: error("Cloud Quotas API has not been used"),
        "compute regions describe": "CPUS,1.0,0.0",
        "storage buckets describe": error("HTTPError 403: no storage.buckets.get"),
      },
      {
        **{"API": None, "type": None, "quota": "gcloud services enable cloudquotas.googleapis.com --project=p"},
        **{"addresses": "https://console", "bucket": "gcloud storage buckets add-iam-policy-binding gs://results"},
      },
    ),
    (("--reserved",), {}, {"quota": "https://console.cloud.google.com/iam-admin/quotas?project=p"}),
    (
      ("--internal-ips",),
      {
        QUOTA: "TPUV9PerProjectPerZoneForTPUAPI,,,4,us-west4-a",
        "compute routers list": error("PERMISSION_DENIED"),
        "compute networks subnets describe": ABSENT,
      },
      {"quota": "https://console", "NAT": None, "Private Google Access": None},
    ),
  ],
)
def test_what_gcloud_does_not_tell_is_said_and_is_no_failure(cloud, settings, answers, unknown):
  for command, answer in answers.items():
    cloud.write(f"answers/{command}", answer)
  report = check(cloud, *settings)
  found = {what: mend for (state, what, _), mend in report.items() if state == "unknown"}
  assert list(found) == list(unknown)
  for what, remedy in unknown.items():
    assert found[what] is None if remedy is None else found[what].startswith(remedy)


@pytest.mark.parametrize("verb", ["cp", "cat", "rm"])
def test_the_bucket_is_tried_by_you_and_by_the_workers(cloud, verb):
  worker = "runs@p.iam.gserviceaccount.com"
  cloud.write("forbidden", f"you {verb}")
  if verb == "rm":  # what cannot be removed stays
    assert cloud("check", *WHERE, "--", *RUN) == 1
    assert len(list((cloud.state / "objects").iterdir())) == 1
    return
  report = check(cloud, f"--service-account={worker}", code=1)
  (mend,) = [mend for (state, _, _), mend in report.items() if state == "missing"]
  assert mend.endswith("gs://results --member=user:you@example.com --role=roles/storage.objectAdmin")
  cloud.write("forbidden", f"{worker} {verb}")
  report = check(cloud, f"--service-account={worker}", code=1)
  (mend,) = [mend for (state, _, _), mend in report.items() if state == "missing"]
  assert mend.endswith(f"gs://results --member=serviceAccount:{worker} --role=roles/storage.objectAdmin")
  assert ("ok", "service account") in states(report)


def test_workers_in_whose_name_nobody_may_act_are_not_taken_for_forbidden(cloud):
  fail = "echo 'ERROR: PERMISSION_DENIED: Failed to impersonate [x]' >&2; exit 1"
  cloud.put("gcloud", f"if [[ $* == *impersonate* ]]; then {fail}; fi; {(cloud.bin / 'gcloud').read_text()}")
  report = check(cloud)
  (mend,) = [mend for (state, _, _), mend in report.items() if state == "unknown"]
  assert mend.startswith(f"gcloud iam service-accounts add-iam-policy-binding {WORKER} --member=user:you@example.com")


def test_an_interrupt_leaves_no_object_behind(cloud):
  stand_in = (cloud.bin / "gcloud").read_text()
  cloud.put("gcloud", f'if [[ "$1 $2" == "storage cat" ]]; then >$STANDIN/asked; sleep 40; fi; {stand_in}')
  script = cloud.start("tpu.sh", "check", *WHERE, "--", *RUN)
  until((cloud.state / "asked").exists)
  assert len(list((cloud.state / "objects").iterdir())) == 1
  os.killpg(script.pid, signal.SIGINT)
  assert script.wait(timeout=20) == 130
  assert not list((cloud.state / "objects").iterdir())


def test_every_bucket_of_the_run_is_looked_at_and_its_results_tried(cloud):
  run = (
    "evaluate",
    "--workdir",
    "gs://teachers/t",
    "--out=gs://results/e",
    "--also=gs://teachers/u",
    "--x=[gs://data-1/z]",
  )
  check(cloud, run=run)
  described = [call.split("\t")[3] for call in cloud.read("calls") if "\tbuckets\tdescribe\t" in call]
  assert described == ["gs://teachers", "gs://results", "gs://data-1"]
  written = {call.split("\t")[3].rpartition("/")[0] for call in cloud.read("calls") if call.startswith("storage\tcp")}
  assert written == {"gs://results/e"}
  assert not (cloud.state / "planned").exists()


def test_folders_that_not_all_workers_see_are_found_before_the_tpu_is_made(cloud):
  report = check(cloud, code=1, run=("latents", "--images=x", "--out=/data/z"))
  assert ("missing", "folders") in states(report)
  assert ("missing", "folders") in states(check(cloud, code=1, run=("--config=c",)))
  report = check(cloud, "--prepare=mount /data", run=("latents", "--images=/data/x", "--out=/data/z"))
  assert ("unknown", "data") in states(report)
  assert "unknown" in cloud.err.read_text()
  report = check(cloud, "--prepare=mount /data", code=1, run=("latents", "--images=/data/x", "--out=gs://b/z"))
  told = next(told for state, what, told in report if (state, what) == ("missing", "folders"))
  assert told.startswith("--out=gs://b/z: latents are written to a file system")


@pytest.mark.parametrize(
  ("prepare", "bucket"),
  [
    ("mountpoint -q /data || { sudo install -d -o $USER /data && gcsfuse --implicit-dirs results /data; }", "results"),
    ("sudo apt install -y gcsfuse; gcsfuse -o allow_other 'my-data' ~/data", "my-data"),
    ("/usr/bin/gcsfuse\tb.c_1 data", "b.c_1"),
    ("gcsfuse /data", ""),
    ("gcsfuse --implicit-dirs $BUCKET /data", ""),
    ("mount server:/data /data", ""),
  ],
)
def test_the_bucket_that_is_mounted_is_tried_too(cloud, prepare, bucket):
  run = ("--config=c", "--workdir=gs://results/w")
  report = check(cloud, f"--prepare={prepare}", run=run)
  assert (("unknown", "data") in states(report)) == (not bucket)
  described = [call.split("\t")[3] for call in cloud.read("calls") if "\tbuckets\tdescribe\t" in call]
  assert described == ["gs://results", *([f"gs://{bucket}"] if bucket not in ("", "results") else [])]
  written = {call.split("\t")[3].rpartition("/")[0] for call in cloud.read("calls") if call.startswith("storage\tcp")}
  assert written == {"gs://results/w", *([f"gs://{bucket}"] if bucket not in ("", "results") else [])}


@pytest.mark.parametrize(("there", "state"), [(False, "missing"), (True, "unknown")])
def test_data_on_a_disk_that_nothing_brings_to_the_workers_is_told(cloud, there, state):
  cloud.put("pflow", 'echo "data latents:/data/imagenet256"; echo "  fits: peak 1 GiB of 15.75 GiB"')
  if there:
    cloud.write("tpus/pod", "READY")
  report = check(cloud, code=int(not there))
  (told,) = [told for found, what, told in report if (found, what) == (state, "data")]
  assert "/data/imagenet256, of the config, is" in told
  cloud.put("pflow", 'echo "data tfds:mnist"; echo "  fits: peak 1 GiB of 15.75 GiB"')
  assert not [what for _, what, _ in check(cloud) if what == "data"]


@pytest.mark.parametrize(
  ("pflow", "state", "told"),
  [
    ('echo "pflow: the config has no key steeps" >&2; exit 2', "missing", "pflow: the config has no key steeps"),
    ('echo "  DOES NOT FIT: peak 99 GiB of 15 GiB"', "missing", "it parses, and DOES NOT FIT: peak 99 GiB of 15 GiB"),
    ('echo "no compiler: install it"', "unknown", "it parses; whether it fits, only the compiler knows"),
    ('echo "out of memory" >&2; exit 1', "unknown", "out of memory"),
  ],
)
def test_the_plan_tells_what_is_wrong_with_the_config(cloud, pflow, state, told):
  cloud.put("pflow", pflow)
  assert (state, "config", told) in check(cloud, code=int(state == "missing"))


def test_without_gcloud_an_account_or_flags_the_rest_is_unknown(cloud, tmp_path):
  cloud.write("answers/auth list", "")
  report = check(cloud, code=1)
  assert states(report)[:2] == [
    ("missing", "account"),
    ("unknown", "the rest, before gcloud has an account and a project"),
  ]
  assert len(cloud.read("calls")) == 1
  assert ("ok", "config") in states(report)
  cloud.write("answers/auth list", "you@example.com")
  assert cloud("check", *WHERE) == 0
  assert "unknown  run: without its flags" in cloud.out.read_text()
  cloud.write("agent", "1")
  assert ("missing", "SSH") in states(check(cloud, code=1))
  check(cloud, "--type=v5e-8", run=("--workdir=gs://results/w",))  # one worker needs no agent
  (cloud.bin / "gcloud").unlink()
  path = f"{cloud.bin}:/bin" if not pathlib.Path("/bin/gcloud").exists() else without_gcloud(tmp_path, cloud)
  assert cloud("check", *WHERE, "--", *RUN, PATH=path) == 1
  assert cloud.out.read_text().startswith("missing  gcloud: it is not installed\n")


def without_gcloud(folder, cloud):
  """A search path with the machine's programs but that one."""
  tools = folder / "tools"
  tools.mkdir()
  for tool in ("bash", "env", "dirname", "mktemp", "rm", "sed", "grep", "tail", "awk", "git"):
    (tools / tool).symlink_to(f"/usr/bin/{tool}")
  return f"{cloud.bin}:{tools}"


@pytest.mark.parametrize(
  "answer", ["HOSTILE", "IN_USE_ADDRESSES,HOSTILE,1", "default,HOSTILE", "ERROR: HOSTILE\nok all: well"]
)
def test_answers_are_neither_computed_with_nor_do_they_steer_the_terminal(cloud, tmp_path, answer):
  canary = tmp_path / "canary"
  answer = answer.replace("HOSTILE", f"a[$(>{canary})]\x1b[2J")
  for command in (
    *("services list", QUOTA, "compute regions describe", "compute routers list", "compute networks subnets describe"),
    *("storage buckets describe", "projects describe" if answer[0] != "E" else "storage cp"),
  ):
    cloud.write(f"answers/{command}", answer)
  for setting in ("--internal-ips", "--spot"):
    cloud("check", *WHERE, setting, "--", *RUN)
    said = cloud.out.read_text() + cloud.err.read_text()
    assert "?[2J" in said
    assert not canary.exists()
    assert "\x1b" not in said
    assert "\nok all: well" not in said


def sourced(script, text):
  """What bash prints after reading launch/check.sh."""
  root = pathlib.Path(__file__).parents[1]
  lines = "dry=0 zone=us-west4-a region=us-west4; words() { :; }; source launch/settings.sh; source launch/check.sh"
  lines += f"; {script}"
  return subprocess.run(["bash", "-c", lines], input=text, cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
  ("lines", "limit"),
  [
    ((), ""),
    (("QPerProjectPerZoneForTPUAPI,,,16,us-east1-d;us-west4-a",), "16"),
    (("QPerProjectPerZoneForTPUAPI,,,16,us-east1-d;us-west4-ab",), ""),
    # A zone's own line goes before the one for all; without a number it is 0.
    (("QPerProjectPerZoneForTPUAPI,,,16,us-west4-a", "QPerProjectPerZoneForTPUAPI,us-west4-a,,64,us-west4-a"), "64"),
    (("QPerProjectPerZoneForTPUAPI,us-west4-a,,,us-west4-a", "QPerProjectPerZoneForTPUAPI,,,16,us-west4-a"), "0"),
    # The region's is one more limit; -1 is none.
    (("QPerProjectPerZoneForTPUAPI,,,16,us-west4-a", "QPerProjectPerRegionForTPUAPI,,us-west4,8,us-west4"), "8"),
    (("QPerProjectPerZoneForTPUAPI,,,16,us-west4-a", "QPerProjectPerRegionForTPUAPI,,,-1,us-west4"), "16"),
    (("QPerProjectPerZoneForTPUAPI,,,-1,us-west4-a",), "999999999"),
    # Another quota, a region in place of a zone, what is no number.
    (("QPreemptiblePerProjectPerZoneForTPUAPI,,,16,us-west4-a",), ""),
    (("QPerProjectPerRegionForTPUAPI,,us-west1,8,us-west1",), ""),
    (("QPerProjectPerZoneForTPUAPI,,,many,us-west4-a",), ""),
  ],
)
def test_the_limit_of_a_quota(lines, limit):
  assert sourced("limit Q", "".join(f"{line}\n" for line in lines)).strip() == limit


def test_machines_of_a_slice_have_four_chips_each():
  types = [
    *("v5litepod-1", "v5litepod-8", "v5litepod-16", "v5litepod-256", "v6e-4", "v6e-8", "v6e-64"),
    *("v3-8", "v3-32", "v4-8", "v4-64", "v5p-8", "v5p-128", "v5p-12288"),
  ]
  found = sourced(f"for type in {' '.join(types)}; do machines; done", "").split()
  for type, count in zip(types, map(int, found), strict=True):
    chips = parse_topology(type)[2]
    whole_hosts = type.startswith(("v5litepod", "v6e")) and chips <= 8
    assert count == (1 if whole_hosts else max(1, chips // 4)), type


def test_a_bucket_is_near_in_its_region_and_on_its_continent():
  near = {"US": True, "NAM4": True, "US-WEST4": True, "EU": False, "ASIA": False, "EUR4": False, "NAM": False}
  near |= {"US-WEST1": False, "us:*": False, "": False}
  script = "ask() { answer=$line; }; while read -r line; do check_place b; done"
  told = [line for line in sourced(script, "".join(f"{name},kind\n" for name in near)).splitlines() if line[0] != " "]
  assert [line.split()[0] for line in told] == ["ok" if one else "missing" for one in near.values()]
