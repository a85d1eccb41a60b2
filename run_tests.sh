#!/usr/bin/env bash
# Runs the linters and the tests; sets up a Python environment first if need be.
#
#   ./run_tests.sh                      all that a change must pass
#   ./run_tests.sh --changed            the tests that the files changed since main can affect
#   ./run_tests.sh tests/unit -k lanes  any arguments of pytest: in order, in one process
#   ./run_tests.sh -m nightly           what takes too long for every change
#   ./run_tests.sh --help               this text
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ ${1:-} == --help ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' run_tests.sh
    exit
fi

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env dev

# Two tests more at a time than there are processors: many wait. tests/conftest.py says which together.
count=$(($(getconf _NPROCESSORS_ONLN) + 2))
several=(--numprocesses $((count < 8 ? count : 8)) --dist loadscope --no-loadscope-reorder)

# The linters are tests too (tests/meta/test_linters.py), so there is one report.
if (($# == 0)); then
    set -- "${several[@]}" --durations 10
elif [[ $1 == --changed ]]; then
    changed=$("$PYTHON" scripts/changed_tests.py)
    mapfile -t files <<<"$changed"
    set -- "${several[@]}" --durations 10 "${@:2}" "${files[@]}"
fi
exec "$PYTHON" -m pytest "$@"
