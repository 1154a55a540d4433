#!/usr/bin/env bash
# Makes what the benchmarks compare with, each in an environment of its own under benchmarks/.peers:
#   trl112  TRL 1.12.0, the last release with a PPO trainer, before this project's own pinned packages (.venv)
#   trl07   classic TRL 0.7.11 and the libraries of its time, on this project's torch (about 1.5 GB)
# A second run does nothing. Needs .venv: any script of scripts/ makes it.
set -euo pipefail
cd "$(dirname "$0")/.."

TRL112=(trl==1.12.0)
TRL07=(trl==0.7.11 transformers==4.37.2 peft==0.5.0 accelerate==0.27.2 tokenizers==0.15.2 datasets==2.21.0
  pyarrow==15.0.2 pandas==2.1.4 numpy==1.26.4)
torch="$(grep '^torch==' requirements.txt)"

if [ ! -x .venv/bin/python ]; then
  echo "no .venv: run bash scripts/run_demo.sh, or source scripts/setup_venv.sh, first" >&2
  exit 1
fi

# $1: name of the environment; the rest: what it was made of. True where exactly that was installed before.
made() {
  [ "$(cat "benchmarks/.peers/$1/installed" 2> /dev/null || true)" = "${*:2}" ]
}

new_environment() {
  echo "making benchmarks/.peers/$1"
  rm -rf "benchmarks/.peers/$1"
  .venv/bin/python -m venv "benchmarks/.peers/$1"
}

install_into() {
  "benchmarks/.peers/$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

packages_of() {
  "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

if ! made trl112 "${TRL112[@]}"; then
  new_environment trl112
  install_into trl112 --no-deps "${TRL112[@]}"
  # A .pth file adds to the end of the path: this TRL is found before the project's.
  packages_of .venv > "$(packages_of benchmarks/.peers/trl112)/project.pth"
  echo "${TRL112[*]}" > benchmarks/.peers/trl112/installed
fi
if ! made trl07 "$torch" "${TRL07[@]}"; then
  new_environment trl07
  # torch first and alone: a resolver that sees it together with the rest may prefer another build of it.
  install_into trl07 "$torch"
  install_into trl07 "$torch" "${TRL07[@]}"
  echo "$torch ${TRL07[*]}" > benchmarks/.peers/trl07/installed
fi
