#!/usr/bin/env bash
# A recipe: its stages one after another, then its evaluations and report.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ "${1:-}" != *.y*ml ]] || asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/recipe.sh RECIPE.yaml [--output_dir D] [--from STAGE] [--until STAGE] [--dry-run] [--key value ...]
       for example: NUM_GPUS=8 bash scripts/recipe.sh configs/recipes/llava_next.yaml
The same command goes on after an interruption. Environment as in scripts/finetune.sh; on several nodes, run it on each.
`python -m llava.train.recipe --help` has all flags.
USAGE
    asks_for_help "$@" && exit
    exit 2
fi

run_recipe "$@"
