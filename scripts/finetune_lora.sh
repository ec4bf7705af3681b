#!/usr/bin/env bash
# Fine-tune with LoRA: the demo without a config, the real thing with one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for word in "$@"; do
    if [[ "$word" == --help || "$word" == -h ]]; then
        cat <<'USAGE'
usage: bash scripts/finetune_lora.sh CONFIG.yaml [--key value ...]
           the training run of CONFIG.yaml with lora_enable, for example configs/train/finetune_lora.yaml
       bash scripts/finetune_lora.sh [--overwrite] [--key value ...]
           the demo: trains an adapter over the finished demo (bash scripts/finetune.sh), evaluates it, and merges it
The adapter is used as it is (--model-path ADAPTER --model-base BASE), or merged: python -m llava.tools.merge_lora.
Keys and environment as in scripts/finetune.sh; bits: 4 or 8 (QLoRA) needs the package bitsandbytes.
USAGE
        exit 0
    fi
done

if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    use_environment train,demo torch transformers deepspeed peft
    launch "$1" --lora_enable true "${@:2}"
    exit
fi

read_demo_flags "$@"
stage_finished finetune || fail "$OUTPUT/finetune: no finished demo; run scripts/finetune.sh first"
if [[ "$OVERWRITE" == yes ]]; then
    rm -rf "$OUTPUT/lora"
fi
rm -rf "$OUTPUT/lora_merged"
use_environment train,demo torch transformers deepspeed peft sklearn
make_demo
demo_stage lora configs/train/demo_lora.yaml --model_name_or_path "$OUTPUT/finetune"
own="$(own_tower configs/train/demo_lora.yaml ${OVERRIDES[@]+"${OVERRIDES[@]}"})"
"$PYTHON" -m llava.tools.merge_lora --model-path "$OUTPUT/lora" --model-base "$OUTPUT/finetune" \
    --save-model-path "$OUTPUT/lora_merged" ${own:+"$own"}
for folder in lora lora_merged; do # two ways to the same answers
    "$PYTHON" -m llava.eval.exact_match --model-path "$OUTPUT/$folder" --data-path playground/demo/heldout.json \
        --image-folder playground/demo/images ${own:+"$own"} ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"}
done
