#!/usr/bin/env bash
# Set up and run the checks and tests: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_environment test torch transformers deepspeed sklearn matplotlib wandb av pytest hypothesis ruff
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q "$@"
