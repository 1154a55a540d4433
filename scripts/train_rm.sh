#!/usr/bin/env bash
# Stage 2 at 7B: reward adapter with its score head, by the tutorial's settings with gradient checkpointing, on
# one card of 24 GB. The variables can be set from outside, further flags go to reward_modeling.py. Given again after an
# interruption, it goes on from the newest checkpoint.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

BASE="${BASE:-baichuan-inc/baichuan-7B}"
DATA="${DATA:-beyond/rlhf-reward-single-round-trans_chinese}"
OUTPUT="${OUTPUT:-$ROOT/runs/reward}"
LORA_TARGETS="${LORA_TARGETS:-W_pack}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

# One process for each visible GPU is started by the script itself; CUDA_VISIBLE_DEVICES chooses among them.
exec "$PYTHON" "$ROOT/reward_modeling.py" \
  --model_name "$BASE" \
  --dataset_name "$DATA" \
  --output_dir "$OUTPUT" \
  --lora_target_models "$LORA_TARGETS" \
  --num_train_epochs 2 \
  --degenerate_frac 0.2 \
  --eval_steps 200 \
  --save_steps 50 \
  --per_device_train_batch_size 10 \
  --per_device_eval_batch_size 16 \
  --train_subset -1 \
  --eval_subset -1 \
  --max_length 1000 \
  --gradient_checkpointing True \
  --resume_from_checkpoint True \
  "$@"
