#!/usr/bin/env bash
# Trains on GPUs that Slurm gives, on one machine or several.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG GPUS [arguments of tools/train.py]

CONFIG is a path or a name, GPUS the number of processes in all, one for each GPU. In the
environment: GPUS_PER_NODE (8 by default, or GPUS if that is less), CPUS_PER_TASK (5 by default)
and SRUN_ARGS, further arguments of srun such as "--time=24:00:00 --qos=normal".
USAGE
    exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

[ $# -ge 4 ] && is_count "$4" || usage
partition=$1 job_name=$2 config=$3 gpus=$4
shift 4

gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
is_count "$gpus_per_node" || usage
if [ $((gpus % gpus_per_node)) -ne 0 ]; then
    echo "error: $gpus GPUS are no whole number of machines with GPUS_PER_NODE=$gpus_per_node" >&2
    exit 2
fi
if ! command -v srun >/dev/null; then
    echo "error: there is no srun here; without Slurm use tools/dist_train.sh" >&2
    exit 2
fi

root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# shellcheck disable=SC2086 # SRUN_ARGS are several
exec srun \
    --partition="$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$root/tools/train.py" "$config" --launcher slurm "$@"
