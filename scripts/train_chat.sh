#!/usr/bin/env bash
# Recipe for a modern chat model (Qwen3-8B, one card of 40 GB or more): a reward model, then PPO from the bare model, both in
# the model's own chat format with thinking off and an adapter on all linear layers. No SFT stage. What each stage needs:
#   DATA=pairs.jsonl bash scripts/train_chat.sh --plan
# Environment: DATA (preference pairs), PROMPTS (prompts of PPO, default DATA), BASE, RUNS (default runs/chat), KWARGS (a
# JSON object for the chat template), RM_FLAGS, PPO_FLAGS (further flags of each stage), PYTHON. Given again after an
# interruption, it goes on where it stopped.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/forward.sh
source "$ROOT/scripts/forward.sh"

BASE="${BASE:-Qwen/Qwen3-8B}"
DATA="${DATA:?give DATA, a file or hub id of preference pairs (prompt, chosen, rejected)}"
PROMPTS="${PROMPTS:-$DATA}"
RUNS="${RUNS:-$ROOT/runs/chat}"
# What a template does not know it ignores, so that this is right for Llama 3 and Gemma too.
KWARGS="${KWARGS:-{\"enable_thinking\": false\}}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

# A plan writes nothing, and needs neither the base's weights nor the reward model of the first stage.
last=(--resume_from_checkpoint True)
if [[ "${1:-}" == "--plan" ]]; then last=(--plan True); fi

# The same in both stages: an adapter on all linear layers, prompts in the chat format.
common=(--prompt_template chat --chat_template_kwargs "$KWARGS" --lora_target_models all-linear
  --lora_rank 16 --lora_alpha 32 --gradient_checkpointing True)

# Flags are words to be split.
# shellcheck disable=SC2086
{
  echo "== reward model"
  forward "$PYTHON" "$ROOT/reward_modeling.py" \
    --model_name "$BASE" \
    --dataset_name "$DATA" \
    --output_dir "$RUNS/reward" \
    "${common[@]}" \
    --learning_rate 1e-4 \
    --warmup_ratio 0.03 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --per_device_eval_batch_size 8 \
    --max_length 1024 \
    --degenerate_frac 0.2 \
    --eval_steps 200 \
    --save_steps 200 \
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
    --learning_rate 1e-5 \
    --steps 10000 \
    --batch_size 64 \
    --mini_batch_size 8 \
    --gradient_accumulation_steps 2 \
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
