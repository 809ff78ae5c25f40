#!/usr/bin/env bash
# Runs on this machine.
#
#   launch/local.sh demo [FOLDER] [SEED]   teacher, students and evaluation on digits: what `make demo` calls
#   launch/local.sh train FLAGS...         `pflow train` with these flags, started again when it dies, up to RESTARTS times
#   launch/local.sh PROGRAM FLAGS...       the same of latents, convert, sample or evaluate
#
# A run resumes from its workdir, so starting it again loses nothing but the steps since its last checkpoint.
# Told to end (SIGTERM, SIGHUP, Ctrl-C), it has the run save first; a second Ctrl-C ends it at once.
#
# Codes: 0 done, 2 what another try would only repeat, 130 told to stop, 141 nobody reads what it prints; after any other
# it is started again.
#
# Settings, from the environment; not of `demo`:
#   PROCESSES=1   processes that work together; lines of all but process 0 begin with the process's number
#   DEVICES=N     that many fake CPU devices in each process, instead of the machine's devices
#   RESTARTS=3    how often a run that died is started again
#   GRACE=60      seconds that the other processes have to end by themselves when one has died
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# A closed output ends neither this script nor the run.
trap : PIPE
say() { echo "launch/local.sh: $1" >&2 || true; }

mistake() {
  say "$1"
  exit 2
}

# shellcheck source=/dev/null
source launch/settings.sh

demo() {
  local folder=${1:-runs/demo} seed=${2:-0} start=$SECONDS variant
  pflow train --config configs/digits.py:teacher --workdir "$folder/teacher" --config.seed="$seed"
  for variant in gmflow gmflow_2nfe gmflow_4nfe; do
    pflow train --config "configs/digits.py:$variant" --workdir "$folder/$variant" --config.seed="$seed" \
      --config.teacher.workdir="$folder/teacher"
  done
  pflow evaluate --workdir "$folder/gmflow" --also "$folder/gmflow_2nfe" --also "$folder/gmflow_4nfe" --out "$folder"
  echo
  echo "done in $((SECONDS - start)) s. The picture: $folder/samples.png, the table: $folder/evaluation.md, all of it as"
  echo "one page: $folder/evaluation.html"
}

# Sends a signal to the processes of this run that have not ended.
signal_all() {
  local pid
  for pid in $(jobs -rp); do kill "-$1" "$pid" 2>/dev/null || true; done
}

# All signals are passed on as SIGTERM, for which a run with several processes listens.
stop() {
  stopped=$((stopped + 1))
  if [[ $1 == INT ]] && ((stopped > 1)); then
    signal_all KILL
  else
    say "told to stop; waiting for the run to save"
    signal_all TERM
  fi
}

# Sets `port` to one on which nobody listens, below those that the system gives to outgoing connections.
find_port() {
  port=$((20000 + RANDOM % 12000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done
}

# Runs all processes once. Fails with 2 if any of them did, else with 130, else with the code of the first that failed.
attempt() {
  local i pid port running code=0 result=0 deadline='' killed=0
  local -a pids=() cluster
  find_port
  for ((i = 0; i < processes; i++)); do
    cluster=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$i")
    if ((processes == 1)); then
      pflow "$@" &
    elif ((i == 0)); then
      pflow "$@" "${cluster[@]}" &
    else
      pflow "$@" "${cluster[@]}" > >(exec sed -u "s/^/[$i] /") 2> >(exec sed -u "s/^/[$i] /" >&2) &
    fi
    pids[i]=$!
  done
  # The signal to stop came before these processes were started.
  if ((stopped)); then signal_all TERM; fi
  while ((${#pids[@]})); do
    running=" $(jobs -rp) "
    running=${running//$'\n'/ }
    for i in "${!pids[@]}"; do
      pid=${pids[i]}
      if [[ $running == *" $pid "* ]]; then continue; fi
      code=0
      wait "$pid" || code=$?
      unset "pids[i]"
      # A process that is killed below comes after the one that failed; its code does not count.
      if ((code == 0)); then continue; fi
      deadline=${deadline:-$((SECONDS + grace))}
      if ((code == 2 || result == 0 || (code == 130 && result != 2))); then result=$code; fi
    done
    if ((${#pids[@]} && !killed)) && [[ $deadline ]] && ((SECONDS > deadline)); then
      say "${#pids[@]} of $processes processes still run $grace s after one ended; killed"
      killed=1
      signal_all KILL
    fi
    if ((${#pids[@]})); then sleep 0.2; fi
  done
  return "$result"
}

# Runs a program of pflow until it is done, or another try would not help.
keep() { # PROGRAM FLAGS...
  local tries=0 code=0 stopped=0
  local processes=${PROCESSES:-1} restarts=${RESTARTS:-3} grace=${GRACE:-60}
  whole_number PROCESSES "$processes" 1 1000
  whole_number DEVICES "${DEVICES:-1}" 1 1000
  whole_number RESTARTS "$restarts" 0 1000000
  whole_number GRACE "$grace" 0 1000000
  if [[ ${DEVICES:-} ]]; then
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
    export JAX_PLATFORMS=cpu
  fi
  trap 'stop TERM' TERM
  trap 'stop INT' INT
  trap 'stop HUP' HUP
  while true; do
    code=0
    attempt "$@" || code=$?
    # A process that gets the signal before it listens dies of it.
    if ((stopped && code != 0 && code != 2)); then code=130; fi
    # 2: another try would fail again. 130: the run was told to stop. 141: the reader of its output went away.
    if ((code == 0 || code == 2 || code == 130 || code == 141 || tries >= restarts)); then exit "$code"; fi
    tries=$((tries + 1))
    say "pflow $1 ended with code $code; restart $tries of $restarts"
  done
}

if [[ ${1:-} != demo ]] && ! is_program "${1:-}"; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/local.sh
  exit 2
fi
command -v pflow >/dev/null || mistake "pflow is not installed here: make demo does it, or pip install -e ."
if [[ $1 == demo ]]; then "$@"; else keep "$@"; fi
