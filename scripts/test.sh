#!/usr/bin/env bash
# Check everything: lint, types, tests; on a fresh machine, set up first.
#
#   bash scripts/test.sh [pytest arguments]    (default: all but what is marked slow)
#   bash scripts/test.sh -m slow               (the rest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
prepare_environment dev

ruff check .
ruff format --check .
codespell
pyrefly check
# Two at a time, each with one thread: most tests are too small for more, and those of several
# processes wait more than they compute. In their order, which ends with short files.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
