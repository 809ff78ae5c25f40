#!/usr/bin/env bash
# Runs on this machine.
#
#   launch/local.sh demo [FOLDER] [SEED]   teacher, students and evaluation on digits: what `make demo` calls
#   launch/local.sh train FLAGS...         `pflow train` with these flags, started again when it dies, up to RESTARTS times
#
# A run resumes from its workdir, so starting it again loses nothing but the steps since its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

demo() {
  local folder=${1:-runs/demo} seed=${2:-0} start=$SECONDS variant
  pflow train --config configs/digits.py:teacher --workdir "$folder/teacher" --config.seed="$seed"
  for variant in gmflow gmflow_2nfe gmflow_4nfe; do
    pflow train --config "configs/digits.py:$variant" --workdir "$folder/$variant" --config.seed="$seed" \
      --config.teacher.workdir="$folder/teacher"
  done
  pflow evaluate --workdir "$folder/gmflow" --also "$folder/gmflow_2nfe" --also "$folder/gmflow_4nfe" --out "$folder"
  echo
  echo "done in $((SECONDS - start)) s. The picture: $folder/samples.png, the table: $folder/evaluation.md"
}

train() {
  local tries=0 code=0
  while true; do
    code=0
    pflow train "$@" || code=$?
    # 2 is a mistake that another try would only repeat, 130 a run that was told to stop.
    if ((code == 0 || code == 2 || code == 130 || tries >= ${RESTARTS:-3})); then exit "$code"; fi
    tries=$((tries + 1))
    echo "launch/local.sh: training ended with code $code; restart $tries of ${RESTARTS:-3}" >&2
  done
}

case "${1:-}" in
  demo | train) "$@" ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
