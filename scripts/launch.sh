#!/usr/bin/env bash
# One training run with the Python in PYTHON, as common.sh launches it: what a recipe starts for each of its stages.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: PYTHON=PYTHON bash scripts/launch.sh CONFIG.yaml [--key value ...]
One training run with that Python, which must have this checkout: what a recipe starts for each of its stages. Nothing is
installed. By hand, use scripts/finetune.sh CONFIG.yaml; keys and environment are as there.
USAGE
    exit 0
fi
[[ -n "${PYTHON:-}" ]] || fail "PYTHON is not set, expected the Python of the recipe; for a single run: scripts/finetune.sh CONFIG.yaml"
launch "$@"
