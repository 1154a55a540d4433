#!/usr/bin/env bash
# The tutorial's collapse in small: a careless reward model, PPO without guards, PPO with them; on the base and SFT model
# of the demo (made first where missing): bash scripts/run_demo_collapse.sh [--seed N] [--output_dir DIR] [--demo_dir DIR]
# [--smoke True]. Run again, it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=runs/demo_collapse DEMO=runs/demo
source scripts/demo_common.sh
PAIRS=(--pairs 400 --eval_pairs 200) REWARD=(--max_steps 60) PPO=(--steps 3200 --save_freq 10 --eval_freq 5) STORY=()
if [ "$SMOKE" = True ]; then
  PAIRS=(--pairs 32 --eval_pairs 8) REWARD=(--max_steps 2 --audit_prompts 10) PPO=(--steps 128 --save_freq 1 --eval_freq 1)
  STORY=(--prompts 16 --max_new_tokens 16)
fi
need_demo
mkdir -p "$OUT"
rm -f "$OUT/seconds.txt"

stage pairs python -m demo.pairs --kind careless --demo_dir "$DEMO" --output_dir "$OUT" --seed "$SEED" "${PAIRS[@]}"

stage reward python reward_modeling.py --model_name "$DEMO/base" "${ADAPTER[@]}" "${REWARD_SETTINGS[@]}" \
  --dataset_name "$OUT/pairs.jsonl" --eval_dataset_name "$OUT/pairs_eval.jsonl" \
  --seed "$SEED" --overwrite_output_dir True --output_dir "$OUT/reward" "${REWARD[@]}"

# Both runs maximise the careless reward model without a KL penalty; the demo's own reward model is the judge of both.
# Only the second run acts on its scores: it rolls back to the weights that the judge liked last, and starts a KL penalty.
ppo=(python rl_training.py --base_model_name "$DEMO/base" --sft_model_lora_path "$DEMO/sft"
  --reward_model_lora_path "$OUT/reward" --judge_lora_path "$DEMO/reward" --dataset_name "$DEMO/data/prompts.jsonl"
  "${PPO_SETTINGS[@]}" "${PPO[@]}" --eval_size 200 --eval_prompts 200 --init_kl_coef 0 --seed "$SEED" --overwrite_output_dir True)
stage unguarded "${ppo[@]}" --on_collapse off --output_dir "$OUT/unguarded"
# Exit code 3 means that the guard ended the run, which is a result here and no error.
stage guarded "${ppo[@]}" --on_collapse rollback --output_dir "$OUT/guarded" || [ $? -eq 3 ]

stage story python -m demo.story --demo_dir "$DEMO" --output_dir "$OUT" --seed "$SEED" \
  --title "A careless reward model: PPO without guards and with them" \
  --runs "without guards=$OUT/unguarded" "with guards=$OUT/guarded" ${STORY[@]+"${STORY[@]}"}
