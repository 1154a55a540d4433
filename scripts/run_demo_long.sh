#!/usr/bin/env bash
# Over-optimisation in small: 160 PPO steps against the demo's own good reward model, once without a KL
# penalty and once with one, evaluated by the demo's judge: bash scripts/run_demo_long.sh [--seed N] [--output_dir DIR]
# [--demo_dir DIR] [--smoke True]. Starts from the demo's models (made first where missing). Run again, it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements.txt

# The command lines are in demo/commands.py, and are printed as they run. The python takes this shell's place, signals
# included.
exec python -m demo.run --story long "$@"
