# Functions that the scripts beside this one share: checks and printing of settings, and of other machines' answers.
# Sourced by them; `mistake MESSAGE` is theirs, and ends them with code 2.
#
# Bash runs commands where it computes: ((x)), $((x)), [[ x -eq 1 ]] and ${list[x]} all evaluate x = 'a[$(command)]', and
# 08 is an error there. So nothing that comes from outside is computed with before `whole` has seen it.
# shellcheck shell=bash

# Programs of pflow whose processes join each other, and which go on where they were when they are started again.
PROGRAMS='train latents convert sample evaluate'

# Whether VALUE is a whole number in a range: without a sign, blanks or leading zeros.
whole() { # VALUE MIN MAX
  [[ $1 =~ ^(0|[123456789][0123456789]{0,8})$ ]] && (($1 >= $2 && $1 <= $3))
}

refuse() { # NAME EXPECTED VALUE
  local value=${3:0:80}
  mistake "$1: expected $2, got ${value@Q}"
}

whole_number() { # NAME VALUE MIN MAX
  whole "${@:2}" || refuse "$1" "a whole number from $3 to $4" "$2"
}

# Prints 1 or 0.
switch() { # NAME VALUE
  case "$2" in
    1 | true | yes) echo 1 ;;
    '' | 0 | false | no) echo 0 ;;
    *) refuse "$1" '1 or 0' "$2" ;;
  esac
}

# Whether all of VALUE matches PATTERN, in which a-z has no more letters than that.
matches() { # VALUE PATTERN
  local LC_ALL=C
  [[ $1 =~ ^($2)$ ]]
}

# Whether it is a program of pflow that is run by these scripts.
is_program() { # WORD
  matches "$1" "${PROGRAMS// /|}"
}

# Prints Cloud's name of a slice's type: the planner's v5e-256 (pflow_jax/mesh/chips.py) is v5litepod-256 there.
accelerator() { # NAME VALUE
  local generation=${2%-*} size=${2##*-} sizes cubes=0
  local pods='1 4 8 16 32 64 128 256' small='8 16 32 64'
  case "$generation" in
    v2) sizes='8 32 128 256 512' ;;
    v3) sizes='8 32 64 128 256 512 1024 2048' ;;
    v5e | v5lite | v5litepod) generation=v5litepod sizes=$pods ;;
    v6e) sizes=$pods ;;
    # Beyond these, in cubes of 64 chips, of two TensorCores each.
    v4) sizes=$small cubes=8192 ;;
    v5p) sizes=$small cubes=12288 ;;
    # https://docs.cloud.google.com/tpu/docs/configure-networking-access: not supported on TPU7x and later.
    tpu[0-9]* | v7* | ironwood)
      refuse "$1" "a chip that the Cloud TPU API offers, up to v6e; TPU7x and later are on GKE: launch/gke.yaml and \
docs/tpu.md" "$2"
      ;;
    *)
      refuse "$1" "v5e-N (which is v5litepod-N) or v6e-N with N of $pods; v4-N or v5p-N with N of $small or a multiple of \
128; v2-N or v3-N" "$2"
      ;;
  esac
  if whole "$size" 1 "$cubes" && ((size % 128 == 0)); then sizes+=" $size"; fi
  if whole "$size" 1 100000 && [[ " $sizes " == *" $size "* ]]; then
    echo "$generation-$size"
  else
    if ((cubes)); then sizes+=" or a multiple of 128 up to $cubes"; fi
    refuse "$1" "$generation-N with N of $sizes" "$2"
  fi
}

# Passes on what another machine wrote, with a ? for each byte that could steer the terminal (ESC, CR, ..., UTF-8's CSI).
printable() { LC_ALL=C sed -u $'s/[\x01-\x08\x0b-\x1f\x7f]/?/g; s/\xc2[\x80-\x9f]/?/g'; }
