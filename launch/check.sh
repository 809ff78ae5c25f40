# What `launch/tpu.sh check` does, sourced by that script: says what a run lacks, before anything costs money. It asks
# gcloud, writes, reads and removes one small object where the results go, and has pflow plan the run on this machine.
#
# A line of the report begins with ok, missing or unknown: what nobody could tell. The line below it mends it.
# shellcheck shell=bash disable=SC2154 # settings and functions are those of launch/tpu.sh

lacking=0 doubts=0 probe=''

tell() { # ok|missing|unknown WHAT [REMEDY]
  if ((dry)); then return; fi
  if [[ $1 == missing ]]; then lacking=$((lacking + 1)); fi
  if [[ $1 == unknown ]]; then doubts=$((doubts + 1)); fi
  printf '%-9s%s\n' "$1" "$2" | printable
  if [[ ${3:-} ]]; then printf '%-9s%s\n' '' "${3% }" | printable; fi
}

# Sets `answer` to what gcloud answers. Fails with its error in `reason`, and `absent` if that is that there is no such
# thing. A dry run shows the call and goes on with ANSWER.
ask() { # ANSWER ARGUMENTS...
  answer=$1 reason='' absent=0
  if ((dry)); then
    words gcloud "${@:2}"
    return
  fi
  if answer=$(gcloud "${@:2}" </dev/null 2>"$temporary/ask" 3>&- 4>&- | printable); then return; fi
  reason=$(grep -a -m 1 ERROR "$temporary/ask" || tail -n 1 "$temporary/ask")
  reason=$(printable <<<"${reason:0:400}")
  if grep -aqiE 'not.?found|\b404\b' "$temporary/ask"; then absent=1; fi
  return 1
}

# ---- The account, and what the project and the zone have.

# Sets `account`, `me`, which is the account in a policy, and `id` and `number` of the project; fails where nothing more
# can be asked.
check_account() {
  local remedy='gcloud projects list  # those that the account sees'
  ask you@example.com auth list --filter=status:ACTIVE '--format=value(account)' || answer=''
  account=${answer%%$'\n'*}
  if [[ -z $account ]]; then
    tell missing 'account: nobody is signed in to gcloud' 'gcloud auth login'
    return 1
  fi
  tell ok "account: $account"
  me=user:$account
  if [[ $account == *.gserviceaccount.com ]]; then me=serviceAccount:$account; fi
  id=$project
  if [[ -z $id ]]; then
    ask PROJECT config get-value project || answer=''
    id=$answer
  fi
  if ! matches "$id" '[a-zA-Z0-9][-a-zA-Z0-9.:]{0,100}'; then
    tell missing 'project: none is set' 'gcloud config set project PROJECT  # or --project PROJECT here'
    return 1
  fi
  if ! ask 0 projects describe "$id" '--format=value(projectNumber)'; then
    if [[ $reason =~ [Rr]eauth|[Tt]oken|[Cc]redential ]]; then remedy='gcloud auth login'; fi
    tell missing "project: $reason" "$remedy"
    return 1
  fi
  number=$answer
  tell ok "project: $id"
}

check_api() {
  local api=tpu.googleapis.com of=(--enabled "--project=$id")
  if ! ask "$api" services list "${of[@]}" "--filter=config.name=$api" '--format=value(config.name)'; then
    tell unknown "API: $reason"
  elif [[ $answer == *"$api"* ]]; then
    tell ok "API: $api is enabled"
  else
    tell missing "API: $api is not enabled" "gcloud services enable $api --project=$id"
  fi
}

check_offer() { # WHAT GROUP NAME
  local group=(compute tpus tpu-vm "$2") at=("--zone=$zone" "--project=$id")
  if ask "$3" "${group[@]}" describe "$3" "${at[@]}" '--format=value(name)'; then
    tell ok "$1: $zone offers $3"
  elif ((absent)); then
    tell missing "$1: $zone does not offer $3" "$(words gcloud "${group[@]}" list "${at[@]}") # what it offers"
  else
    tell unknown "$1: $reason"
  fi
}

# Prints the limit of a quota in the zone or in its region, the lower of both; nothing where none is named. Reads lines
# of ID,ZONE,REGION,LIMIT,LOCATION;LOCATION;... A line without zone and region is for those of its locations that have
# none of their own, one without a limit is 0, and -1 is no limit.
limit() { # ID
  awk -F, -v id="$1" -v zone="$zone" -v region="$region" '
    function consider(place, named) {
      value = $4 == "" ? 0 : $4
      if (value !~ /^-?[0-9]+$/) return
      if (value < 0 || value > 999999999) value = 999999999
      if (named == place) own[place] = value
      else if (named == "" && index(";" $5 ";", ";" place ";")) rest[place] = value
    }
    $1 == id "PerProjectPerZoneForTPUAPI" { consider(zone, $2) }
    $1 == id "PerProjectPerRegionForTPUAPI" { consider(region, $3) }
    END {
      for (place in rest) if (!(place in own)) own[place] = rest[place]
      least = 1e9
      for (place in own) if (own[place] + 0 < least) least = own[place] + 0
      if (least < 1e9) printf "%d\n", least
    }'
}

# Quotas are called as in the API refusals ("Quota limit TPUV6EPerProjectPerZoneForTPUAPI has been exceeded"); which of
# them v5e takes is in https://cloud.google.com/tpu/docs/quota. They count what the number in a type counts.
check_quota() {
  local units=$((${type##*-} * slices)) kind='' quota found columns
  if ((reserved)); then
    tell unknown 'quota: no quota tells of reserved TPUs, the reservation does' "$quotas"
    return
  fi
  if ((spot)); then kind=Preemptible; fi
  case "$type" in
    v5litepod-[148]) quota=TPUV5s${kind}LitepodServing ;;
    v5litepod-*) quota=TPUV5s${kind}Litepod ;;
    v5p-*) quota=TPUV5P$kind ;;
    v6e-*) quota=TPUV6E$kind ;;
    v[23]-8) quota=TPUV${type:1:1}s$kind ;;
    *) quota=TPUV${type:1:1}s${kind}Pod ;;
  esac
  columns=quotaId,dimensionsInfos.dimensions.zone,dimensionsInfos.dimensions.region
  columns+=,dimensionsInfos.details.value,dimensionsInfos.applicableLocations
  if ! ask '' beta quotas info list --service=tpu.googleapis.com "--project=$id" '--flatten=dimensionsInfos[]' \
    "--format=csv[no-heading]($columns)"; then
    tell unknown "quota: $reason" \
      "gcloud services enable cloudquotas.googleapis.com --project=$id  # and roles/cloudquotas.viewer; or look: $quotas"
    return
  fi
  found=$(limit "$quota" <<<"$answer")
  if ! whole "$found" 0 999999999; then
    tell unknown "quota: gcloud names none that begins with $quota for $zone" "$quotas"
  elif ((found >= units)); then
    tell ok "quota: $quota is enough for $units in $zone; how many are in use, or free there, it does not tell"
  else
    tell missing "quota: $quota allows $found in $zone, and $units are needed" "$(
      words gcloud beta quotas preferences create --service=tpu.googleapis.com "--project=$id" \
        "--quota-id=${quota}PerProjectPerZoneForTPUAPI" "--preferred-value=$units" "--dimensions=zone=$zone"
    )"
  fi
}

# ---- The network.

# Prints the number of workers of a slice: up to 8 chips of v5e and v6e are one machine, beyond that and elsewhere a
# machine has 4 chips, which the types of the others count as 8 TensorCores.
machines() {
  local size=${type##*-}
  case "$type" in
    v5litepod-[148] | v6e-[148]) echo 1 ;;
    v5litepod-* | v6e-*) echo $((size / 4)) ;;
    *) echo $((size < 8 ? 1 : size / 8)) ;;
  esac
}

check_addresses() {
  local free
  if ! ask '' compute regions describe "$region" "--project=$id" '--flatten=quotas[]' \
    '--format=csv[no-heading](quotas.metric,quotas.limit,quotas.usage)'; then
    tell unknown "addresses: $reason"
    return
  fi
  free=$(awk -F, '$1 == "IN_USE_ADDRESSES" { printf "%d", ($2 > 1e6 ? 1e6 : $2) - $3 }' <<<"$answer")
  if ! whole "$free" 0 999999999; then
    tell unknown "addresses: gcloud does not tell how many external ones $region has left" "$quotas"
  elif ((free >= needed)); then
    tell ok "addresses: $region has $free external ones left, the workers take $needed"
  else
    tell missing "addresses: $region has $free external ones left, the workers take $needed" \
      "--internal-ips (with a Cloud NAT), or ask for more IN_USE_ADDRESSES: $quotas"
  fi
}

# Without external addresses, what is installed (from PyPI, and Python 3.11 from Ubuntu's mirrors or GitHub) comes
# through a Cloud NAT, and Google's own services, buckets among them, through Private Google Access.
check_nat() {
  local net=${network:-default} host=$id subnet name='' nats=0 at
  subnet=${subnetwork:-$net}
  if [[ $net == projects/*/* ]]; then host=${net#projects/} host=${host%%/*}; fi
  net=${net##*/} subnet=${subnet##*/}
  at=("--region=$region" "--project=$host")
  if ! ask "$net,1" compute routers list "--regions=$region" "--project=$host" \
    '--format=csv[no-heading](network.basename(),nats.len())'; then
    tell unknown "NAT: $reason"
  else
    while IFS=, read -r name nats; do
      if [[ $name == "$net" ]] && whole "$nats" 1 100000; then break; fi
    done <<<"$answer"
    if [[ $name == "$net" ]] && whole "$nats" 1 100000; then
      tell ok "NAT: the network $net has one in $region"
    else
      tell missing "NAT: the network $net has none in $region, and without one nothing is installed on the workers" "$(
        words gcloud compute routers create pflow "--network=$net" "${at[@]}"
      )&& $(
        words gcloud compute routers nats create pflow --router=pflow "${at[@]}" --auto-allocate-nat-external-ips \
          --nat-all-subnet-ip-ranges
      ) # costs by the hour"
    fi
  fi
  if ! ask True compute networks subnets describe "$subnet" "${at[@]}" '--format=value(privateIpGoogleAccess)'; then
    tell unknown "Private Google Access: $reason"
  elif [[ $answer == True ]]; then
    tell ok "Private Google Access: the subnetwork $subnet has it"
  else
    tell missing "Private Google Access: the subnetwork $subnet in $region does not have it" \
      "$(words gcloud compute networks subnets update "$subnet" "${at[@]}" --enable-private-ip-google-access)"
  fi
}

check_keys() {
  local code=0
  if ((dry)); then
    words ssh-add -l
    return
  fi
  ssh-add -l >/dev/null 2>&1 </dev/null || code=$?
  case "$code" in
    0) tell ok 'SSH: the agent has a key' ;;
    1 | 2) tell missing "SSH: no agent has a key, which gcloud wants for several workers" \
      "eval \"\$(ssh-agent)\" && ssh-add ~/.ssh/google_compute_engine  # ssh-keygen -f ~/.ssh/google_compute_engine" ;;
    *) tell unknown 'SSH: there is no ssh-add here' ;;
  esac
}

# ---- The buckets.

# Tells whether a bucket lies where the TPU is: elsewhere what is read costs money, and time. Fails where there is none.
check_place() { # BUCKET
  local location kind near=0
  local columns='csv[no-heading](location,location_type)'
  if ! ask "${region^^},region" storage buckets describe "gs://$1" "--format=$columns"; then
    if ((absent)); then
      tell missing "bucket: there is no gs://$1" "$(
        words gcloud storage buckets create "gs://$1" "--location=$region" "--project=$id"
      )"
      return 1
    else
      tell unknown "bucket: where gs://$1 is: $reason" "$(
        words gcloud storage buckets add-iam-policy-binding "gs://$1" "--member=$me" \
          --role=roles/storage.legacyBucketReader
      )"
    fi
    return
  fi
  IFS=, read -r location kind <<<"$answer"
  # Names of a pair or a continent: NAM4, EUR4, ASIA1, US, EU, ASIA.
  case "$location:$region" in
    "${region^^}":* | US:us-* | NAM[0-9]*:us-* | EU:europe-* | EUR[0-9]*:europe-* | ASIA*:asia-*) near=1 ;;
  esac
  if ((near)); then
    tell ok "bucket: gs://$1 is in $location ($kind), the TPU in $region"
  else
    tell missing "bucket: gs://$1 is in $location ($kind), the TPU in $region: what it reads costs money and time" \
      "another --zone, or: $(words gcloud storage buckets create gs://NEW "--location=$region" "--project=$id")"
  fi
}

# Writes, reads and removes an object; the flags choose in whose name.
use_bucket() { # FLAGS...
  probe=${folder%/}/.pflow-check-$$-$RANDOM
  echo "$probe" >"$temporary/probe"
  ask '' storage cp "$temporary/probe" "$probe" "$@" || return 1
  # What was written is to be removed, also when this is interrupted from here on.
  ask "$probe" storage cat "$probe" "$@" && [[ $answer == "$probe" ]] || return 1
  ask '' storage rm "$probe" "$@" || return 1
  probe=''
}

forget_probe() {
  if [[ $probe ]] && ((!dry)); then gcloud storage rm "$probe" </dev/null >/dev/null 2>&1 || true; fi
  probe=''
}

check_bucket() { # BUCKET
  local worker=${service_account:-$number-compute@developer.gserviceaccount.com}
  local role=roles/storage.objectAdmin
  local grant=(gcloud storage buckets add-iam-policy-binding "gs://$1")
  if use_bucket; then
    tell ok "bucket: $account writes, reads and removes objects in $folder"
  else
    forget_probe
    tell missing "bucket: $account cannot write, read and remove objects in $folder: $reason" \
      "$(words "${grant[@]}" "--member=$me" "--role=$role")"
  fi
  if use_bucket "--impersonate-service-account=$worker"; then
    tell ok "bucket: $worker, as which the workers act, writes, reads and removes objects in $folder"
  elif [[ $reason == *iam.serviceAccounts.getAccessToken* || $reason == *mpersonat* ]]; then
    forget_probe
    tell unknown "bucket: whether the workers, as $worker, write to it: $account may not act as that" "$(
      words gcloud iam service-accounts add-iam-policy-binding "$worker" "--member=$me" \
        --role=roles/iam.serviceAccountTokenCreator "--project=$id"
    )"
  else
    forget_probe
    tell missing "bucket: $worker, as which the workers act, cannot write, read and remove them in $folder: $reason" \
      "$(words "${grant[@]}" "--member=serviceAccount:$worker" "--role=$role")"
  fi
}

check_service_account() {
  local group=(iam service-accounts)
  if ! ask "$service_account" "${group[@]}" describe "$service_account" "--project=$id" '--format=value(email)'; then
    if ((absent)); then
      tell missing "service account: there is no $service_account" \
        "$(words gcloud "${group[@]}" create "${service_account%%@*}" "--project=$id")"
    else
      tell unknown "service account: $reason"
    fi
    return
  fi
  tell ok "service account: $service_account is there; whether you may attach it (iam.serviceAccountUser), nobody tells"
}

# ---- What is on the workers.

# Prints the bucket that --prepare mounts with gcsfuse; nothing where that cannot be told.
mounted() {
  local word words=() plain=() text=${prepare//[\"\']/}
  read -ra words <<<"${text//[$'\n;&|(){}']/ ; } ;"
  for word in "${words[@]}"; do
    case "$word" in
      gcsfuse | */gcsfuse) plain=(gcsfuse) ;;
      -*) ;;
      \;)
        # Before the last two words, BUCKET FOLDER, there may be values of flags.
        if ((${#plain[@]} > 2)) && matches "${plain[-2]}" '[a-z0-9][-a-z0-9._]{1,220}'; then
          echo "${plain[-2]}"
          return
        fi
        plain=()
        ;;
      *) if ((${#plain[@]})); then plain+=("$word"); fi ;;
    esac
  done
}

# Says that a path of the workers' own disks has nothing on a TPU that is new, unless --prepare brings it.
check_data() { # WHAT NAME
  local path=$2
  if [[ $path =~ ^(latents|folder|parquet|webdataset|npz|prompts|lakonlab|edm2|meanflow):(.*)$ ]]; then
    path=${BASH_REMATCH[2]}
  elif [[ $path != */* || $path == *:* ]]; then
    return # a data set that has no files of yours
  fi
  if [[ $prepare || $path == gs://* ]]; then return; fi
  if ask READY compute tpus tpu-vm describe "${nodes[0]}" "${where[@]}" '--format=value(state)'; then
    tell unknown "data: whether $path, $1, is on the workers of $name" \
      '--prepare COMMAND brings it, also to a TPU that is made anew'
  elif ((absent)); then
    tell missing "data: $path, $1, is not on a new TPU" "--prepare 'sudo install -d -o \$USER /data; mountpoint -q /data || \
gcsfuse --implicit-dirs BUCKET /data'  # what it lies in"
  else
    tell unknown "data: whether $path, $1, is on the workers: $reason"
  fi
}

# ---- The run.

check_storage() {
  local folder rest="${flags[*]}" bucket mount seen=' ' gone=' ' i
  folders "$needed"
  if [[ $problem ]]; then tell missing "folders: $problem"; fi
  if [[ $scopes && ! $scopes =~ /(cloud-platform|devstorage\.(read_write|full_control))(,|$) ]]; then
    tell missing 'scopes: with these the workers cannot write to buckets' '--scopes=cloud-platform, or none'
  fi
  mount=$(mounted)
  if [[ $mount ]]; then rest+=" gs://$mount"; fi
  while [[ $rest =~ gs://([a-z0-9][-a-z0-9._]{1,220}) ]]; do
    bucket=${BASH_REMATCH[1]}
    rest=${rest#*"gs://$bucket"}
    if [[ $seen != *" $bucket "* ]] && ! check_place "$bucket"; then gone+="$bucket "; fi
    seen+="$bucket "
  done
  folder=${out:-$workdir}
  bucket=${folder#gs://} bucket=${bucket%%/*}
  if [[ $folder != gs://* || $gone == *" $bucket "* ]]; then
    : # nothing to try
  elif matches "$folder" 'gs://[a-z0-9][-a-z0-9._]{1,220}(/[-A-Za-z0-9._=/]*)?'; then
    check_bucket "$bucket"
  else
    tell unknown "bucket: what may be done in ${folder@Q}, a name with other signs than letters, digits and -._=/"
  fi
  folder=gs://$mount
  if [[ $mount && $gone != *" $mount "* && $mount != "$bucket" ]]; then
    check_bucket "$mount"
  elif [[ $prepare && ! $mount ]]; then
    tell unknown 'data: what --prepare brings to the workers; only a bucket of gcsfuse BUCKET FOLDER is looked at'
  fi
  for ((i = 0; i < ${#flags[@]}; i++)); do
    case "${flags[i]}" in
      --images=* | -images=*) check_data 'of --images' "${flags[i]#*=}" ;;
      --images | -images) check_data 'of --images' "${flags[i + 1]:-}" ;;
    esac
  done
}

# Has pflow read the config and compile its step for the slice, on this machine.
check_plan() {
  local i plan=() configured=0 code=0 line
  for ((i = 0; i < ${#flags[@]}; i++)); do
    if [[ ! ${flags[i]} =~ ^--?(no)?config([.=]|$) ]]; then continue; fi
    configured=1
    plan+=("${flags[i]}")
    if [[ ${flags[i]} != *=* && ${flags[i + 1]:--} != -* ]]; then plan+=("${flags[i + 1]}"); fi
  done
  if [[ $program != train ]] || ((!configured)); then return; fi
  plan=(pflow plan "${plan[@]}" "--topology=$type" "--slices=$slices" --nosampling)
  PATH="$PWD/.venv/bin:$PATH"
  if ((dry)); then
    words "${plan[@]}" --nosearch
    return
  fi
  if ! command -v pflow >/dev/null; then
    tell unknown 'config: pflow is not installed here, so nobody has read it' 'make demo, or pip install -e .'
    return
  fi
  say 'planning the run on this machine; compiling takes a minute or a few'
  "${plan[@]}" --nosearch >"$temporary/plan" 2>"$temporary/errors" </dev/null 3>&- 4>&- || code=$?
  if ((code == 2)); then
    tell missing "config: $(grep -a -m 1 . "$temporary/errors")"
  elif ((code)); then
    tell unknown "config: $(tail -n 1 "$temporary/errors")"
  elif line=$(grep -a -m 1 '^ *fits: ' "$temporary/plan"); then
    tell ok "config: it parses, and ${line#"${line%%[! ]*}"}"
  elif line=$(grep -a -m 1 '^ *DOES NOT FIT: ' "$temporary/plan"); then
    tell missing "config: it parses, and ${line#"${line%%[! ]*}"}" "$(words "${plan[@]}") # looks for what would fit"
  else
    tell unknown 'config: it parses; whether it fits, only the compiler knows' "$(words "${plan[@]}") # what to install"
  fi
  if line=$(grep -a -m 1 '^data ' "$temporary/plan"); then check_data 'of the config' "$(printable <<<"${line#data }")"; fi
}

check() {
  local account='' me='' id='' number='' region=${zone%-*} needed answer='' reason='' absent=0 quotas
  needed=$(($(machines) * slices))
  trap 'forget_probe; rm -rf -- "$temporary"' EXIT
  if ((!dry)) && ! command -v gcloud >/dev/null; then
    tell missing 'gcloud: it is not installed' 'https://cloud.google.com/sdk/docs/install'
  elif check_account; then
    quotas="https://console.cloud.google.com/iam-admin/quotas?project=$id"
    check_api
    check_offer type accelerator-types "$type"
    check_offer runtime versions "$version"
    check_quota
    if ((internal)); then check_nat; else check_addresses; fi
    if ((needed > 1)); then check_keys; fi
    if [[ $service_account ]]; then check_service_account; fi
    if ((${#flags[@]})); then
      check_storage
    else
      tell unknown 'run: without its flags nobody has looked at its bucket and its config' \
        'launch/tpu.sh check SETTINGS -- FLAGS'
    fi
  else
    tell unknown 'the rest, before gcloud has an account and a project'
  fi
  check_plan
  if ((lacking)); then fail "$lacking missing; below each is what mends it"; fi
  if ((doubts)); then
    say "nothing is missing of what could be looked at; $doubts above are unknown"
  elif ((!dry)); then
    say 'nothing that could be looked at is missing'
  fi
}
