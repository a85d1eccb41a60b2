# shellcheck shell=bash
# Sourced by the scripts of this clone, from its root: leaves in PYTHON the interpreter to use,
# as a path that holds wherever they go.
#
#   setup_env [EXTRA]     EXTRA: "" to train, "dev" to run the tests
#
# The active environment is used when it runs this clone. Else .venv is, which is made when it is
# absent, was left half-made, or was installed from other requirements. A .venv that somebody made
# by hand is used when it works, and never changed.

MARK=.venv/.torchtitan # "installing", or what was installed; only in a .venv that is ours

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Does interpreter $1 import this clone's package, torch and, with EXTRA $2 = dev, what the tests need?
# The empty entry of sys.path is the current folder, in which the package would always be found.
runs_this_clone() {
    "$1" - "$PWD" "${2:-}" <<'PYTHON' 2>/dev/null
import os, sys
from importlib.util import find_spec

clone, extra = sys.argv[1:]
sys.path[:] = [entry for entry in sys.path if entry]
found = find_spec("torchtitan")
ours = found is not None and os.path.realpath(found.origin or "").startswith(
    os.path.join(os.path.realpath(clone), "torchtitan") + os.sep
)
needed = ["torch", "datasets", "jinja2", "sentencepiece", "shtab", "tiktoken"]
if extra == "dev":
    needed += ["pytest", "pytest_timeout", "xdist", "ruff", "mypy", "importlinter", "transformers"]
    needed += ["filelock", "gguf", "lm_eval", "material", "matplotlib", "nbclient"]
    needed += ["xllamacpp"] if sys.platform == "linux" else []
sys.exit(not (ours and all(find_spec(name) for name in needed)))
PYTHON
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# What .venv must have been installed from, as one word.
requirements_sum() {
    cat pyproject.toml constraints.txt | cksum | tr -d ' '
}

venv_is_ready() {
    [[ -x .venv/bin/python ]] && runs_this_clone .venv/bin/python "$1" || return 1
    [[ -e $MARK ]] || return 0
    local sum extra
    read -r sum extra <"$MARK" || true
    [[ $sum == "$(requirements_sum)" && ($extra == dev || -z $1) ]]
}

make_venv() {
    local extra=$1 base="" name
    for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$name"; then
            base=$name
            break
        fi
    done
    [[ -n $base ]] || die "Python 3.10 or newer is needed, and the python3 found here is" \
        "$(python3 --version 2>&1 | tail -n 1); put a newer one first in PATH."
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        local version
        version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "$base cannot make a virtual environment because its module ensurepip is missing;" \
            "on Debian and Ubuntu: sudo apt install python$version-venv"
    fi

    local state=""
    [[ -e $MARK ]] && read -r state _ <"$MARK"
    if [[ -z $state || $state == installing ]] || ! is_new_enough .venv/bin/python ||
        ! runs_this_clone .venv/bin/python; then
        [[ ! -e .venv ]] ||
            echo "Making .venv anew: its set-up did not finish, or was for another place." >&2
        rm -rf .venv/bin .venv # bin first: without it, a .venv counts as absent
        mkdir .venv
        echo installing >"$MARK"
        "$base" -m venv .venv
    fi
    echo "Installing torchtitan and what it needs into .venv (once; takes some minutes) ..." >&2
    echo installing >"$MARK"
    local quiet=""
    [[ -t 2 ]] || quiet=--quiet
    .venv/bin/python -m pip install --disable-pip-version-check ${quiet:+"$quiet"} \
        --editable ".${extra:+[$extra]}" --constraint constraints.txt >&2 ||
        die "The installation failed; the reason is above. The same command tries again."
    echo "$(requirements_sum) $extra" >"$MARK"
}

# shellcheck disable=SC2034  # PYTHON is for the script that sources this
setup_env() {
    local extra=${1:-} name
    for name in python3 python; do
        if is_new_enough "$name" && runs_this_clone "$name" "$extra"; then
            PYTHON=$(command -v "$name")
            [[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON # PATH may hold .venv/bin
            return
        fi
    done
    PYTHON=$PWD/.venv/bin/python
    venv_is_ready "$extra" && return
    [[ ! -x .venv/bin/python || -e $MARK ]] ||
        die "The .venv here was made by hand and does not run this clone. Install into it with" \
            "'.venv/bin/python -m pip install -e '.${extra:+[$extra]}' -c constraints.txt'," \
            "or move it away."
    make_venv "$extra"
}
