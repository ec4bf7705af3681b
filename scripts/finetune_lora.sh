#!/usr/bin/env bash
# Fine-tune with LoRA: the demo without a config, the real thing with one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/finetune_lora.sh CONFIG.yaml [--key value ...]
           the training run of CONFIG.yaml with lora_enable, for example configs/train/finetune_lora.yaml
       bash scripts/finetune_lora.sh [--overwrite] [--key value ...]
           the demo (configs/recipes/demo_lora.yaml): trains an adapter over the finished demo (bash scripts/finetune.sh),
           evaluates it, and merges it
The adapter is used as it is (--model-path ADAPTER --model-base BASE), or merged: python -m llava.tools.merge_lora.
Keys and environment as in scripts/finetune.sh; bits: 4 or 8 (QLoRA) needs the package bitsandbytes.
USAGE
    exit 0
fi

if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    use_environment train,demo torch transformers deepspeed peft
    launch "$1" --lora_enable true "${@:2}"
    exit
fi

out=checkpoints/demo_lora words=("$@")
for ((i = 0; i < $#; i++)); do
    [[ "${words[i]}" != --output_dir ]] || out="${words[i + 1]:-}"
    [[ "${words[i]}" != --output_dir=* ]] || out="${words[i]#*=}"
done
[[ "$out" == /* || "$out" == checkpoints/demo_lora ]] || out="$PWD/$out"
tell_recipe() {
    kill -s "$1" "$2"
}
supervise tell_recipe demo_recipe demo_lora "$@"
cd "$ROOT"
if [[ "$(state_of "$out/lora")" != finished ]]; then
    exit # told to stop; the recipe has said so
fi
use_environment train,demo torch transformers deepspeed peft sklearn
base="$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["base_model_name_or_path"])' "$out/lora/adapter_config.json")"
rm -rf "$out/lora_merged"
"$PYTHON" -m llava.tools.merge_lora --model-path "$out/lora" --model-base "$base" --save-model-path "$out/lora_merged"
# another way to the same answers
"$PYTHON" -m llava.eval.exact_match --model-path "$out/lora_merged" --data-path playground/demo/heldout.json \
    --image-folder playground/demo/images ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"}
