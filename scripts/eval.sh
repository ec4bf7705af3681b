#!/usr/bin/env bash
# Evaluate a checkpoint on lmms-eval's benchmarks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'USAGE'
usage: bash scripts/eval.sh MODEL TASKS [lmms-eval's flags]
       for example: bash scripts/eval.sh checkpoints/mine mme,ai2d,mmmu_val --batch_size 16 --output_path results
MODEL is a checkpoint folder or hub id; more of the model's arguments may follow it: MODEL,max_frames_num=16
`python -m lmms_eval tasks list` lists the tasks. Add --force_simple for those that compare the likelihoods of given answers.
Environment: NUM_GPUS (default: all), NUM_PROCS (processes on the CPU), PYTHON (one that has lmms-eval).
USAGE
}

if asks_for_help "$@"; then
    usage
    exit 0
fi
if (($# < 2)) || [[ "$1" == -* || "$2" == -* ]]; then
    usage >&2
    exit 2
fi

use_lmms_environment
model="$1" tasks="$2"
shift 2
words=(-m lmms_eval --model llava_towers --model_args "pretrained=$model" --tasks "$tasks" "$@")
devices="$(cuda_devices)"
if [[ "$devices" == 0 ]]; then
    processes="${NUM_PROCS:-1}"
    export CUDA_VISIBLE_DEVICES="" ACCELERATE_USE_CPU=true
else
    processes="${NUM_GPUS:-$devices}"
fi
if [[ "$processes" == 1 ]]; then
    exec "$PYTHON" "${words[@]}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" "${words[@]}"
