#!/usr/bin/env bash
#SBATCH --job-name=llava
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# A training run as a Slurm job that goes on after its time limit: two minutes before it the run saves, and the job queues
# again. Flags of sbatch stand above the lines above.
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" || "${1:-}" != *.y*ml ]]; then
    cat <<'USAGE'
usage: sbatch [FLAGS OF SBATCH] scripts/slurm.sh CONFIG.yaml [--key value ...]
           the training run, or the recipe, of CONFIG.yaml on the job's nodes; from the root of the checkout, or with LLAVA_ROOT=CHECKOUT
       sbatch --nodes 4 --time 8:00:00 scripts/slurm.sh configs/train/finetune_next.yaml --data_path ...
A run that Slurm's warning stopped is queued again and goes on from its checkpoint, MAX_REQUEUES (100) times at most.
Environment otherwise as in scripts/finetune.sh; RANK, ADDR and PORT come from Slurm, and NNODES unless it is set.
USAGE
    [[ "${1:-}" != --help && "${1:-}" != -h ]] || exit 0
    echo "error: found ${1:-no CONFIG.yaml} in job ${SLURM_JOB_ID:-(none)}, expected sbatch and CONFIG.yaml, as above" >&2
    exit 2
fi

# Slurm runs a copy of this file, so it cannot say where the checkout is.
root="${LLAVA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f "$root/scripts/common.sh" ]]; then
    echo "error: $root: found no scripts/common.sh, expected the checkout: submit from its root, or set LLAVA_ROOT" >&2
    exit 2
fi
# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"

use_environment train,demo torch transformers deepspeed # once, where each node would make it for itself
folder="$(folder_of "$@")" || exit
ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export ADDR="${ADDR%%$'\n'*}" NNODES="${NNODES:-$SLURM_JOB_NUM_NODES}" PORT="${PORT:-$((10000 + SLURM_JOB_ID % 20000))}" RDZV_ID="$SLURM_JOB_ID"

# At USR1 srun tells its tasks; at TERM it would end them.
tell_tasks() {
    kill -s USR1 "$2"
}

# shellcheck disable=SC2016 # each task has a node of its own
task='RANK="$SLURM_NODEID" exec bash "$0" "$@"'
end_together=1 # a node that fails ends the others, unless they meet anew
[[ "$NNODES" != *:* && "${MAX_RESTARTS:-0}" == 0 ]] || end_together=0
before="$(state_text "$folder")" status=0
supervise tell_tasks srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit="$end_together" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c "$task" "$ROOT/scripts/finetune.sh" "$@" || status=$?

case "$(how_it_ended "$folder" "$before" "$status")" in
    finished) echo "$folder: finished" ;;
    failed)
        echo "$folder: failed; the job is not queued again" >&2
        exit "$((status ? status : 1))"
        ;;
    preempted)
        if [[ "$TOLD" == TERM ]]; then # by scancel, or for another job: then Slurm queues this one again by itself
            echo "$folder: stopped by Slurm; the same job goes on"
        elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
            fail "$folder: stopped before its end, and the job was queued again ${SLURM_RESTART_COUNT} times already (MAX_REQUEUES)"
        else
            echo "$folder: stopped before its end; the job is queued again and goes on"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
