# Makes the environment that the commands of the README run in. Sourced, not run:
#
#     source tools/setup_env.sh
#     setup_env runtime    # or: setup_env tests, which adds the linters and pytest
#
# Creates .venv in the repository with $PYTHON (python3 by default), installs the tested versions
# and puts .venv/bin first on PATH. Later calls see by a stamp that nothing changed, and skip all.

setup_env() {
    local extras=$1 root start=$SECONDS
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    local venv=$root/.venv wanted stamp quiet=--quiet
    [ -t 1 ] && quiet=

    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        _create_venv "${PYTHON:-python3}" "$venv" || return
    fi
    export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
    unset PYTHONHOME

    wanted=$(cd "$root" && { pwd; python --version; cat setup.py requirements/*.txt; } | cksum)
    for stamp in "$venv/.mmsora-$extras" "$venv/.mmsora-tests"; do # tests include the runtime
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    done

    # torch first: the version and build that is there stays, and nothing else may move it.
    local torch
    torch=$(grep '^torch==' "$root/requirements/constraints.txt")
    echo "[setup] installing $torch into $venv"
    _pip install $quiet "$torch" || return
    [ "$extras" = runtime ] && extras='' || extras="[$extras]"
    echo "[setup] installing mmsora$extras"
    _pip install $quiet -c "$root/requirements/constraints.txt" -e "$root$extras" || return
    echo "$wanted" >"$venv/.mmsora-$1"
    echo "[setup] done in $((SECONDS - start)) s"
}

_create_venv() { # PYTHON VENV
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "MMSora needs Python 3.10 or newer; $1 is $("$1" --version 2>&1)." >&2
        echo "Name another one: PYTHON=python3.11 bash ..." >&2
        return 1
    fi
    echo "[setup] creating $2 with $("$1" --version)"
    "$1" -m venv --clear "$2"
}

_pip() {
    python -m pip --disable-pip-version-check "$@" && return
    echo "[setup] pip failed; its message stands above. Run the command again to go on." >&2
    return 1
}
