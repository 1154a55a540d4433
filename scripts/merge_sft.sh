#!/usr/bin/env bash
# Merges the SFT adapter into its base: a standalone model, which train_ppo.sh takes as reference where MERGED is set.
# The variables can be set from outside, further flags go to merge_lora.py. A finished merge is left as it is.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

BASE="${BASE:-baichuan-inc/baichuan-7B}"
SFT_LORA="${SFT_LORA:-$ROOT/runs/sft}"
OUTPUT="${OUTPUT:-$ROOT/merged/sft}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

if [[ -f "$OUTPUT/run.json" ]]; then
  echo "$OUTPUT is there already: remove it to merge again"
  exit 0
fi
exec "$PYTHON" "$ROOT/merge_lora.py" --base_model_name "$BASE" --lora_path "$SFT_LORA" --output_dir "$OUTPUT" "$@"
