#!/usr/bin/env bash
# The models for lmms-eval, run by the real package on the demo's held-out questions, without network: its answers,
# accuracies and likelihoods are those of this package; lmms-eval's own models of LLaVA too, on random weights; and the
# scorers, beside lmms-eval's on 100,000 generated answers. Makes an environment of some GB (lmms-eval wants torchvision,
# and that a CUDA build of torch, which runs on a CPU too). CHECKPOINT=DIR takes a trained checkpoint rather than a random
# one, LIMIT=N that many questions, VENV=DIR another environment than .venv-lmms.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/test_lmms_eval.sh
Holds what lmms-eval's own package makes of a checkpoint against this package's answers, accuracies and likelihoods, on the
demo's held-out questions and without network, in an environment of their own (some GB), which is made if need be.
Environment: CHECKPOINT (a random one is made), LIMIT (questions, 200), SEED (of the demo's data, 0), VENV (.venv-lmms),
             PYTHON (the Python that makes it).
USAGE
    exit 0
fi
(($# == 0)) || fail "found $*, expected no arguments; --help lists the variables"

VENV="${VENV:-$ROOT/.venv-lmms}"
if ! has_checkout "$VENV/bin/python" lmms_eval decord; then
    base="${PYTHON:-python3}"
    new_enough "$base" || fail "$base is no Python 3.11 or later; set PYTHON to one"
    "$base" -m venv "$VENV"
    "$VENV/bin/pip" install --disable-pip-version-check -e "${ROOT}[lmms-eval]" decord || fail "the installation into $VENV failed"
fi
PYTHON="$VENV/bin/python"
cd "$ROOT"
"$PYTHON" playground/make_demo.py --seed "${SEED:-0}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 CUDA_VISIBLE_DEVICES=""
"$PYTHON" scripts/lmms_eval/compare_scorers.py || fail "a scorer differs from lmms-eval's"
if [[ -z "${CHECKPOINT:-}" ]]; then
    CHECKPOINT="$work/random"
    "$PYTHON" scripts/lmms_eval/random_checkpoint.py --output "$CHECKPOINT"
fi
limit="${LIMIT:-200}"
"$PYTHON" -m llava.eval.exact_match --model-path "$CHECKPOINT" --data-path playground/demo/heldout.json \
    --image-folder playground/demo/images --output "$work/exact.json"
run() { # NAME TASKS FLAG...
    local name="$1" tasks="$2"
    shift 2
    PYTHON="$PYTHON" bash scripts/eval.sh "$CHECKPOINT" "$tasks" --include_path scripts/lmms_eval --batch_size 16 \
        --limit "$limit" --log_samples --output_path "$work/$name" "$@" || fail "lmms-eval failed ($name)"
}
run chat demo_digits
NUM_PROCS=2 run chat-two-processes demo_digits
run simple demo_digits_single,demo_digits_choice --force_simple
"$PYTHON" scripts/lmms_eval/check_results.py --exact "$work/exact.json" --model-path "$CHECKPOINT" \
    --data-path playground/demo/heldout.json --image-folder playground/demo/images \
    --output "$work/chat" --output "$work/chat-two-processes" --output "$work/simple"

# lmms-eval's own `llava`, `llava_onevision` and `llava_vid` load a checkpoint through LLaVA-NeXT's names
crops="$work/random-anyres"
"$PYTHON" scripts/lmms_eval/random_checkpoint.py --anyres --output "$crops"
export DEMO_CLIPS="$work/clips" ACCELERATE_USE_CPU=true
mkdir "$DEMO_CLIPS"
run_own() { # NAME MODEL TASKS MODEL_ARGUMENTS FLAG...
    local name="$1" model="$2" tasks="$3" arguments="$4"
    shift 4
    "$PYTHON" -m lmms_eval --model "$model" --tasks "$tasks" --include_path scripts/lmms_eval --force_simple \
        --model_args "pretrained=$crops,device_map=auto,device=cpu,conv_template=qwen_1_5$arguments" \
        --limit "$limit" --log_samples --output_path "$work/$name" "$@" || fail "lmms-eval failed ($name)"
}
check_own() { # FLAG...
    "$PYTHON" scripts/lmms_eval/check_wrappers.py --model-path "$crops" --data-path playground/demo/heldout.json \
        --image-folder playground/demo/images "$@"
}
run_own llava llava demo_digits_image "" --batch_size 1
run_own llava-batched llava demo_digits_image "" --batch_size 8
run_own llava_onevision llava_onevision demo_digits_image "" --batch_size 1
check_own --results "$work"/{llava,llava-batched,llava_onevision}
run_own llava_onevision-clips llava_onevision demo_digits_video ,max_frames_num=4 --batch_size 1
check_own --set mm_spatial_pool_mode=bilinear --results "$work/llava_onevision-clips"
run_own llava_vid llava_vid demo_digits_video ,max_frames_num=4,force_sample=True --batch_size 1
check_own --set mm_spatial_pool_mode=average mm_newline_position=grid --results "$work/llava_vid"
