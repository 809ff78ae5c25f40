"""Joining of the processes of one program, with a message where one is missing.

Everything after `join` is JAX's own distributed runtime. A process that dies takes the others with it: they notice a
broken connection at once and silence after HEARTBEAT seconds, and end with the runtime's message.

The runtime does not authenticate. So each process listens on one address alone, of the interface that faces process 0:
JAX's own choice is all interfaces for the runtime, and any address of the host's name for collectives of CPUs.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 30  # seconds of silence after which a process counts as dead
SHUTDOWN = 30  # seconds that a process that has ended waits for the others
JOIN_TIMEOUT = 300  # seconds
# Kinds of errors that one process can report to the others.
_KINDS: dict[str, type[Exception]] = {
  kind.__name__: kind for kind in (ValueError, ImportError, MemoryError, OSError, RuntimeError)
}


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = JOIN_TIMEOUT,
) -> None:
  """Joins this process with the others of its program; before any other use of JAX.

  On TPU VMs and in a SLURM step of several tasks the arguments are found by JAX; elsewhere, without arguments, a
  process is alone. Ends the process with code 1 and a message when not all have come within `timeout` seconds.

  Args:
    coordinator: host:port of process 0, a free port there.
    num_processes: of the program; 1 without a coordinator is a process alone, wherever it runs.
    process_id: of this one, in [0, num_processes).
    timeout: seconds to wait for the others.

  Raises:
    ValueError: the arguments do not fit together.
  """
  given = (coordinator, num_processes, process_id)
  if given == (None, None, None):
    if not (_in_slurm_step() or _on_tpu()):
      return
    what = "the processes of this " + ("SLURM step" if _in_slurm_step() else "TPU")
  elif num_processes == 1 and coordinator is None:
    return
  else:
    if None in given:
      raise ValueError(
        "--coordinator, --num_processes and --process_id belong together (host:port of process 0, how many, which), "
        f"got {given}"
      )
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    _split(coordinator)
    if not 0 <= process_id < num_processes:
      raise ValueError(f"--process_id: expected 0 <= process_id < {num_processes}, got {process_id}")
    what = f"process {process_id} of {num_processes} at {coordinator}"
  if timeout < 1:
    raise ValueError(f"--join_timeout: expected at least 1 s, got {timeout}")
  print(f"joining {what}, for up to {timeout} s", flush=True)
  gave_up = threading.Timer(timeout, _give_up, (what, timeout))
  gave_up.daemon = True
  gave_up.start()
  try:
    if coordinator is None:
      coordinator, num_processes, process_id = _detected(timeout)
    host, port = _split(coordinator)
    host = _as_others_see(host)
    own = _facing(host)
    # This package's message has to come first: at its own time-out the runtime aborts with a C++ stack trace.
    jax.distributed.initialize(
      _joined(host, port),
      num_processes,
      process_id,
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=SHUTDOWN,
      coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or _joined(own, port),
    )
    _collect_on(own)
    jax.devices()  # the runtime's exchange of devices, which waits for all as well
  finally:
    gave_up.cancel()
  print(
    f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} "
    f"devices ({jax.devices()[0].device_kind})",
    flush=True,
  )


def is_first() -> bool:
  """Returns whether this is the process that prints and writes."""
  return jax.process_index() == 0


def from_first(value: Any) -> Any:
  """Returns the first process's `value`, a number or an array of the same shape in all of them."""
  return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(np.asarray(value))


def agreed(compute: Callable[[], Any]) -> Any:
  """Calls `compute` in the first process alone, and returns its value, in plain JSON, in all of them.

  Raises:
    Exception: any that `compute` raises; the other processes raise one of its kind with its words.
  """
  if jax.process_count() == 1:
    return compute()
  answer: dict[str, Any] = {}
  raised: Exception | None = None
  if is_first():
    try:
      answer = {"value": compute()}
    except Exception as error:  # the others would wait for ever
      raised = error
      answer = {"raised": [kind for kind in _KINDS if isinstance(error, _KINDS[kind])], "text": str(error)}
  text = json.dumps(answer).encode()
  size = int(from_first(len(text)))
  answer = json.loads(bytes(from_first(np.frombuffer(text.ljust(size)[:size], np.uint8))))
  if "value" in answer:
    return answer["value"]
  raise raised or _KINDS[(*answer["raised"], "RuntimeError")[0]](answer["text"])


def together(what: str) -> None:
  """Waits for all processes, however long, until they have come to the same point of a program.

  Args:
    what: name of the point.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"pflow_jax: {what}")


def finish() -> None:
  """Waits for all processes, however long.

  At the end of a program the first one writes while the others are idle, and JAX takes a process that waits SHUTDOWN
  seconds for dead.
  """
  together("finished")


def _give_up(what: str, timeout: int) -> None:
  print(
    f"pflow: {what}: not all processes came within {timeout} s. Start the program on every worker, with the same "
    "--coordinator and --num_processes where they are given; the log of the one that is missing says why it is",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)  # the main thread is inside of the runtime


def _detected(timeout: int) -> tuple[str, int, int]:
  """Coordinator, number of processes and number of this one, as JAX finds them out on TPU VMs and under SLURM."""
  # `initialize` would find them too, but too late: the address to listen on has to be known before.
  from jax._src.clusters import ClusterEnv

  unset = (os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout)
  problem = ""
  try:
    coordinator, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(*unset)
    if coordinator is not None and num_processes is not None and process_id is not None:
      return coordinator, num_processes, process_id
  except ValueError as error:
    problem = f"{error}: "
  raise ValueError(
    f"{problem}JAX does not know how the processes find each other here: give --coordinator, --num_processes and "
    "--process_id, or --num_processes=1 for a process alone"
  )


def _split(coordinator: str) -> tuple[str, str]:
  """Host and port of "host:port", in which an IPv6 address is in brackets; the result has none."""
  parts = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+):([0-9]{1,5})", coordinator)
  if not parts or not 0 < int(parts[2]) < 2**16:
    raise ValueError(f"--coordinator: expected host:port of process 0, got {coordinator!r}")
  host = parts[1].strip("[]")
  if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
    raise ValueError(f"--coordinator: expected an address at which the others reach process 0, got {coordinator!r}")
  return host, parts[2]


def _joined(host: str, port: str) -> str:
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_address(host: str) -> bool:
  try:
    return bool(ipaddress.ip_address(host))
  except ValueError:
    return False


def _addresses(host: str) -> list[str]:
  """Addresses of a host, IPv4 before IPv6. Waits for an unknown name, since a container's is unknown until it runs."""
  while True:
    try:
      found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
      return sorted(found, key=lambda address: (":" in address, address))
    except socket.gaierror:
      time.sleep(1)


def _as_others_see(host: str) -> str:
  """Returns `host`; an outside address instead of a name of this machine that leads to loopback, as many do."""
  if _is_address(host) or "localhost" in host:
    return host
  if all(ipaddress.ip_address(address).is_loopback for address in _addresses(host)):
    for outside in ("198.51.100.1", "2001:db8::1"):  # addresses of no network: the route to them leads out
      with contextlib.suppress(OSError):
        return _facing(outside)
  return host


def _facing(host: str) -> str:
  """The address of this machine's interface on the way to `host`."""
  address = _addresses(host)[0]
  if ipaddress.ip_address(address).is_loopback:
    return address
  with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as way:
    way.connect((address, 9))  # sends nothing
    return str(way.getsockname()[0])


def _collect_on(address: str) -> None:
  """Makes this process's collectives of CPUs listen on `address`."""
  from jax._src import distributed, xla_bridge
  from jax._src.lib import _jax
  from jax.extend.backend import register_backend_factory

  def cpu() -> Any:
    client = distributed.global_state.client
    return xla_bridge.make_cpu_client(_jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address))

  if jax.config.jax_cpu_collectives_implementation == "gloo":  # type: ignore[attr-defined]
    register_backend_factory("cpu", cpu, priority=0, fail_quietly=False)


def _in_slurm_step() -> bool:
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
  return "SLURM_PROCID" in os.environ and tasks.isdecimal() and int(tasks) > 1


def _on_tpu() -> bool:
  """Returns whether this is a TPU VM whose TPU is going to be used."""
  platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return platforms in ("", "tpu") and bool(chips) and importlib.util.find_spec("libtpu") is not None
