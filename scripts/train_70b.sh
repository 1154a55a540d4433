#!/usr/bin/env bash
# Recipe for a base larger than a card: one machine of eight cards of 80 GB, which share one copy of the base. A reward model,
# then PPO from the bare chat model in its own chat format. Before anything else, what each stage needs, and moves:
#   DATA=pairs.jsonl bash scripts/train_70b.sh --plan
# Environment: DATA (preference pairs), PROMPTS (prompts of PPO, default DATA), BASE (default meta-llama/Llama-3.3-70B-Instruct;
# Qwen/Qwen2.5-72B-Instruct has 8 heads of keys and values, too), RUNS (default runs/70b), NPROC (cards), RM_FLAGS, PPO_FLAGS
# (further flags of each stage), PYTHON. Given again after an interruption, it goes on where it stopped.
#
# Two such machines, each with a copy of its own, between which nothing but adapter gradients moves: start each stage on both by
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/multi_node.sh rl_training.py --shard_base True ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/forward.sh
source "$ROOT/scripts/forward.sh"

BASE="${BASE:-meta-llama/Llama-3.3-70B-Instruct}"
DATA="${DATA:?give DATA, a file or hub id of preference pairs (prompt, chosen, rejected)}"
PROMPTS="${PROMPTS:-$DATA}"
RUNS="${RUNS:-$ROOT/runs/70b}"
NPROC="${NPROC:-8}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

# A plan writes nothing, and needs neither the base's weights nor the reward model of the first stage.
last=(--resume_from_checkpoint True)
if [[ "${1:-}" == "--plan" ]]; then last=(--plan True); fi

# All processes share one copy; each layer is gathered while it runs, and decoding leaves it where it lies.
common=(--shard_base True --nproc "$NPROC" --gradient_checkpointing True
  --prompt_template chat --lora_target_models all-linear --lora_rank 16 --lora_alpha 32)

# Flags are words to be split.
# shellcheck disable=SC2086
{
  echo "== reward model"
  forward "$PYTHON" "$ROOT/reward_modeling.py" \
    --model_name "$BASE" \
    --dataset_name "$DATA" \
    --output_dir "$RUNS/reward" \
    "${common[@]}" \
    --learning_rate 2e-5 \
    --warmup_ratio 0.03 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --per_device_eval_batch_size 16 \
    --max_length 1024 \
    --degenerate_frac 0.2 \
    --eval_steps 200 \
    --save_steps 100 \
    "${last[@]}" \
    ${RM_FLAGS:-}

  echo "== PPO"
  forward "$PYTHON" "$ROOT/rl_training.py" \
    --base_model_name "$BASE" \
    --dataset_name "$PROMPTS" \
    --reward_model_lora_path "$RUNS/reward" \
    --output_dir "$RUNS/ppo" \
    "${common[@]}" \
    --reward_transform standardize \
    --steps 10000 \
    --batch_size 32 \
    --mini_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --ppo_epochs 2 \
    --max_prompt_length 512 \
    --output_max_length 256 \
    --init_kl_coef 0.05 \
    --adap_kl_ctrl True \
    --eval_freq 10 \
    --save_freq 10 \
    --save_total_limit 3 \
    --reward_gate refuse \
    "${last[@]}" \
    ${PPO_FLAGS:-}
}
