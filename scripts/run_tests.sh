#!/usr/bin/env bash
# Sets up .venv if needed, lints, runs every test. Arguments go to pytest: `bash scripts/run_tests.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements-dev.txt

ruff check .
ruff format --check .
# One thread each: the models of the tests are too small to share out.
# A worker for each core; a file stays with one worker, because its tests share what they set up.
# The order is tests/conftest.py's own: the longest files first.
OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
