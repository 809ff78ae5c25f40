#!/usr/bin/env bash
#SBATCH --job-name=pflow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#
# Runs under SLURM: one process a node, which has all of the node's devices. The processes find each other.
#
#   sbatch [OPTIONS OF SBATCH] launch/slurm.sh train FLAGS...   `pflow train` with these flags; or another PROGRAM in place
#                                                               of train: latents, convert, sample or evaluate
#   launch/slurm.sh --dry-run train FLAGS...                    prints what would be run
#
# Submit from the project's folder, with a workdir that all nodes see; for example
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=1-0 launch/slurm.sh train --config ... --workdir ...
#
# What the lines above ask for is what sbatch's options of the same name replace. A run that died is started again in
# the same job. Before its time limit (--signal: 120 s before) and when it is preempted the run is told to save, and the
# job goes back into the queue, from where the run resumes. To end it for good: scancel JOB (SLURM leaves it KillWait
# seconds, 30 unless changed, to save) or scancel --batch --signal=INT JOB (which leaves it all the time it needs).
#
# Settings, from the environment:
#   RESTARTS=3   how often a run that died is started again in one job
#   REQUEUE=1    0: at its time limit and when preempted the job ends instead of going back into the queue
set -euo pipefail
unset CDPATH

# A closed output ends neither this script nor the run.
trap : PIPE
say() { echo "launch/slurm.sh: $1" >&2 || true; }

mistake() {
  say "$1"
  exit 2
}

usage() {
  sed -n '/^# Runs/,/^[^#]/s/^# \{0,1\}//p' launch/slurm.sh
  exit 2
}

dry=0
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi

# sbatch runs a copy of this file from a folder of its own.
root=$(dirname -- "$0")/..
if [[ ! -e $root/launch/slurm.sh ]]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
[[ -e $root/launch/slurm.sh ]] || mistake "${root@Q} is not the project's folder; submit from there"
cd -- "$root"
export PATH="$PWD/.venv/bin:$PATH"
# shellcheck source=/dev/null
source launch/settings.sh

is_program "${1:-}" || usage
if [[ -z ${SLURM_JOB_ID:-} ]] && ((!dry)); then
  mistake "not inside a SLURM allocation (SLURM_JOB_ID is not set); submit it: sbatch launch/slurm.sh $1 FLAGS..."
fi

restarts=${RESTARTS:-3}
whole_number RESTARTS "$restarts" 0 1000000
requeue=$(switch REQUEUE "${REQUEUE:-1}")
nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
whole_number SLURM_JOB_NUM_NODES "$nodes" 1 100000
whole_number SLURM_GPUS_ON_NODE "$gpus" 0 1000
whole_number SLURM_CPUS_PER_TASK "${SLURM_CPUS_PER_TASK:-1}" 1 100000
matches "${SLURM_JOB_ID:-1}" '[1-9][0-9]{0,11}' || refuse SLURM_JOB_ID "a job's number" "$SLURM_JOB_ID"
whole_number SLURM_RESTART_COUNT "${SLURM_RESTART_COUNT:-0}" 0 1000000

step=(srun --kill-on-bad-exit=1 "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1)
# Since SLURM 22.05 srun does not take this over from sbatch by itself.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
if ((gpus)); then
  # Under SLURM, JAX gives each process one GPU unless told otherwise.
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# Runs the command of a task, and leaves a file if it ends with 2. srun hides that code: it ends with the highest code of
# all tasks, and the tasks that lose the one with the mistake abort (134) or are killed (137).
task() { # FILE COMMAND...
  local told='' interrupted=1 code=0
  # Some clusters signal the command too, some this shell alone. Told twice, a run saves once.
  trap 'told=1 interrupted=1; kill -TERM $! 2>/dev/null' TERM INT
  "${@:2}" &
  if [[ $told ]]; then kill -TERM $! 2>/dev/null; fi
  while ((interrupted)); do
    interrupted=0 code=0
    wait $! || code=$?
  done
  if ((code == 2)); then : >"$1"; fi
  exit "$code"
}
# Each try has its own file name: NFS may go on to miss a file that it has once looked for in vain.
left() { echo "$PWD/.pflow-mistake-${SLURM_JOB_ID:-JOB}-${SLURM_RESTART_COUNT:-0}-$tries"; }
tries=0
step+=(bash -c "$(declare -f task); task \"\$@\"" task)

if ((dry)); then
  if ((gpus)); then echo "export JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS"; fi
  printf '%q ' "${step[@]}" "$(left)" pflow "$@"
  printf '\n# at the time limit and when preempted: scontrol requeue %s\n' "${SLURM_JOB_ID:-JOB}"
  exit 0
fi

for tool in srun pflow; do
  command -v "$tool" >/dev/null || mistake "there is no $tool here; pflow is installed by pip install -e . in the project"
done

told=''
tell() {
  told=$1
  say "told to stop; waiting for the run to save"
  for pid in $(jobs -rp); do kill -TERM "$pid" 2>/dev/null || true; done
}
trap 'tell TERM' TERM
trap 'tell INT' INT

# The job as SLURM sees it: its state, followed by "preempted" if it has to make room.
job() {
  local job
  job=$(scontrol show job "$SLURM_JOB_ID") || { echo RUNNING && return; }
  [[ $job =~ JobState=([A-Z_]+) ]] && printf '%s' "${BASH_REMATCH[1]}"
  [[ $job =~ PreemptTime=([0-9][^[:space:]]*) ]] && printf ' preempted'
  echo
}

while true; do
  "${step[@]}" "$(left)" pflow "$@" &
  srun=$!
  if [[ $told ]]; then tell "$told"; fi
  # A signal would end `wait` before the run has ended.
  while [[ $(jobs -rp) ]]; do sleep 0.2; done
  code=0
  wait "$srun" || code=$?
  if [[ -e $(left) ]]; then
    rm -f "$(left)"
    code=2
  fi
  if ((code == 0 || code == 2)); then exit "$code"; fi
  if [[ $told == INT ]]; then exit 130; fi
  state=$(job)
  # A job that is cancelled is not running any more. One that is preempted may be told through its steps alone.
  if [[ $state == *preempted || ($told && $state == RUNNING) ]]; then
    if ((requeue)); then
      say "ended with code $code at the time limit or preempted; back into the queue"
      scontrol requeue "$SLURM_JOB_ID" || say "SLURM did not take it back; submit it again: the run resumes"
    fi
    exit 130
  fi
  if [[ $told || $state != RUNNING ]]; then exit 130; fi
  if ((code == 130 || code == 141 || tries >= restarts)); then exit "$code"; fi
  tries=$((tries + 1))
  say "pflow $1 ended with code $code; restart $tries of $restarts"
done
