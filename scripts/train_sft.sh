#!/usr/bin/env bash
# Stage 1 at 7B: SFT adapter, on one card of 16 GB. The variables can be set from outside
# (`BASE=models/baichuan-7B bash scripts/train_sft.sh`), further flags go to sft_training.py. Given again after an
# interruption, it goes on from the newest checkpoint.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

BASE="${BASE:-baichuan-inc/baichuan-7B}"
DATA="${DATA:-Hello-SimpleAI/HC3-Chinese}"
OUTPUT="${OUTPUT:-$ROOT/runs/sft}"
LORA_TARGETS="${LORA_TARGETS:-W_pack}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

# One process for each visible GPU is started by the script itself; CUDA_VISIBLE_DEVICES chooses among them.
exec "$PYTHON" "$ROOT/sft_training.py" \
  --model_name "$BASE" \
  --dataset_name "$DATA" \
  --output_dir "$OUTPUT" \
  --lora_target_models "$LORA_TARGETS" \
  --lora_rank 8 \
  --num_train_epochs 1 \
  --max_length 512 \
  --per_device_train_batch_size 4 \
  --gradient_accumulation_steps 4 \
  --learning_rate 1e-4 \
  --eval_steps 200 \
  --save_steps 200 \
  --gradient_checkpointing True \
  --resume_from_checkpoint True \
  "$@"
