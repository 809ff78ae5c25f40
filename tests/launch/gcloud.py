"""Stands in for gcloud: keeps TPUs as files, and runs what is sent to a worker on this machine.

All is in the folder $STANDIN:
  calls             the arguments of every call, with tabs between
  tpus/NAME         state of a TPU; queued/NAME: of a queued resource, with the names of its TPUs in queued/NAME.nodes
  homes/NAME-w-I    home of worker I, which is gone after a deletion
  workers           workers of a TPU; default 2
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
ANY = {"project", "format", "quiet"}
CREATE = {"zone", "accelerator-type", "spot", "reserved", "network", "subnetwork", "internal-ips", "async"}
FLAGS = {
  "tpu-vm create": CREATE | {"version", "preemptible"},
  "tpu-vm describe": {"zone"},
  "tpu-vm delete": {"zone", "async"},
  "tpu-vm ssh": {"zone", "worker", "command", "internal-ip", "ssh-flag"},
  "tpu-vm scp": {"zone", "worker", "internal-ip", "recurse"},
  "queued-resources create": CREATE | {"runtime-version", "node-id", "node-count", "node-prefix", "guaranteed"},
  "queued-resources describe": {"zone"},
  "queued-resources delete": {"zone", "async", "force"},
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


def main():
  with (STATE / "calls").open("a") as calls:
    calls.write("\t".join(sys.argv[1:]) + "\n")
  _, _, kind, verb, *rest = sys.argv[1:]
  names = [word for word in rest if not word.startswith("--")]
  flags = dict(word[2:].split("=", 1) if "=" in word else (word[2:], "") for word in rest if word.startswith("--"))
  if unknown := set(flags) - FLAGS[f"{kind} {verb}"] - ANY:
    fail(f"unrecognized arguments: {sorted(unknown)}", 2)
  if verb == "ssh":
    ssh(names[0], flags)
  elif verb == "scp":
    scp(*names, flags)
  else:
    {"create": create, "describe": describe, "delete": delete}[verb](kind, names[0], flags)


main()
