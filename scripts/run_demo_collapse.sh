#!/usr/bin/env bash
# The tutorial's collapse in small: a careless reward model, PPO without guards, PPO with them; on the base and SFT model
# of the demo (made first where missing): bash scripts/run_demo_collapse.sh [--seed N] [--output_dir DIR] [--demo_dir DIR]
# [--smoke True]. Run again, it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements.txt

# The command lines are in demo/commands.py, and are printed as they run. The python takes this shell's place, signals
# included.
exec python -m demo.run --story collapse "$@"
