#!/usr/bin/env bash
# One stage on several machines. Give the same command on each of them, with its own NODE_RANK; they wait for each other:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/multi_node.sh rl_training.py --base_model_name ...
#
# NNODES: machines. NODE_RANK: 0 on the one that MASTER_ADDR names, then 1, 2, ... MASTER_PORT: a free port of that one.
# NPROC: processes on this machine, by default one for each visible GPU. Data, adapters and --output_dir have to be on a
# disk that all machines share; the first process of the first machine writes there, and prints.
#
# With --shard_base True each machine holds one copy of the base, in parts over its cards: layers are gathered within a machine,
# and between machines nothing moves but the gradients of the adapters and a few numbers.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_PORT="${MASTER_PORT:-29500}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

refuse() {
  echo "multi_node.sh: $1" >&2
  exit 2
}
if [[ $# -eq 0 ]]; then refuse "give the stage and its flags: sft_training.py, reward_modeling.py or rl_training.py"; fi
STAGE="$1"
shift
if [[ ! -f "$ROOT/$STAGE" ]]; then refuse "there is no script $STAGE in $ROOT"; fi
if [[ "$NNODES" -gt 1 && -z "${MASTER_ADDR:-}" ]]; then refuse "set MASTER_ADDR to the first machine's address"; fi
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

# When one machine fails, the others end with an error. Given again on all, the command goes on from the newest checkpoint.
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NNODES" \
  --node-rank "$NODE_RANK" \
  --nproc-per-node "$NPROC" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" \
  --master-port "$MASTER_PORT" \
  "$ROOT/$STAGE" "$@"
