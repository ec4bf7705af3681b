#!/usr/bin/env bash
# Set up and run the checks and tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/test.sh [pytest's arguments]
       for example: bash scripts/test.sh tests/data -k truncated -x
Installs what the tests need into .venv, unless the Python at hand has it, then runs the linter, its check of the format
and the tests, in as many processes as there are cores. `python -m pytest --help` lists pytest's arguments.
Environment: PYTHON (one that has this checkout with its extras), OMP_NUM_THREADS (1), LLAVA_LONG_TESTS=1 (also the cases
that take longer, as scripts/test_long.sh).
USAGE
    exit 0
fi

use_environment test torch transformers deepspeed sklearn matplotlib wandb pyarrow av pytest xdist hypothesis ruff
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# a file's tests share what they made, and stay in one process; each process computes on one core
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@"
