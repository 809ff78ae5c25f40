"""Stands in for gcloud: keeps TPUs as files, and runs what is sent to a worker on this machine.

All is in the folder $STANDIN:
  calls             the arguments of every call, with tabs between
  tpus/NAME         state of a TPU; queued/NAME: of a queued resource, with the names of its TPUs in queued/NAME.nodes
  homes/NAME-w-I    home of worker I, which is gone after a deletion
  workers           workers of a TPU; default 2
  objects/          what is in buckets, a file each
What it answers to other questions than those about TPUs, which is that all is well:
  answers/COMMAND   instead of that, the first word of which is "ERROR:" if it fails
  forbidden         accounts and what they may not do, "WHO cp", a line each
To be told what happens next, a line a time:
  states            states that a queued resource goes through, one at each look
  errors            messages that creations fail with
  unreachable       workers that ssh does not reach
"""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
STATE = pathlib.Path(os.environ["STANDIN"])
# What the commands take, from their reference; the first line is of all commands.
ANY = {"project", "format", "flatten", "filter", "quiet", "impersonate-service-account"}
CREATE = {"zone", "accelerator-type", "spot", "reserved", "network", "subnetwork", "internal-ips", "async"}
CREATE |= {"service-account", "scopes", "labels"}
TPUS = {
  "tpu-vm create": CREATE | {"version", "preemptible"},
  "tpu-vm describe": {"zone"},
  "tpu-vm delete": {"zone", "async"},
  "tpu-vm ssh": {"zone", "worker", "command", "internal-ip", "ssh-flag"},
  "tpu-vm scp": {"zone", "worker", "internal-ip", "recurse"},
  "queued-resources create": CREATE | {"runtime-version", "node-id", "node-count", "node-prefix", "guaranteed"},
  "queued-resources describe": {"zone"},
  "queued-resources delete": {"zone", "async", "force"},
}
ALPHA = {"tpu-vm ssh": {"tunnel-through-iap"}, "tpu-vm scp": {"tunnel-through-iap"}}
# Commands that `check` calls, what they take, and what they answer where all is well.
QUOTAS = (("V6E", ""), ("V6EPreemptible", ""), ("V5s", "Litepod"), ("V5sPreemptible", "Litepod"))
OTHERS = {
  "auth list": (set(), "you@example.com"),
  "config get-value": (set(), "p"),
  "projects describe": (set(), "123"),
  "services list": ({"enabled"}, "tpu.googleapis.com"),
  "compute tpus tpu-vm accelerator-types describe": ({"zone"}, "projects/p/locations/z/acceleratorTypes/x"),
  "compute tpus tpu-vm versions describe": ({"zone"}, "projects/p/locations/z/runtimeVersions/x"),
  "beta quotas info list": (
    {"service"},
    "\n".join(f"TPU{kind}{rest}PerProjectPerZoneForTPUAPI,,,256,us-west4-a;us-east1-d" for kind, rest in QUOTAS),
  ),
  "compute regions describe": (set(), "CPUS,24.0,0.0\nIN_USE_ADDRESSES,72.0,1.0\nINSTANCES,8.0,0.0"),
  "compute routers list": ({"regions"}, "other,0\ndefault,1"),
  "compute networks subnets describe": ({"region"}, "True"),
  "storage buckets describe": (set(), "US-WEST4,region"),
  "storage cp": (set(), None),
  "storage cat": (set(), None),
  "storage rm": (set(), None),
  "iam service-accounts describe": (set(), "an@account"),
}


def fail(message, code=1):
  print(f"ERROR: (gcloud) {message}", file=sys.stderr)
  sys.exit(code)


def read(path, default=None):
  path = STATE / path
  return path.read_text().strip() if path.exists() else default


def write(path, text):
  path = STATE / path
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text + "\n")


def pop(path):
  """The first line of a file, which is removed from it."""
  lines = (read(path) or "").splitlines()
  if lines:
    write(path, "\n".join(lines[1:]))
  return lines[0] if lines else None


def remove(node):
  import shutil  # here and below: most calls are quicker without

  (STATE / "tpus" / node).unlink(missing_ok=True)
  for home in STATE.glob(f"homes/{node}-w-*"):
    shutil.rmtree(home)


def workers(node, which):
  if read(f"tpus/{node}") is None:
    fail(f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{node}' was not found")
  if (state := read(f"tpus/{node}")) != "READY":
    fail(f"TPU is in unusable state {state}")
  hosts = [f"{node}-w-{i}" for i in range(int(read("workers", "2")))]
  for host in hosts:
    (STATE / "homes" / host).mkdir(parents=True, exist_ok=True)
  return hosts if which == "all" else [hosts[int(which)]]


def create(kind, name, flags):
  if error := pop("errors"):
    fail(error)
  if read(f"{'tpus' if kind == 'tpu-vm' else 'queued'}/{name}") is not None:
    fail(f"ALREADY_EXISTS: {name}", 1)
  if kind == "tpu-vm":
    write(f"tpus/{name}", "READY")
    return
  count = int(flags.get("node-count", 0))
  nodes = [f"{flags['node-prefix']}-{i}" for i in range(count)] if count else [flags["node-id"]]
  write(f"queued/{name}", "ACCEPTED")
  write(f"queued/{name}.nodes", "\n".join(nodes))


def describe(kind, name, flags):
  if kind == "tpu-vm":
    state = read(f"tpus/{name}")
  else:
    state = read(f"queued/{name}")
    if state is not None and (follows := pop("states")):
      state = follows
      write(f"queued/{name}", state)
    if state == "ACCEPTED" and not read("states"):
      state = "ACTIVE"
      write(f"queued/{name}", state)
    for node in read(f"queued/{name}.nodes", "").split():
      if state == "ACTIVE" and read(f"tpus/{node}") is None:
        write(f"tpus/{node}", "READY")
  if state is None:
    fail(f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found")
  answers = {
    "value(name)": name,
    "value(state)" if kind == "tpu-vm" else "value(state.state)": state,
    "value(networkEndpoints.len())": read("workers", "2"),
    "value(state.failedData.error.message)": "no capacity before the deadline" if state == "FAILED" else "",
  }
  print(answers[flags["format"]])


def delete(kind, name, flags):
  if kind == "tpu-vm":
    if read(f"tpus/{name}") is None:
      fail(f"NOT_FOUND: {name}")
    remove(name)
    return
  nodes = read(f"queued/{name}.nodes", "").split()
  if read(f"queued/{name}") == "SUSPENDING":
    fail(f"queued resource {name} is busy")
  if any(read(f"tpus/{node}") for node in nodes) and "force" not in flags:
    fail(f"queued resource {name} has nodes")
  for node in nodes:
    remove(node)
  (STATE / "queued" / name).unlink()
  (STATE / "queued" / f"{name}.nodes").unlink()


def ssh(node, flags):
  import subprocess

  running = []
  for host in workers(node, flags["worker"]):
    if host in read("unreachable", "").split():
      running.append((host, None))
      continue
    environment = os.environ | {
      "HOME": str(STATE / "homes" / host),
      "PATH": f"{HERE / 'worker'}:{os.environ['PATH']}",
      "STANDIN_HOST": host,
    }
    command = ["bash", "-c", flags["command"]]
    process = subprocess.Popen(command, env=environment, cwd=environment["HOME"], stdin=subprocess.DEVNULL)
    running.append((host, process))
  codes = [255 if process is None else process.wait() for _, process in running]
  for code, (host, _) in zip(codes, running, strict=True):
    if code:
      print(f"##### Command execution on worker {host} failed with exit status {code}.", file=sys.stderr)
  sys.exit(next((code for code in codes if code), 0))


def scp(source, target, flags):
  import shutil

  node, path = target.split(":")
  for host in workers(node, flags["worker"]):
    shutil.copy(source, STATE / "homes" / host / path)


def store(verb, names, flags):
  """Copies, prints or removes an object in a bucket."""
  who = flags.get("impersonate-service-account", "you")
  if f"{who} {verb}" in read("forbidden", "").splitlines():
    fail(f"HTTPError 403: {who} does not have storage.objects access. Permission denied (or it may not exist).")
  path = STATE / "objects" / names[-1].replace("/", "%")
  if verb == "cp":
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pathlib.Path(names[0]).read_bytes())
  elif not path.exists():
    fail(f"The following URLs matched no objects or files: {names[-1]}")
  elif verb == "cat":
    print(path.read_text(), end="")
  else:
    path.unlink()


def other(command, names, flags):
  """Answers a question about something else than TPUs."""
  answer = read(f"answers/{command}", OTHERS[command][1])
  if answer is not None and answer.startswith("ERROR:"):
    fail(answer[7:])
  if command.startswith("storage ") and answer is None:
    store(command[8:], names, flags)
  elif answer:
    print(answer)


def split(words):
  """A command, the words after it that are no flags, and its flags."""
  count = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
  known = (i for i in range(count, 0, -1) if " ".join(words[:i]) in OTHERS)
  size = next(known, 5 if words[0] == "alpha" else 4)
  rest = words[size:]
  names = [word for word in rest if not word.startswith("--")]
  flags = dict(word[2:].split("=", 1) if "=" in word else (word[2:], "") for word in rest if word.startswith("--"))
  return words[:size], names, flags


def main():
  with (STATE / "calls").open("a") as calls:
    calls.write("\t".join(sys.argv[1:]) + "\n")
  command, names, flags = split(sys.argv[1:])
  known = " ".join(command)
  kind, verb = command[-2:]
  if known in OTHERS:
    takes = OTHERS[known][0]
  else:
    takes = TPUS[f"{kind} {verb}"] | (ALPHA[f"{kind} {verb}"] if command[0] == "alpha" else set())
  if unknown := set(flags) - takes - ANY:
    fail(f"unrecognized arguments: {sorted(unknown)}", 2)
  if known in OTHERS:
    other(known, names, flags)
    return
  if verb == "ssh":
    ssh(names[0], flags)
  elif verb == "scp":
    scp(*names, flags)
  else:
    {"create": create, "describe": describe, "delete": delete}[verb](kind, names[0], flags)


main()
