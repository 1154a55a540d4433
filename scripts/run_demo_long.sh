#!/usr/bin/env bash
# Over-optimisation in small: four times the demo's PPO steps against its own good reward model, once without a KL
# penalty and once with one, evaluated by the demo's judge: bash scripts/run_demo_long.sh [--seed N] [--output_dir DIR]
# [--demo_dir DIR] [--smoke True]. Starts from the demo's models (made first where missing). Run again, it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=runs/demo_long DEMO=runs/demo
source scripts/demo_common.sh
PPO=(--steps 10240 --save_freq 10 --eval_freq 10) STORY=()
if [ "$SMOKE" = True ]; then
  PPO=(--steps 128 --save_freq 1 --eval_freq 1) STORY=(--prompts 16 --max_new_tokens 16)
fi
need_demo
mkdir -p "$OUT"
rm -f "$OUT/seconds.txt"

# The judge scores the evaluations of both runs, and with --on_collapse off nothing follows from its scores.
ppo=(python rl_training.py --base_model_name "$DEMO/base" --sft_model_lora_path "$DEMO/sft"
  --reward_model_lora_path "$DEMO/reward" --judge_lora_path "$DEMO/judge" --dataset_name "$DEMO/data/prompts.jsonl"
  "${PPO_SETTINGS[@]}" "${PPO[@]}" --eval_size 200 --eval_prompts 200 --on_collapse off --seed "$SEED"
  --overwrite_output_dir True)
stage free "${ppo[@]}" --init_kl_coef 0 --output_dir "$OUT/free"
stage priced "${ppo[@]}" --init_kl_coef 0.1 --output_dir "$OUT/priced"

stage story python -m demo.story --demo_dir "$DEMO" --output_dir "$OUT" --seed "$SEED" \
  --title "160 steps against a good reward model, without a KL penalty and with one" \
  --runs "no KL penalty=$OUT/free" "0.1 a nat=$OUT/priced" ${STORY[@]+"${STORY[@]}"}
