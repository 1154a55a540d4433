# Sourced by the scripts beside it, from the project's root: makes .venv if needed, installs the requirements file named
# by $1 unless exactly it was installed before, and activates the environment.
requirements="${1:-requirements.txt}"
python="${PYTHON:-python3}"

if [ ! -x .venv/bin/python ]; then
  if ! command -v "$python" > /dev/null; then
    echo "Python 3.11 or newer is needed, and there is no $python: install it, or name yours with PYTHON=..." >&2
    exit 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1): name a newer one with PYTHON=..." >&2
    exit 1
  fi
  echo "making .venv"
  "$python" -m venv .venv
fi

# shellcheck disable=SC1091
source .venv/bin/activate
# What was installed last: the texts of both files, so that a change of either installs again.
wanted="$(cat requirements.txt "$requirements" | cksum)"
if [ "$(cat ".venv/installed_$requirements" 2> /dev/null || true)" != "$wanted" ]; then
  echo "installing $requirements (a few minutes the first time)"
  # torch first and alone: a resolver that sees it together with the rest may prefer another build of it.
  python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  echo "$wanted" > ".venv/installed_$requirements"
fi
