#!/usr/bin/env bash
# Stage 1 alone: the demo's without a config, the one a config describes with one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for word in "$@"; do
    if [[ "$word" == --help || "$word" == -h ]]; then
        cat <<'USAGE'
usage: bash scripts/pretrain.sh [--overwrite] [--key value ...]      the demo's stage 1, into checkpoints/demo/pretrain
       bash scripts/pretrain.sh CONFIG.yaml [--key value ...]        for example configs/train/pretrain_blip558k.yaml
Keys and environment as in scripts/finetune.sh.
USAGE
        exit 0
    fi
done

if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    use_environment train,demo torch transformers deepspeed
    launch "$@"
    exit
fi

read_demo_flags "$@"
if [[ "$OVERWRITE" == yes ]]; then
    rm -rf "$OUTPUT/pretrain"
elif stage_finished pretrain; then
    echo "$OUTPUT/pretrain: the demo's stage 1 is finished; run with --overwrite to train it again"
    exit 0
fi
use_environment train,demo torch transformers deepspeed sklearn
make_demo
demo_stage pretrain configs/train/demo_pretrain.yaml
