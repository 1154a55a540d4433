#!/usr/bin/env bash
# All of RLHF on an embedded tiny Chinese world, on a CPU, in minutes: bash scripts/run_demo.sh [--seed N] [--output_dir DIR]
# [--smoke True] (a run of seconds a stage, to see that everything works). Run again, it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=runs/demo
source scripts/demo_common.sh
WORLD=() SFT=() REWARD=() GATE=refuse PPO=(--steps 2560 --save_freq 5 --eval_freq 5) EVALUATE=()
if [ "$SMOKE" = True ]; then
  WORLD=(--base_pages 480 --sft_rows 64 --pairs 64 --eval_pairs 16)
  SFT=(--max_steps 2) REWARD=(--max_steps 2 --audit_prompts 10) GATE=warn PPO=(--steps 128 --save_freq 1 --eval_freq 1 --on_collapse off)
  EVALUATE=(--prompts 16 --max_new_tokens 16)
fi

mkdir -p "$OUT"
# merge_lora.py refuses a directory in use, and the times of an earlier run would be added to this one's.
rm -rf "${OUT:?}/merged" "$OUT/seconds.txt"

stage base python -m demo.build --output_dir "$OUT" --seed "$SEED" ${WORLD[@]+"${WORLD[@]}"}

stage sft python sft_training.py --model_name "$OUT/base" \
  "${ADAPTER[@]}" --dataset_name "$OUT/data/sft.jsonl" --eval_dataset_name "$OUT/data/sft_eval.jsonl" --num_train_epochs 3 --max_length 128 \
  --logging_steps 50 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 --learning_rate 2e-3 --eval_steps 0 --save_steps 0 \
  --seed "$SEED" --overwrite_output_dir True --output_dir "$OUT/sft" ${SFT[@]+"${SFT[@]}"}

# Two reward models on disjoint halves of the prompts: the one that PPO maximises, and the judge, which PPO never sees.
for half in 0 1; do
  name="$([ $half = 0 ] && echo reward || echo judge)"
  stage "$name" python reward_modeling.py --model_name "$OUT/base" "${ADAPTER[@]}" "${REWARD_SETTINGS[@]}" \
    --dataset_name "$OUT/data/preferences.jsonl" --eval_dataset_name "$OUT/data/preferences_eval.jsonl" \
    --split_half $half --degenerate_frac 0.25 --seed "$SEED" --overwrite_output_dir True --output_dir "$OUT/$name" \
    ${REWARD[@]+"${REWARD[@]}"}
done

stage merge python merge_lora.py --base_model_name "$OUT/base" --lora_path "$OUT/sft" --dtype float32 --output_dir "$OUT/merged"

stage ppo python rl_training.py --base_model_name "$OUT/base" --merged_sft_model_path "$OUT/merged" \
  --sft_model_lora_path "$OUT/sft" --reward_model_lora_path "$OUT/reward" --judge_lora_path "$OUT/judge" \
  --dataset_name "$OUT/data/prompts.jsonl" --eval_size 100 --eval_prompts 100 --reward_gate "$GATE" \
  "${PPO_SETTINGS[@]}" --init_kl_coef 0.1 --seed "$SEED" --overwrite_output_dir True \
  --output_dir "$OUT/ppo" "${PPO[@]}"

# Some checkpoints of PPO's first half beside its end; a smoke run has not all of them.
versions=("sft=$OUT/sft")
for step in 1 10 20; do
  if [ -d "$OUT/ppo/step_$step" ]; then versions+=("rlhf$step=$OUT/ppo/step_$step"); fi
done
stage compare python compare.py --base_model_name "$OUT/base" --adapters "${versions[@]}" "rlhf=$OUT/ppo" \
  --prompts "$OUT/data/compare.txt" --reward_model_lora_path "$OUT/reward" --max_new_tokens 64 --temperature 0.7 --seed "$SEED" \
  --output_dir "$OUT/compare"

stage evaluate python -m demo.evaluate --output_dir "$OUT" --seed "$SEED" ${EVALUATE[@]+"${EVALUATE[@]}"}
python -m demo.report --output_dir "$OUT"
