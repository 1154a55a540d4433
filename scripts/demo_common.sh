# Sourced by the run_demo*.sh scripts beside it, from the project's root, after OUT has its default: reads --seed,
# --output_dir, --smoke and (where DEMO is set) --demo_dir, sets up the environment, and gives them `stage`.
SEED=0 SMOKE=False
usage="usage: bash scripts/$(basename "$0") [--seed N] [--output_dir DIR] [--smoke True]${DEMO:+ [--demo_dir DIR]}"
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) SEED="${2:?--seed needs a number}"; shift 2 ;;
    --output_dir) OUT="${2:?--output_dir needs a directory}"; shift 2 ;;
    --smoke) SMOKE="${2:?--smoke needs True or False}"; shift 2 ;;
    --demo_dir) DEMO="${2:?--demo_dir needs a directory}"; shift 2 ;;
    *) echo "$usage" >&2; exit 2 ;;
  esac
done
source scripts/setup_venv.sh requirements.txt
source scripts/forward.sh

# The models are far too small for a GPU or for more than two threads, and nothing is fetched from a hub.
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

# All layers get an adapter of rank 16: the models are tiny, and what they learn is not.
ADAPTER=(--lora_target_models 'W_pack|o_proj|gate_proj|up_proj|down_proj' --lora_rank 16)
REWARD_SETTINGS=(--lora_dropout 0 --max_length 128 --per_device_train_batch_size 16 --per_device_eval_batch_size 64
  --learning_rate 2e-3 --eval_steps 0 --save_steps 0 --logging_steps 50)
PPO_SETTINGS=(--reward_transform standardize --batch_size 64 --mini_batch_size 32 --gradient_accumulation_steps 2
  --ppo_epochs 4 --learning_rate 8e-4 --output_max_length 48)

# Runs one stage, shows its command line, and notes how long it took.
stage() {
  local name="$1" begin=$SECONDS
  shift
  printf '\n== %s\n$ %s\n' "$name" "$*"
  forward "$@" || return $?
  echo "$name $((SECONDS - begin))" >> "$OUT/seconds.txt"
}

# The base, SFT and reward model of a finished demo in DEMO; made first where they are missing.
need_demo() {
  if [ ! -f "$DEMO/summary.json" ]; then
    echo "$DEMO holds no finished demo: running it first"
    bash scripts/run_demo.sh --seed "$SEED" --output_dir "$DEMO" --smoke "$SMOKE"
  fi
}
