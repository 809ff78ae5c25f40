#!/usr/bin/env bash
# What launch/tpu.sh calls on each worker of a TPU; everything is in ~/pflow there.
#
#   setup REVISION    unpacks ~/pflow.tar.gz into ~/pflow/src, and installs ~/pflow/venv unless it is there
#   prepare COMMAND   has bash run it in the home folder; until it has succeeded, the worker is not set up
#   start PROGRAM FLAGS...
#                     `pflow PROGRAM FLAGS...`, detached: ~/pflow/log.txt, ~/pflow/pid, at its end ~/pflow/exit
#   state             one line: pflow-worker HOST idle|running|ended|died PID|CODE|- stopped|- REVISION PROGRAM|-
#   follow [+1|N]     the log, from its start or its last N lines, until the program ends
#   stop [SECONDS]    has the program save and end, and waits for it
#   kill              ends the program at once
set -euo pipefail
export HOME=${HOME:-~}
home=$HOME/pflow
mkdir -p "$home"
cd "$home"

fail() {
  echo "$(hostname): $1" >&2
  exit "${2:-1}"
}

# Whoever supervises a program holds the lock, so that neither a reboot nor a reused process id can mislead.
running() { ! flock --shared --nonblock lock true; }

usable() {
  local final='import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11) or sys.version_info[3] != "final")'
  "$1" -c "$final" 2>/dev/null
}

# Makes an environment with Python 3.11: the machine's, the distribution's (some have only a preview of it), or uv's.
make_environment() {
  local uv
  if ! usable python3.11; then
    # The image may still be updating itself after its start.
    local apt=(sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600)
    { "${apt[@]}" update && "${apt[@]}" install python3.11 python3.11-venv; } >apt.txt 2>&1 || true
  fi
  if usable python3.11; then
    python3.11 -m venv venv
    return
  fi
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv >uv.txt 2>&1 || true
  uv=$(command -v uv || echo ~/.local/bin/uv)
  "$uv" venv --quiet --seed --python 3.11 venv >>uv.txt 2>&1 ||
    fail "no Python 3.11 here, none from apt (see ~/pflow/apt.txt) and none from uv (see ~/pflow/uv.txt): install it"
}

install() {
  local lock=src/launch/requirements-tpu.txt wanted pip
  wanted=$(sha256sum <"$lock")
  if [[ -e venv/stamp && $(cat venv/stamp) == "$wanted" ]]; then
    echo "$(hostname): already installed"
    return
  fi
  echo "$(hostname): installing"
  rm -rf venv
  make_environment
  pip=(venv/bin/python -m pip --quiet --disable-pip-version-check)
  # All is pinned, what builds packages too, and nothing is left to resolve.
  "${pip[@]}" install "$(grep '^setuptools==' "$lock")"
  "${pip[@]}" install --no-deps --no-build-isolation -r "$lock"
  "${pip[@]}" install --no-deps --no-build-isolation --editable src
  "${pip[@]}" check
  echo "$wanted" >venv/stamp
  echo "$(hostname): installed"
}

setup() {
  local name
  if running; then fail "a program runs here; end it first: launch/tpu.sh stop" 3; fi
  tar -tzf ../pflow.tar.gz | grep -v '/$' | LC_ALL=C sort >files.new
  mkdir -p src
  # Only what an earlier setup brought and this one does not: runs may live beside it.
  if [[ -e files ]]; then
    LC_ALL=C comm -23 files files.new | while read -r name; do rm -f "src/$name"; done
  fi
  tar -xzf ../pflow.tar.gz -C src
  mv files.new files
  rm -rf ../pflow.tar.gz new
  install
  echo "$1" >revision
}

prepare() {
  local code=0
  mv revision unprepared
  (cd .. && exec bash -c "$1") || code=$?
  if ((code)); then fail "--prepare failed with code $code: $1"; fi
  mv unprepared revision
}

start() {
  local i
  [[ -e revision ]] || fail "not set up; call launch/tpu.sh setup" 4
  if running; then fail "a program runs here already, process $(cat pid)" 3; fi
  rm -f pid exit stopped
  if [[ -e log.txt ]]; then mv log.txt log.previous.txt; fi
  echo "$1" >program
  setsid nohup bash "$0" supervise "$@" >log.txt 2>&1 </dev/null &
  for ((i = 0; i < 100; i++)); do
    if [[ -e pid ]]; then return; fi
    sleep 0.1
  done
  fail "the program did not start: $(tail -n 3 log.txt)"
}

supervise() {
  local code=0 interrupted=1
  exec 9>lock
  flock -w 5 9
  # When the machine is told to end, so is the program: what it ended with is still to be written.
  trap 'interrupted=1' TERM
  cd src
  "$home/venv/bin/pflow" "$@" 9>&- &
  cd ..
  echo $! >pid.new
  mv pid.new pid
  while ((interrupted)); do
    interrupted=0 code=0
    wait $! || code=$?
  done
  # A program that does not listen for SIGTERM dies of it: it was told to end.
  if ((code == 143)); then code=130; fi
  echo "$code" >exit.new
  mv exit.new exit
}

state() {
  local state=idle detail=- stopped=-
  # Asked first: a program that ends meanwhile has written what it ended with before it does not run any more.
  if running; then
    state=running detail=$(cat pid 2>/dev/null || echo -)
  elif [[ -e exit ]]; then
    state=ended detail=$(cat exit)
  elif [[ -e pid ]]; then
    state=died
  fi
  if [[ -e stopped ]]; then stopped=stopped; fi
  echo "pflow-worker $(hostname) $state $detail $stopped $(cat revision 2>/dev/null || echo -)" \
    "$(cat program 2>/dev/null || echo -)"
}

follow() {
  [[ -e log.txt ]] || fail "no program was started here"
  if running; then
    tail -n "${1:-+1}" -f -s 0.2 --pid="$(cat pid)" log.txt
    flock --shared -w 10 lock true
  else
    tail -n "${1:-+1}" log.txt
  fi
}

stop() {
  if ! running; then
    echo "$(hostname): nothing runs"
    return
  fi
  touch stopped
  kill -TERM "$(cat pid)" 2>/dev/null || true
  flock --shared -w "${1:-600}" lock true || fail "still running ${1:-600} s after it was told to stop"
  echo "$(hostname): ended with code $(cat exit)"
}

end() {
  if running; then kill -KILL "$(cat pid)" && flock --shared -w 60 lock true; fi
}

case "${1:-}" in
  setup | prepare | start | supervise | state | follow | stop) "$@" ;;
  kill) end ;;
  *)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
