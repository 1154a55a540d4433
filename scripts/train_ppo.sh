#!/usr/bin/env bash
# Stage 3 at 7B: PPO from the SFT adapter, by the tutorial's settings with a standardized score and gradient
# checkpointing, on one card of 24 GB. The variables can be set from outside, further flags go to rl_training.py. Given
# again after an interruption, it goes on from the newest complete step_<n>.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

BASE="${BASE:-baichuan-inc/baichuan-7B}"
DATA="${DATA:-beyond/rlhf-reward-single-round-trans_chinese}"
SFT_LORA="${SFT_LORA:-$ROOT/runs/sft}"
REWARD_LORA="${REWARD_LORA:-$ROOT/runs/reward}"
# A merged SFT model (scripts/merge_sft.sh) as reference costs a second base in memory; empty: the SFT adapter itself.
MERGED="${MERGED:-}"
OUTPUT="${OUTPUT:-$ROOT/runs/ppo}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

reference=()
if [[ -n "$MERGED" ]]; then reference=(--merged_sft_model_path "$MERGED"); fi

# One process for each visible GPU is started by the script itself; CUDA_VISIBLE_DEVICES chooses among them.
exec "$PYTHON" "$ROOT/rl_training.py" \
  --base_model_name "$BASE" \
  --dataset_name "$DATA" \
  --sft_model_lora_path "$SFT_LORA" \
  --reward_model_lora_path "$REWARD_LORA" \
  ${reference[@]+"${reference[@]}"} \
  --output_dir "$OUTPUT" \
  --reward_transform standardize \
  --adafactor False \
  --save_freq 10 \
  --output_max_length 256 \
  --batch_size 8 \
  --gradient_accumulation_steps 16 \
  --batched_gen True \
  --ppo_epochs 4 \
  --seed 0 \
  --learning_rate 1e-5 \
  --early_stopping True \
  --reward_gate refuse \
  --gradient_checkpointing True \
  --resume_from_checkpoint True \
  "$@"
