# Sourced by the scripts beside it, from the project's root: makes .venv if needed, installs the requirements file named
# by $1 unless exactly it was installed before, and activates the environment. setup_venv.py does the work; it takes any
# Python from 3.8 on and says what to do where that is too old for the packages.
setup_by=()
for python in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2> /dev/null; then
    setup_by=("$python" -I)
    break
  fi
done
if [ "${#setup_by[@]}" = 0 ] && command -v uv > /dev/null; then
  setup_by=(uv run --quiet --no-project --python 3.12 python -I)
fi
if [ "${#setup_by[@]}" = 0 ]; then
  echo "Python 3.11 or newer is needed, and there is no ${PYTHON:-python3}: install it, or name yours with PYTHON=..." >&2
  exit 1
fi
"${setup_by[@]}" scripts/setup_venv.py "${1:-requirements.txt}" || exit 1

# shellcheck disable=SC1091
source .venv/bin/activate
