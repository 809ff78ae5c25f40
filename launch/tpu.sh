#!/usr/bin/env bash
# Runs on Cloud TPU VMs: on one slice, or on several that are one queued resource.
#
#   launch/tpu.sh check SETTINGS -- FLAGS says what a run with these FLAGS lacks, before anything costs money
#   launch/tpu.sh create SETTINGS         creates the TPU and waits until it is ready
#   launch/tpu.sh setup SETTINGS          copies the committed project to every worker and installs it there, once
#   launch/tpu.sh run SETTINGS -- FLAGS   `pflow train FLAGS` on every worker; shows its log, restarts it when it dies
#   launch/tpu.sh SETTINGS run FLAGS      the same
#                                         FLAGS may begin with another program: latents, convert, sample or evaluate
#   launch/tpu.sh logs SETTINGS           the log of worker --worker I of slice --slice J, both 0, until the run ends
#   launch/tpu.sh status SETTINGS         the state of the TPU, and of the program on each worker
#   launch/tpu.sh stop SETTINGS           has the run save and end
#   launch/tpu.sh delete SETTINGS         deletes the TPU; asks first, unless --yes
#
# Settings, as flags or as environment variables in upper case (NAME, ZONE, ..., SPOT=1):
#   --name NAME --zone ZONE    always needed
#   --type TYPE                v5e-256 (for gcloud: v5litepod-256), v5p-128, v6e-64, ...: needed by check, create, run
#   --project PROJECT          default: gcloud's
#   --version VERSION          runtime; default: the one for the type
#   --slices N                 N slices, NAME-0 to NAME-(N-1), as one queued resource; default 1
#   --queued                   one slice as a queued resource, which waits for capacity instead of failing without
#   --spot | --reserved        default: on demand
#   --network N --subnetwork N
#   --internal-ips             no external addresses: the workers install through a Cloud NAT, which `check` looks for,
#                              and this is to be called from inside the network, or with
#   --iap                      reaches the workers through Identity-Aware Proxy, by gcloud's alpha commands
#   --service-account EMAIL    whose rights the workers have; default: Compute Engine's
#   --scopes SCOPES            limits of those rights, comma-separated; default: none
#   --labels KEY=VALUE,...     of the TPU, as bills show them
#   --prepare COMMAND          what every worker needs besides the project, for example a bucket with the data:
#                                --prepare 'mkdir -p data; mountpoint -q data || gcsfuse --implicit-dirs BUCKET data'
#                              `setup` has bash run it in the home folder of every worker once the project is installed,
#                              and again when it is called again; `run` does on a TPU that it made anew or that was
#                              repaired. So it has to be safe to run twice. If it fails, the setup has failed
#   --delete-when-done         has `run` delete the TPU, which is billed until then, when the run has ended or is given up
#   --dry-run                  prints the commands and runs none
# In the environment only:
#   RESTARTS=10                how often `run` starts a run again: on the same TPU, or on a new one if it was preempted
#   POLL=30                    seconds between looks at a TPU that is waited for
#   GRACE=120                  seconds that the other workers have to end by themselves when one has
#
# All commands want the settings that `create` got. A run resumes from its workdir, which has to be in gs:// for more
# than one worker. Ctrl-C leaves a run going. gcloud reaches several workers only after
#   ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "$0")/.."
# shellcheck source=/dev/null
source launch/settings.sh

# Messages go to the stderr of the start, also from a trap in the middle of a redirected command. A closed output does
# not end the command that watches a run.
exec 3>&1 4>&2
trap : PIPE
say() { printable <<<"launch/tpu.sh: $*" 2>/dev/null >&4 || true; }

mistake() {
  say "$@"
  exit 2
}

fail() {
  say "$@"
  exit 1
}

usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/tpu.sh
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || mistake "bash $BASH_VERSION is too old: 4.4 or newer is needed"

# ---- Settings.

name=${NAME:-} zone=${ZONE:-} project=${PROJECT:-} type=${TYPE:-} version=${VERSION:-} slices=${SLICES:-1}
prepare=${PREPARE:-} network=${NETWORK:-} subnetwork=${SUBNETWORK:-}
service_account=${SERVICE_ACCOUNT:-} scopes=${SCOPES:-} labels=${LABELS:-}
internal=$(switch INTERNAL_IPS "${INTERNAL_IPS:-}")
iap=$(switch IAP "${IAP:-}")
spot=$(switch SPOT "${SPOT:-}")
reserved=$(switch RESERVED "${RESERVED:-}")
queued=$(switch QUEUED "${QUEUED:-}")
when_done=$(switch DELETE_WHEN_DONE "${DELETE_WHEN_DONE:-}")
restarts=${RESTARTS:-10} poll=${POLL:-30} grace=${GRACE:-120}
command='' worker='' slice=0 dry=0 sure=0 program=train flags=()

valued='--name|--zone|--project|--type|--version|--slices|--network|--subnetwork|--prepare|--worker|--slice|--scopes'
valued+='|--service-account|--labels'
plain='--queued|--spot|--reserved|--internal-ips|--iap|--delete-when-done|--dry-run|--yes'

while (($#)); do
  if [[ $1 =~ ^($valued)= ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case "$1" in
    --queued) queued=1 ;;
    --spot) spot=1 ;;
    --reserved) reserved=1 ;;
    --internal-ips) internal=1 ;;
    --iap) iap=1 ;;
    --delete-when-done) when_done=1 ;;
    --dry-run) dry=1 ;;
    --yes) sure=1 ;;
    check | create | setup | run | logs | status | stop | delete)
      if [[ $command ]]; then mistake "one command at a time, got '$command' and '$1'"; fi
      command=$1
      # Without a -- all that follows is pflow's.
      if [[ $1 == run && " ${*@Q} " != *" '--' "* ]]; then
        flags=("${@:2}")
        break
      fi
      ;;
    --)
      flags=("${@:2}")
      break
      ;;
    *)
      if [[ ! $1 =~ ^($valued)$ ]]; then
        if [[ $1 == help || $1 == --help || $1 == -h ]]; then usage; fi
        mistake "there is no command or setting ${1@Q}; launch/tpu.sh help lists them"
      fi
      (($# > 1)) || mistake "$1 needs a value"
      setting=${1#--}
      printf -v "${setting//-/_}" '%s' "$2"
      shift
      ;;
  esac
  shift
done

if [[ -z $command ]]; then usage; fi
if [[ ! $command =~ ^(run|check)$ ]] && ((${#flags[@]})); then
  mistake "${flags[0]@Q}: only run and check take flags of pflow"
fi
if ((${#flags[@]})) && [[ ${flags[0]} != -* ]]; then
  program=${flags[0]} flags=("${flags[@]:1}")
  is_program "$program" || refuse "$command" "a program that several workers run together ($PROGRAMS)" "$program"
fi
for flag in "${flags[@]}"; do
  if [[ $flag =~ ^--worker(=|$) ]]; then
    worker=$flag
  elif [[ ! $flag =~ ^--labels ]] && [[ $flag =~ ^($valued|$plain)(=|$) ]]; then # `pflow sample` has --labels
    mistake "$flag is no flag of pflow; settings go before: launch/tpu.sh run SETTINGS -- FLAGS"
  fi
done
case "$command:$worker" in
  logs:?*) whole "$worker" 0 1000000 || refuse --worker 'a number, as status shows it' "$worker" ;;
  *: | run:all | check:all) ;;
  run:* | check:*)
    mistake "$command takes no --worker: a program has to run on all workers of a TPU, else those that have it wait"
    ;;
  *) mistake "--worker is a setting of logs" ;;
esac
for setting in name zone; do
  if [[ -z ${!setting} ]]; then mistake "--$setting is missing (or ${setting^^} in the environment)"; fi
done
if [[ $command =~ ^(check|create|run)$ && -z $type ]]; then
  mistake "--type is missing (or TYPE in the environment), for example --type v5litepod-16"
fi
# Names that gcloud takes; a flag or a path would be read as something else.
known() { # NAME VALUE PATTERN EXPECTED
  [[ -z $2 ]] || matches "$2" "$3" || refuse "$1" "$4" "$2"
}
known --name "$name" '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' 'up to 62 lower-case letters, digits and dashes, a letter first'
known --zone "$zone" '[a-z][-a-z0-9]{0,60}' 'a zone, such as us-west4-a'
known --project "$project" '[a-z0-9][-a-z0-9.:]{0,100}' "a project's id"
known --version "$version" '[a-z][-a-z0-9._]{0,100}' 'a runtime version, such as v2-alpha-tpuv6e'
known --network "$network" '[a-z][-a-z0-9._:/]{0,300}' 'the name of a network'
known --subnetwork "$subnetwork" '[a-z][-a-z0-9._:/]{0,300}' 'the name of a subnetwork'
known --service-account "$service_account" '[a-z0-9][-a-z0-9]{0,62}@[a-z0-9][-a-z0-9.]{0,200}\.gserviceaccount\.com' \
  "an account's address, such as NAME@PROJECT.iam.gserviceaccount.com"
auth=https://www.googleapis.com/auth/
scope="($auth)?[a-z][a-z._-]{0,60}" label='[a-z][-a-z0-9_]{0,62}=[-a-z0-9_]{0,63}'
known --scopes "$scopes" "$scope(,$scope){0,20}" 'names of scopes, such as cloud-platform'
known --labels "$labels" "$label(,$label){0,63}" 'pairs such as team=vision,run=gm, in lower case'
if [[ $type ]]; then type=$(accelerator --type "$type"); fi
whole_number --slices "$slices" 1 256
whole_number --slice "$slice" 0 $((slices - 1))
whole_number RESTARTS "$restarts" 0 1000000
whole_number GRACE "$grace" 0 1000000
matches "$poll" '(0|[1-9][0-9]{0,5})(\.[0-9]{1,3})?' || refuse POLL 'seconds, such as 30 or 0.5' "$poll"
# Found here, it costs no TPU.
bash -n -c -- "$prepare" 2>/dev/null || mistake "--prepare: bash cannot read it: $prepare"
if ((spot && reserved)); then mistake "--spot and --reserved exclude each other"; fi
# Unlike those of other machines, a TPU's scopes are written out.
if [[ $scopes ]]; then scopes=$auth${scopes//$auth/} scopes=${scopes//,/,$auth}; fi
if ((slices > 1)); then queued=1; fi

nodes=("$name")
if ((slices > 1)); then
  for ((i = 0; i < slices; i++)); do nodes[i]=$name-$i; done
fi
if [[ -z $version ]]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

where=("--zone=$zone")
if [[ $project ]]; then where+=("--project=$project"); fi
placement=() reach=() connect=(gcloud compute tpus tpu-vm)
if ((spot)); then placement+=(--spot); fi
if ((reserved)); then placement+=(--reserved); fi
if [[ $network ]]; then placement+=("--network=$network"); fi
if [[ $subnetwork ]]; then placement+=("--subnetwork=$subnetwork"); fi
if ((internal)); then
  placement+=(--internal-ips)
  reach=(--internal-ip)
fi
if ((iap)); then
  reach=(--tunnel-through-iap) connect=(gcloud alpha compute tpus tpu-vm)
fi
if [[ $service_account ]]; then placement+=("--service-account=$service_account"); fi
if [[ $scopes ]]; then placement+=("--scopes=$scopes"); fi
if [[ $labels ]]; then placement+=("--labels=$labels"); fi
# Without these, a connection to a machine that is gone would never end.
ssh_flags=(--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4)

if ((!dry)) && [[ $command != check ]] && ! command -v gcloud >/dev/null; then
  mistake "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
fi

[[ -d ${TMPDIR:=/tmp} && -w $TMPDIR ]] || refuse TMPDIR 'a folder that can be written to' "$TMPDIR"
temporary=$(mktemp -d)
trap 'rm -rf -- "$temporary"' EXIT

# Prints words as a command that can be pasted.
words() {
  local word quoted line=''
  for word in "$@"; do
    printf -v quoted %q "$word"
    if [[ $quoted == "$word" ]]; then line+="$word "; else line+="${word@Q} "; fi
  done
  echo "$line"
}

# A command with the same settings.
call() {
  local settings=("--name=$name" "--zone=$zone")
  if [[ $project ]]; then settings+=("--project=$project"); fi
  if ((slices > 1)); then settings+=("--slices=$slices"); elif ((queued)); then settings+=(--queued); fi
  if [[ $1 == create ]]; then
    settings+=("--type=$type" "--version=$version" "${placement[@]}")
  elif ((internal)); then
    settings+=(--internal-ips)
  fi
  if ((iap)); then settings+=(--iap); fi
  if [[ $prepare && $1 == setup ]]; then settings+=("--prepare=$prepare"); fi
  words launch/tpu.sh "$1" "${settings[@]}" | sed 's/ $//'
}

# ---- The TPU.

call_cloud() {
  if ((dry)); then words "$@" >&3; else "$@" </dev/null 3>&- 4>&-; fi
}
cloud() { call_cloud gcloud compute tpus "$@"; }

# Prints one property of a tpu-vm or of queued-resources, NOT_FOUND where there is none, or, in a dry run, $4.
look() {
  if ((dry)); then
    cloud "$1" describe "$2" "${where[@]}" "--format=$3"
    echo "$4"
  elif ! cloud "$1" describe "$2" "${where[@]}" "--format=$3" 2>"$temporary/look" | printable; then
    grep -qi 'not.found' "$temporary/look" || { printable <"$temporary/look" >&2 && return 1; }
    echo NOT_FOUND
  fi
}

# Prints `ready`, `waiting STATE` or `gone STATE` for the TPU with all its slices; fails where gcloud cannot tell.
condition() {
  local state node
  if ((queued)); then
    state=$(look queued-resources "$name" 'value(state.state)' ACTIVE) || return 1
    case "$state" in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NOT_FOUND) echo "gone $state" && return ;;
      *) echo "waiting $state" && return ;;
    esac
  fi
  for node in "${nodes[@]}"; do
    state=$(look tpu-vm "$node" 'value(state)' READY) || return 1
    case "$state" in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | HIDING | HIDDEN | NOT_FOUND)
        echo "gone $state"
        return
        ;;
      *) echo "waiting $state" && return ;;
    esac
  done
  echo ready
}

# Waits until the TPU is ready, and says each new state.
await() {
  local now last='' reason misses=0
  while true; do
    now=$(condition) || now='waiting UNKNOWN'
    if [[ $now == *UNKNOWN ]]; then misses=$((misses + 1)); else misses=0; fi
    if ((misses > 20)); then
      say "gcloud could not tell the state of $name $misses times: $(tail -n 1 "$temporary/look")"
      return 1
    fi
    # A dry run fails there when nobody reads it any more.
    if ((dry)); then return; fi
    if [[ $now != "$last" ]]; then say "$name: ${now#* }"; fi
    last=$now
    case "$now" in
      ready) return ;;
      gone*)
        reason=''
        if ((queued)); then
          reason=$(look queued-resources "$name" 'value(state.failedData.error.message)' '') || true
        fi
        say "$name will not become ready, it is ${now#* }${reason:+: $reason}"
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

make() {
  local what
  if ((queued)); then
    what=(queued-resources create "$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$version")
    if ((slices > 1)); then
      what+=("--node-count=$slices" "--node-prefix=$name")
    else
      what+=("--node-id=$name")
    fi
  else
    what=(tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version")
  fi
  cloud "${what[@]}" "${placement[@]}" && await
}

remove() {
  local kind=tpu-vm force=() found
  # Deleted alone, the TPU of a queued resource would leave that behind.
  if ((!queued && !dry)); then
    found=$(look queued-resources "$name" 'value(name)') || return 1
    if [[ $found != NOT_FOUND ]]; then queued=1; fi
  fi
  if ((queued)); then kind=queued-resources force=(--force); fi
  found=$(look "$kind" "$name" 'value(name)' "$name") || return 1
  if [[ $found == NOT_FOUND ]]; then
    say "there is no $name to delete"
  else
    cloud "$kind" delete "$name" "${where[@]}" "${force[@]}" --quiet
  fi
}

# ---- Its workers.

worker_script='bash ~/pflow/src/launch/tpu_worker.sh'

# What a worker writes goes through `printable`, both of its outputs.
remote() { # NODE WORKER COMMAND
  local what=(ssh "$1" "${where[@]}" "--worker=$2" "${reach[@]}" "${ssh_flags[@]}" "--command=$3")
  { call_cloud "${connect[@]}" "${what[@]}" 2>&1 >&5 5>&- | printable >&2; } 5>&1 | printable
}

# Runs a command on all workers, of all slices at once; fails if it fails on one.
everywhere() {
  local node pid code=0 pids=()
  for node in "${nodes[@]}"; do
    if ((dry || slices == 1)); then
      remote "$node" all "$1" || code=$?
    else
      remote "$node" all "$1" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

# Writes the workers' states into $temporary/survey, a line each; fails where not all that are known of have answered.
workers=0
survey() {
  local ask="if [ -e ~/pflow/revision ]; then $worker_script state"
  ask+="; else echo \"pflow-worker \$(hostname) missing - - -\"; fi"
  if ((dry)); then
    everywhere "$ask"
    : >"$temporary/survey"
    return
  fi
  { everywhere "$ask" 2>"$temporary/errors" || true; } | { grep -a '^pflow-worker ' || true; } |
    sort -V >"$temporary/survey"
  (($(wc -l <"$temporary/survey") >= (workers ? workers : slices)))
}

# Reads the survey: what the program ended with (code), whether by `stop` (told), how many still run (open) or do not.
judge() {
  local state detail mark
  code=0 told=0 open=0 closed=0
  while read -r _ _ state detail mark _; do
    if [[ $mark == stopped ]]; then told=1; fi
    if [[ $state == running ]]; then
      open=$((open + 1))
      continue
    fi
    closed=$((closed + 1))
    # Without a code, it went with its machine.
    if [[ $state != ended ]] || ! whole "$detail" 0 255; then detail=1; fi
    if ((detail == 2 || code == 0 || (detail == 130 && code != 2))); then code=$detail; fi
  done <"$temporary/survey"
}

install() { # REVISION
  local node what archive=$temporary/pflow.tar.gz
  if ((dry)); then
    archive=/tmp/pflow.tar.gz
    words git archive --format=tar.gz --output="$archive" "$1" >&3
  else
    git archive --format=tar.gz --output="$archive" "$1" || return 1
  fi
  for node in "${nodes[@]}"; do
    what=(scp "$archive" "$node:pflow.tar.gz" "${where[@]}" --worker=all "${reach[@]}")
    call_cloud "${connect[@]}" "${what[@]}" || return 1
  done
  local unpack='mkdir -p ~/pflow/new && tar -xzf ~/pflow.tar.gz -C ~/pflow/new launch/tpu_worker.sh'
  local steps="bash ~/pflow/new/launch/tpu_worker.sh setup $1"
  if [[ $prepare ]]; then steps+=" && $worker_script prepare ${prepare@Q}"; fi
  everywhere "$unpack && $steps"
}

# Shows worker 0's log until the program has ended everywhere: code and told are set. Fails with 1 if the TPU is not
# ready any more, with 2 if it is but does not answer.
watch() {
  local from=+1 shown=0 misses=0 deadline='' now
  while true; do
    # It succeeds at the program's end there; if the connection ends before, some lines are better shown twice than not.
    if ((!shown)) && remote "${nodes[0]}" 0 "$worker_script follow $from" 2>"$temporary/errors"; then shown=1; fi
    from=20
    if survey; then
      misses=0
      judge
      if ((!open)); then return; fi
      if ((closed)); then deadline=${deadline:-$((SECONDS + grace))}; fi
      if [[ $deadline ]] && ((SECONDS >= deadline)); then
        say "the program still runs on $open workers $grace s after it ended on others; killed"
        everywhere "$worker_script kill" || true
      fi
      sleep 0.5
    else
      now=$(condition) || now='of unknown state'
      if [[ $now == gone* || $now == waiting* ]]; then return 1; fi
      misses=$((misses + 1))
      if ((misses > 20)); then return 2; fi
      say "not all workers answer, the TPU is $now; trying again in $poll s: $(tail -n 1 "$temporary/errors")"
      sleep "$poll"
    fi
  done
}

# Makes the TPU usable again after the state that `condition` told.
restore() {
  case "$1" in
    ready) ;;
    waiting*)
      settled=0
      await || return 1
      # What still runs on the other slices waits for those that began anew.
      everywhere "$worker_script kill" 2>/dev/null || true
      ;;
    gone*)
      settled=0
      remove && make || return 1
      ;;
    *) return 1 ;;
  esac
  if ((!settled)); then install "$revision" || return 1; fi
  settled=1
}

# Sets `workdir` and `out`, the folders of the run, `fleeting`, the flag of one that goes with the TPU, and `problem`.
# shellcheck disable=SC2034 # they are read by their names
workdir='' out='' fleeting='' problem=''
# shellcheck disable=SC2034
folders() { # WORKERS
  local i flag needed=workdir somewhere=gs://...
  workdir='' out='' fleeting='' problem=''
  for ((i = 0; i < ${#flags[@]}; i++)); do
    case "${flags[i]}" in
      --workdir=* | -workdir=*) workdir=${flags[i]#*=} ;;
      --workdir | -workdir) workdir=${flags[i + 1]:-} ;;
      --out=* | -out=*) out=${flags[i]#*=} ;;
      --out | -out) out=${flags[i + 1]:-} ;;
    esac
  done
  if [[ $program == latents || $program == convert ]]; then needed=out; fi
  if [[ $program == latents ]]; then somewhere=/data/...; fi
  if [[ -z ${!needed} ]]; then
    problem="--$needed is missing in the flags for pflow: launch/tpu.sh run SETTINGS -- $program ... --$needed $somewhere"
    return
  fi
  if [[ $program == latents && (! $out == /* || -z $prepare) ]]; then
    problem="--out=$out: latents are written to a file system, and a worker's own goes with it: give the whole path of a \
folder that --prepare mounts on every worker"
    return
  fi
  for flag in workdir out; do
    if [[ -z ${!flag} || ${!flag} == gs://* ]]; then continue; fi
    # What --prepare mounts on every worker is there again on a TPU that is made anew.
    if [[ $flag == out && $out == /* && $prepare ]]; then continue; fi
    fleeting=$flag
    if (($1 > 1)); then
      problem="--$flag=${!flag}: every worker has to see it, so it has to begin with gs://"
      if [[ $flag == out ]]; then problem+=", or with the path of a folder that --prepare mounts"; fi
    fi
  done
}

# ---- The commands.

# shellcheck source=/dev/null
source launch/check.sh

create() {
  local now=''
  if ((!dry)); then
    now=$(condition) || fail "gcloud cannot tell the state of $name"
  fi
  case "$now" in
    '' | 'gone NOT_FOUND') make || exit 1 ;;
    gone*) fail "there is a $name already, which is ${now#* }; delete it first: $(call delete)" ;;
    *) say "there is a $name already" && { await || exit 1; } ;;
  esac
  say "next: $(call setup)"
}

setup() {
  local changed
  git rev-parse --quiet --verify HEAD >/dev/null || mistake "$PWD has no commit that could be copied"
  changed=$(git status --porcelain | cut -c 4-)
  if [[ $changed ]]; then say "uncommitted changes are not copied: ${changed//$'\n'/, }"; fi
  install "$(git rev-parse HEAD)" || fail "setup failed on some worker; the same command goes on"
}

# Whether `run` leaves a TPU, which costs money until it is deleted.
remains=0
at_end() {
  if ((remains)); then say "$name is still there, and is billed: $(call delete)"; fi
  rm -rf -- "$temporary"
}

# Ends `run`, when the program has ended for good.
leave() { # CODE
  if ((when_done)); then
    say "deleting $name"
    if remove; then remains=0; fi
  fi
  exit "$1"
}

run() {
  local node count now code=0 told=0 open=0 closed=0 outcome tries=0 settled=1 revision
  folders "$slices"
  if [[ $problem ]]; then mistake "$problem"; fi
  now=$(condition) || fail "gcloud cannot tell the state of $name"
  if [[ $now != ready ]]; then
    mistake "$name is ${now#* }, not ready: $(call create). A TPU of several slices needs its --slices here too"
  fi
  trap at_end EXIT
  remains=$((!dry))
  for node in "${nodes[@]}"; do
    count=$(look tpu-vm "$node" 'value(networkEndpoints.len())' 1) || fail "gcloud cannot tell the workers of $node"
    whole "$count" 1 100000 || fail "gcloud cannot tell the workers of $node: it answers ${count@Q} for their number"
    workers=$((workers + count))
  done
  folders "$workers"
  if [[ $problem ]]; then mistake "$problem"; fi
  if [[ $fleeting ]]; then
    if ((when_done)); then mistake "--delete-when-done deletes --$fleeting=${!fleeting} too; give a folder in gs://"; fi
    say "--$fleeting=${!fleeting} is on the TPU's own disk: it goes when the TPU goes"
  fi
  local start="$worker_script start $program ${flags[*]@Q}"
  survey || fail "not all $workers workers answer: $(tail -n 3 "$temporary/errors")"
  if ((dry)); then
    everywhere "$start"
    remote "${nodes[0]}" 0 "$worker_script follow +1"
    survey
    return
  fi
  judge
  if ((open)); then mistake "a program runs there already; follow it: $(call logs), or end it: $(call stop)"; fi
  # A worker that names no program was set up by an earlier version, which ran `pflow train` alone.
  revision=$(awk '{ print NF < 7 ? "-" : $6 }' "$temporary/survey" | sort -u)
  if ! matches "$revision" '[0-9a-f]{7,64}'; then mistake "not all workers are set up alike: $(call setup)"; fi
  git cat-file -e "$revision^{commit}" 2>/dev/null ||
    mistake "the workers have commit $revision, which is unknown here: $(call setup)"

  while true; do
    code=1 told=0 outcome=0
    if everywhere "$start"; then
      following=1
      watch || outcome=$?
      following=0
      if ((outcome == 2)); then fail "the workers do not answer, though the TPU is ready; try again: $(call logs)"; fi
      if ((outcome)); then code=1; fi
    else
      everywhere "$worker_script kill" || true
    fi
    if ((code == 0 || code == 2)); then leave "$code"; fi
    if ((told)); then leave 130; fi
    now=$(condition) || now=unknown
    if ((code == 130)); then
      # A preempted machine tells its programs to end: was it that? Its state may lag.
      if [[ $now == ready ]]; then sleep "$poll" && { now=$(condition) || now=unknown; }; fi
      if [[ $now == ready || $now == unknown ]]; then leave 130; fi
    fi
    while true; do
      # On its way, it can be neither used nor deleted.
      while [[ $now == gone\ *ING ]]; do sleep "$poll" && { now=$(condition) || now=unknown; }; done
      if [[ $now == 'gone NOT_FOUND' ]]; then remains=0; else remains=1; fi
      if ((tries >= restarts)); then
        say "the run ended with code $code; given up after $tries restarts"
        leave "$code"
      fi
      if [[ $now == 'gone STOPPED' ]]; then
        fail "$name was stopped, which no preemption does: start it (gcloud compute tpus tpu-vm start), then run again"
      fi
      if [[ $now == gone* && $fleeting ]]; then
        fail "$name is ${now#* }, and --$fleeting=${!fleeting} with it; only what is in gs:// can be resumed elsewhere"
      fi
      tries=$((tries + 1))
      say "pflow $program ended with code $code, the TPU is ${now#* }; restart $tries of $restarts"
      remains=1
      if restore "$now"; then break; fi
      sleep "$poll"
      now=$(condition) || now=unknown
    done
  done
}

logs() {
  following=1
  remote "${nodes[slice]}" "${worker:-0}" "$worker_script follow +1"
}

status() {
  local node state host detail mark revision what reachable=0
  if ((queued)); then
    state=$(look queued-resources "$name" 'value(state.state)' ACTIVE) || exit 1
    if ((!dry)); then echo "queued resource $name: $state"; fi
  fi
  for node in "${nodes[@]}"; do
    state=$(look tpu-vm "$node" 'value(state)' READY) || exit 1
    if ((!dry)); then echo "$node: $state"; fi
    if [[ $state == READY ]]; then reachable=1; fi
  done
  if ((!reachable)); then return; fi
  survey || say "not all workers answer: $(tail -n 3 "$temporary/errors")"
  while read -r _ host state detail mark revision what; do
    case "$state" in
      running) state="runs${what:+ $what}, process $detail" ;;
      ended) state="ended with code $detail" ;;
      died) state="died with its machine" ;;
      idle) state="set up, nothing was started" ;;
      missing) state="not set up" ;;
    esac
    if [[ $mark == stopped ]]; then state+=", told to stop"; fi
    if [[ $revision != - ]]; then state+=" (commit ${revision:0:12})"; fi
    echo "  $host: $state"
  done <"$temporary/survey"
}

stop() { everywhere "$worker_script stop" || fail "not all workers have ended: $(call status)"; }

delete() {
  local answer=''
  if ((!sure && !dry)); then
    say "this deletes $name in $zone with its disks; a launch/tpu.sh run that follows it would make it anew, end it first"
    read -r -p "Delete $name? [y/N] " answer || true
    if [[ $answer != [yY]* ]]; then fail "not deleted"; fi
  fi
  remove || fail "$name could not be deleted; try again: $(call delete)"
}

following=0
interrupted() {
  local pid
  for pid in $(jobs -rp); do kill "$pid" 2>/dev/null || true; done
  if ((following)); then
    say "the run goes on, and is not started again should it die. Follow it: $(call logs). End it: $(call stop)"
  else
    say "interrupted; $command can be called again"
  fi
  exit 130
}
trap interrupted INT TERM

"$command"
