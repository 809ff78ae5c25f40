#!/usr/bin/env bash
# Stands in for pflow. It writes its arguments to $STANDIN/pflow/WHO, and does what the first line of $STANDIN/plan/WHO
# says, which it removes; WHO is the worker of a TPU, or pN for process or task N. Without a line it ends with 0.
#
#   exit CODE     ends
#   kill SIGNAL   dies of a signal
#   run [CODE]    until SIGTERM, then ends with 130, or CODE
#   deaf          runs, and does not hear SIGTERM
#   leave         ends with 0, but something that it started lives on
who=${STANDIN_HOST:-p${SLURM_PROCID:-0}}
for word in "$@"; do
  if [[ $word == --process_id=* ]]; then who=p${word#*=}; fi
done
mkdir -p "$STANDIN/pflow" "$STANDIN/plan"
action=exit what=0
if [[ -s $STANDIN/plan/$who ]]; then
  read -r action what <"$STANDIN/plan/$who"
  sed -i 1d "$STANDIN/plan/$who"
fi
case $action in
  run) trap 'echo "$who saves"; exit "${what:-130}"' TERM ;;
  deaf) trap '' TERM ;;
esac
echo "$who works"
echo "$who warns" >&2
echo "$$ ${XLA_FLAGS:-} ${JAX_PLATFORMS:-} $*" >>"$STANDIN/env"
echo "$*" >>"$STANDIN/pflow/$who"
echo $$ >>"$STANDIN/pids"
case $action in
  exit) exit "$what" ;;
  kill) kill "-$what" $$ ;;
  leave)
    (exec -a pflow-child sleep 40) &
    echo $! >>"$STANDIN/pids"
    exit 0
    ;;
esac
while true; do sleep 0.05; done
