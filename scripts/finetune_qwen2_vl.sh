#!/usr/bin/env bash
# Fine-tune Qwen2-VL with adaptive patches: scripts/finetune.sh with a demo of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/finetune_qwen2_vl.sh [--overwrite] [--key value ...]
           the demo: trains a small Qwen2-VL from random weights in two stages, with alpha drawn anew for every picture,
           and evaluates it on held-out data with all patches and with fewer and fewer
       bash scripts/finetune_qwen2_vl.sh CONFIG.yaml [--key value ...]
           the training run of CONFIG.yaml, for example configs/train/finetune_qwen2_vl.yaml
adaptive_patches says which patches are kept, min_pixels and max_pixels which sizes; --lora_enable true trains adapters.
Other keys and the environment as in scripts/finetune.sh; SELECTIONS are the demo's choices of patches (as --selections of
llava.eval.exact_match takes them).
USAGE
    exit 0
fi
if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    exec bash "$ROOT/scripts/finetune.sh" "$@"
fi
# shellcheck disable=SC2086 # several words
demo_recipe demo_qwen2_vl ${SELECTIONS:+--heldout.selections $SELECTIONS} "$@"
