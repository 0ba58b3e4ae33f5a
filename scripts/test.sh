#!/usr/bin/env bash
# Check everything: lint, types, tests; on a fresh machine, set up first.
#
#   bash scripts/test.sh [pytest arguments]    (default: the whole suite)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
prepare_environment dev

ruff check .
ruff format --check .
codespell
pyrefly check
pytest "$@"
