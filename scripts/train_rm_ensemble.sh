#!/usr/bin/env bash
# Stage 2 at 7B, several reward models that PPO combines: MEMBERS of them (default 4) by train_rm.sh, each on one card of 24
# GB, on a fold of its own of the prompts and from a seed of its own, into OUTPUT_1, OUTPUT_2 and so on (default
# runs/reward_1, ...). One after the other, or with GPUS="0 1 2 3" one on each of these cards at a time, their words then in
# OUTPUT_1.log and so on. Further flags go to reward_modeling.py. Given again after an interruption, it goes on where it
# stopped.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/forward.sh
source "$here/forward.sh"

MEMBERS="${MEMBERS:-4}"
prefix="${OUTPUT:-$here/../runs/reward}"
read -ra cards <<< "${GPUS:-}"

# Reward model $1; what follows are flags.
member() {
  local number="$1"
  shift
  echo "== reward model $number of $MEMBERS: ${prefix}_$number"
  export OUTPUT="${prefix}_$number"
  forward bash "$here/train_rm.sh" --fold "$number/$MEMBERS" --seed "$((number - 1))" "$@"
}

if [ "${#cards[@]}" = 0 ]; then
  for ((number = 1; number <= MEMBERS; number++)); do member "$number" "$@"; done
  exit 0
fi

# Of N cards each takes every N-th model. A model that fails ends the work of its card, not that of the others.
lane() {
  local number
  export CUDA_VISIBLE_DEVICES="${cards[$1]}"
  for ((number = $1 + 1; number <= MEMBERS; number += ${#cards[@]})); do
    member "$number" "${@:2}" > "${prefix}_$number.log" 2>&1
  done
}

pids=() signalled=""
stop() {
  signalled="$1"
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2> /dev/null || true; done
}
trap 'stop TERM' TERM
trap 'stop INT' INT

# In a process group of its own a lane gets a Ctrl-C from this script alone, and does not ignore it.
mkdir -p "$(dirname "$prefix")"
set -m
for place in "${!cards[@]}"; do
  lane "$place" "$@" &
  pids+=("$!")
done
set +m
echo "== $MEMBERS reward models on the cards ${cards[*]}: see ${prefix}_1.log"

code=0
for pid in "${pids[@]}"; do
  while :; do
    signalled=
    wait "$pid" && ended=0 || ended=$?
    # A signal ends the waiting, not the lane.
    [ -n "$signalled" ] || break
  done
  [ "$code" != 0 ] || code="$ended"
done
exit "$code"
