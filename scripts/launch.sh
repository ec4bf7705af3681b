#!/usr/bin/env bash
# One training run with the Python in PYTHON, as common.sh launches it: what a recipe starts for each of its stages.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -n "${PYTHON:-}" ]] || fail "PYTHON is not set, expected the Python of the recipe; for a single run: scripts/finetune.sh CONFIG.yaml"
launch "$@"
