#!/usr/bin/env bash
# Stage 1 alone: the demo's without a config, the one a config describes with one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/pretrain.sh [--overwrite] [--key value ...]      the demo's stage 1, into checkpoints/demo/pretrain
       bash scripts/pretrain.sh CONFIG.yaml [--key value ...]        for example configs/train/pretrain_blip558k.yaml
Keys and environment as in scripts/finetune.sh.
USAGE
    exit 0
fi

if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    use_environment train,demo torch transformers deepspeed
    launch "$@"
    exit
fi

demo_recipe demo --until pretrain "$@"
