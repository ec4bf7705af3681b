#!/usr/bin/env bash
# Fine-tune Qwen2-VL with adaptive patches: scripts/finetune.sh with a demo of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for word in "$@"; do
    if [[ "$word" == --help || "$word" == -h ]]; then
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
done
if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    exec bash "$ROOT/scripts/finetune.sh" "$@"
fi
read_demo_flags "$@"
run_demo qwen2_vl_pretrain configs/train/demo_qwen2_vl_pretrain.yaml qwen2_vl configs/train/demo_qwen2_vl.yaml \
    --selections ${SELECTIONS:-none budget:1.0 budget:0.7 budget:0.5 budget:0.3 budget:0.2 v1 v2 v2:0.7}
