#!/usr/bin/env bash
# Stands in for srun: all tasks, here. Like srun it ends with the highest of their codes, kills the others when one
# fails (those that still run a second later), and passes SIGTERM on, to the tasks' own processes alone.
set -m
tasks=1 options=()
while [[ $1 == --* ]]; do
  if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
  options+=("$1")
  shift
done
echo "${JAX_LOCAL_DEVICE_IDS:-} srun ${options[*]}" >>"$STANDIN/slurm"
pids=() highest=0
trap 'for pid in "${pids[@]}"; do kill -TERM "$pid"; done' TERM
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i "$@" &
  pids[i]=$!
done
while ((${#pids[@]})); do
  running=" $(jobs -rp) "
  running=${running//$'\n'/ }
  failed=0
  for i in "${!pids[@]}"; do
    if [[ $running == *" ${pids[i]} "* ]]; then continue; fi
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if ((code)); then failed=1; fi
    if ((code > highest)); then highest=$code; fi
  done
  if ((failed && ${#pids[@]})); then
    sleep 1
    for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null; done
  fi
  sleep 0.05
done
echo "srun ended with code $highest" >&2
exit "$highest"
