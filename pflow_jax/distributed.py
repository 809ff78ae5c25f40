"""Many processes, one program: finding each other, and saying so when one is missing.

Everything after `join` is JAX's own distributed runtime. A process that dies takes the others with it: they notice a
broken connection at once and silence after HEARTBEAT seconds, and end with what the runtime says of it.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 30  # seconds of silence after which a process counts as dead
SHUTDOWN = 30  # seconds that a process that has ended waits for the others
JOIN_TIMEOUT = 300  # seconds


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
  Raises: ValueError for arguments that do not fit together.
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
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
      raise ValueError(f"--coordinator: expected host:port of process 0, got {coordinator!r}")
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
    # Ours is the message to come first: at its own time-out the runtime aborts with a C++ stack trace.
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=SHUTDOWN,
    )
    jax.devices()  # the runtime's exchange of devices, which waits for all as well
  except ValueError as error:
    raise ValueError(
      f"{error} JAX does not know how the processes find each other here: give --coordinator, --num_processes and "
      "--process_id, or --num_processes=1 for a process alone"
    ) from error
  finally:
    gave_up.cancel()
  print(
    f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} "
    f"devices ({jax.devices()[0].device_kind})",
    flush=True,
  )


def is_first() -> bool:
  """Whether this is the process that prints and writes."""
  return jax.process_index() == 0


def from_first(value: Any) -> Any:
  """`value`, a number or an array of one shape everywhere, as the first process has it."""
  return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(np.asarray(value))


def finish() -> None:
  """Waits for all processes, however long: at the end of a program the first one writes while the others have nothing
  to do, and JAX takes one that waits SHUTDOWN seconds for dead."""
  multihost_utils.sync_global_devices("pflow_jax: finished")


def _give_up(what: str, timeout: int) -> None:
  print(
    f"pflow: {what}: not all processes came within {timeout} s. Start the program on every worker, with the same "
    "--coordinator and --num_processes where they are given; the log of the one that is missing says why it is",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)  # the main thread is inside of the runtime


def _in_slurm_step() -> bool:
  return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _on_tpu() -> bool:
  """Whether this is a TPU VM, and its TPU is what is going to be used."""
  platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return platforms in ("", "tpu") and bool(chips) and importlib.util.find_spec("libtpu") is not None
