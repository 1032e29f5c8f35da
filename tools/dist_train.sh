#!/usr/bin/env bash
# Trains on several processes: GPUs where there are any, else CPU processes.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: bash tools/dist_train.sh [CONFIG] GPUS [arguments of tools/train.py]

CONFIG is a path or a name (configs/quickstart/latte_moving_digits.py by default), GPUS the number
of processes on this machine. For several machines, run it on each with NNODES, NODE_RANK (0 is
the master), MASTER_ADDR and PORT (29500 by default) in the environment.
USAGE
    exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || usage
if is_count "$1"; then
    config=$root/configs/quickstart/latte_moving_digits.py gpus=$1
    shift
else
    [ $# -ge 2 ] && is_count "$2" || usage
    config=$1 gpus=$2
    shift 2
fi

python=python
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi

nnodes=${NNODES:-1}
is_count "$nnodes" || usage
if [ "$nnodes" -gt 1 ]; then
    if [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; then
        echo "error: NNODES=$nnodes needs MASTER_ADDR and NODE_RANK" >&2
        usage
    fi
    port=${PORT:-29500}
else
    free_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
    port=${PORT:-$("$python" -c "$free_port")}
fi

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > gpus ? cores / gpus : 1))}
export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

exec "$python" "$root/tools/torchrun.py" \
    --nnodes "$nnodes" \
    --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "$port" \
    --nproc_per_node "$gpus" \
    "$root/tools/train.py" "$config" --launcher pytorch "$@"
