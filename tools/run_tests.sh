#!/usr/bin/env bash
# All checks: linters, types, layers, docstrings, tests. Installs what it needs into .venv.
#
#     bash tools/run_tests.sh [--slow] [pytest arguments]
#
# Without --slow, all tests but those marked slow; with it, those alone.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_env.sh
setup_env tests
export OMP_NUM_THREADS=1

marker='not slow'
if [ "${1:-}" = --slow ]; then
    marker=slow
    shift
fi
summary=()
failed=()

step() { # NAME COMMAND...
    local name=$1 start=$SECONDS result=ok
    shift
    echo "== $name"
    "$@" || { result=FAILED && failed+=("$name"); }
    summary+=("$(printf '%-14s %4d s  %s' "$name" $((SECONDS - start)) "$result")")
}

finish() {
    printf '\n'
    printf '%s\n' "${summary[@]}"
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'failed: %s\n' "${failed[*]}" >&2
        exit 1
    fi
}

step ruff-check ruff check .
step ruff-format ruff format --check .
step mypy mypy
step import-linter lint-imports
step pydoclint pydoclint --quiet mmsora tools
[ ${#failed[@]} -eq 0 ] || finish # the linters are cheap and all run; the tests wait for them
step pytest python -m pytest -m "$marker" "$@"
finish
