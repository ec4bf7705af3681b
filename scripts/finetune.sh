#!/usr/bin/env bash
# Train a vision-language model: the demo without a config, the real thing with one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'USAGE'
usage: bash scripts/finetune.sh [--overwrite] [--key value ...]
           the demo: sets up .venv, makes data and tiny models, trains two stages, evaluates on held-out data
       bash scripts/finetune.sh CONFIG.yaml [--key value ...]
           the training run that CONFIG.yaml describes, for example configs/train/finetune_onevision.yaml, or the recipe,
           for example configs/recipes/llava_next.yaml
Every key of a config may be given as --key value and then stands above it; `python -m llava.config table` lists them.
The demo is the recipe configs/recipes/demo.yaml: the keys go to both its stages, those of --finetune.key value to one;
--output_dir is the folder of both (checkpoints/demo); --overwrite starts anew. Recipes of your own: scripts/recipe.sh.
A run that gets TERM, HUP, USR1 or Ctrl-C finishes its step and saves; the same command goes on.
Environment: NUM_GPUS, NNODES, RANK, ADDR, PORT (as in LLaVA-NeXT), LAUNCHER=torchrun|deepspeed, HOSTFILE,
             CUDA_VISIBLE_DEVICES, NUM_PROCS (processes on the CPU), PYTHON, EVAL_LIMIT (held-out questions of a
             cut-short demo). The demo takes one GPU unless NUM_GPUS or CUDA_VISIBLE_DEVICES says otherwise.
             NNODES=LEAST:MOST goes on without nodes that are lost, MAX_RESTARTS (3) times; MAX_RESTARTS=N alone waits
             for them; RDZV_ID, RDZV_CONF, LOCAL_ADDR as torchrun's flags (docs/clusters.md).
USAGE
}

if asks_for_help "$@"; then
    usage
    exit 0
fi

if [[ "${1:-}" == *.yaml || "${1:-}" == *.yml ]]; then
    ! is_recipe "$1" || run_recipe "$@"
    use_environment train,demo torch transformers deepspeed
    launch "$@"
    exit
fi

demo_recipe demo "$@"
