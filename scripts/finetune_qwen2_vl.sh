#!/usr/bin/env bash
# Fine-tune Qwen2-VL with adaptive patches: the demo without a config, the real thing with one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TRAIN_PROGRAM=llava/train/train_qwen2_vl.py

for word in "$@"; do
    if [[ "$word" == --help || "$word" == -h ]]; then
        cat <<'USAGE'
usage: bash scripts/finetune_qwen2_vl.sh [--overwrite] [--key value ...]
           the demo: trains a small Qwen2-VL from random weights in two stages, with alpha drawn anew for every picture,
           and evaluates it on held-out data with all patches and with fewer and fewer
       bash scripts/finetune_qwen2_vl.sh CONFIG.yaml [--key value ...]
           the training run of CONFIG.yaml, for example configs/train/finetune_qwen2_vl.yaml
adaptive_patches, min_pixels and max_pixels say which patches are kept; --lora_enable true trains adapters. Other keys
and the environment as in scripts/finetune.sh; SELECTIONS are the demo's choices of patches (as llava.eval.qwen2_vl takes
them).
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
    rm -rf "$OUTPUT/qwen2_vl_pretrain" "$OUTPUT/qwen2_vl"
elif [[ -f "$OUTPUT/qwen2_vl/eval.json" && -f "$OUTPUT/qwen2_vl/report.png" ]]; then
    echo "$OUTPUT/qwen2_vl: the demo is finished; run with --overwrite to train it again"
    exit 0
fi
use_environment train,demo torch transformers deepspeed sklearn matplotlib
make_demo
demo_stage qwen2_vl_pretrain configs/train/demo_qwen2_vl_pretrain.yaml
demo_stage qwen2_vl configs/train/demo_qwen2_vl.yaml --model_name_or_path "$OUTPUT/qwen2_vl_pretrain"
"$PYTHON" -m llava.eval.qwen2_vl --model-path "$OUTPUT/qwen2_vl" --data-path playground/demo/heldout.json \
    --image-folder playground/demo/images --blank-images ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"} \
    --selections ${SELECTIONS:-none budget:1.0 budget:0.7 budget:0.5 budget:0.3 budget:0.2 v1 v2 v2:0.7}
"$PYTHON" -m llava.eval.report --eval-json "$OUTPUT/qwen2_vl/eval.json" --image-folder playground/demo/images \
    --stage "$OUTPUT/qwen2_vl_pretrain/trainer_state.json" --stage "$OUTPUT/qwen2_vl/trainer_state.json" \
    --output "$OUTPUT/qwen2_vl/report.png"
"$PYTHON" - "$OUTPUT/qwen2_vl/eval.json" <<'PY'
import json, sys
result = json.load(open(sys.argv[1], encoding="utf-8"))
print(f"held-out exact match: {result['exact_match']:.3f} (n={result['n']})")
PY
