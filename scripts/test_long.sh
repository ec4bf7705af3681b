#!/usr/bin/env bash
# What takes longer than the tests: resuming under DeepSpeed, and the whole demo over several seeds. Writes
# test_results/long_YYYYMMDD.json and fails below the bar. SEEDS="0 1" bash scripts/test_long.sh runs fewer seeds.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_environment test torch transformers deepspeed sklearn pytest
cd "$ROOT"
"$PYTHON" -m pytest -q scripts/long_tests
"$PYTHON" scripts/test_long.py --seeds ${SEEDS:-0 1 2 3 4} "$@"
