#!/usr/bin/env bash
# From a fresh clone to digits that move: installs into .venv, trains a small Latte on whatever
# device there is, samples 200 clips, judges them and writes work_dirs/quickstart/.
#
#     bash tools/quickstart.sh [--setup-only] [--minutes M] [arguments of tools/quickstart.py]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
setup_env runtime
if [ "${1:-}" = --setup-only ]; then
    echo "[setup] ready; activate it with: source .venv/bin/activate"
    exit 0
fi
cd "$root"
# Threads that wait yield soon: on two cores any other process would stall them otherwise.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
exec python tools/quickstart.py "$@"
