#!/usr/bin/env bash
# All stages at 7B one after the other with the settings of the scripts beside this one: SFT, reward model, PPO, on
# one card of 24 GB. With MERGE=True the SFT model is merged before PPO and is its reference: a second base in memory.
# A stage that fails or is interrupted ends the pipeline with its exit code; given again, it goes on where it stopped.
# Environment: BASE, RUNS (default runs), SFT_DATA, RM_DATA, PPO_DATA (data of each stage), SFT_FLAGS, RM_FLAGS, PPO_FLAGS,
# MERGE_FLAGS (further flags of each stage), LORA_TARGETS, PYTHON.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
RUNS="${RUNS:-$here/../runs}"
# shellcheck source=scripts/forward.sh
source "$here/forward.sh"

# An empty value would stand for a data set: unset leaves the stage its own.
stage() {
  local script="$1" output="$2" data="$3"
  shift 3
  echo "== $script"
  if [ -n "$data" ]; then export DATA="$data"; else unset DATA; fi
  export OUTPUT="$output"
  forward bash "$here/$script" "$@"
}

export SFT_LORA="$RUNS/sft" REWARD_LORA="$RUNS/reward"
if [ "${MERGE:-}" = True ]; then export MERGED="$RUNS/merged"; fi
# Flags are words to be split.
# shellcheck disable=SC2086
{
  stage train_sft.sh "$SFT_LORA" "${SFT_DATA:-}" ${SFT_FLAGS:-}
  stage train_rm.sh "$REWARD_LORA" "${RM_DATA:-}" ${RM_FLAGS:-}
  if [ "${MERGE:-}" = True ]; then stage merge_sft.sh "$MERGED" "" ${MERGE_FLAGS:-}; fi
  stage train_ppo.sh "$RUNS/ppo" "${PPO_DATA:-}" ${PPO_FLAGS:-}
}
