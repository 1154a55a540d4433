#!/usr/bin/env bash
# All of RLHF on an embedded tiny Chinese world, on a CPU, in minutes: bash scripts/run_demo.sh [--seed N] [--output_dir DIR]
# [--smoke True] (a run of seconds a stage, to see that everything works) [--build_base True] [--language zh] [--page True] (at
# the end a page in the browser, to vote between SFT and PPO). Run again, it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements.txt

# The command lines are in demo/commands.py, and are printed as they run. The python takes this shell's place, signals
# included.
exec python -m demo.run --story demo "$@"
