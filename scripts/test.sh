#!/usr/bin/env bash
# Set up and run the checks and tests: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_environment test torch transformers deepspeed sklearn matplotlib wandb pyarrow av pytest xdist hypothesis ruff
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# a file's tests share what they made, and stay in one process; each process computes on one core
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@"
