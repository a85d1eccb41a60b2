#!/usr/bin/env bash
# Runs the linters and the tests; sets up a Python environment first if need be.
#
#   ./run_tests.sh                      all that a change must pass, two tests at a time
#   ./run_tests.sh tests/unit -k lanes  any arguments of pytest
#   ./run_tests.sh -m nightly           what takes too long for every change
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env dev

# The linters are tests too (tests/meta/test_linters.py), so there is one report.
# Whoever names tests sees them run in order, in one process.
(($# > 0)) || set -- --numprocesses 2 --dist loadfile --durations 10
exec "$PYTHON" -m pytest "$@"
