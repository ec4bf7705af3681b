# Shared by the scripts: this checkout's Python environment, the launch of a training run, and of the demos.
# shellcheck shell=bash

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    echo "usage: source scripts/common.sh: what the other scripts share; by itself it does nothing (see scripts/finetune.sh --help)"
    exit 0
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/supervise.sh
source "$ROOT/scripts/supervise.sh"
export PYTHONUNBUFFERED=1
NODE_RANK="${RANK:-0}" # LLaVA-NeXT's scripts call the node's rank RANK; in a process that name means its own rank
unset RANK

# asks_for_help WORD...: --help or -h is among the words.
asks_for_help() {
    local word
    for word in "$@"; do
        if [[ "$word" == --help || "$word" == -h ]]; then
            return
        fi
    done
    return 1
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# has_checkout PYTHON MODULE...: that Python imports llava from this checkout and finds the modules. Tried from /, since
# Python also finds packages in the working directory.
has_checkout() {
    local python="$1"
    shift
    (cd / && "$python" -c '
import importlib.util, os, sys
spec = importlib.util.find_spec("llava")
ours = os.path.realpath(os.path.join(sys.argv[1], "llava", "__init__.py"))
here = spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == ours
sys.exit(not here or any(importlib.util.find_spec(name) is None for name in sys.argv[2:]))
' "$ROOT" "$@") 2>/dev/null
}

# new_enough PYTHON: it exists and is at least 3.11, as pyproject.toml wants it.
new_enough() {
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# newest_python: the newest Python here that can make a virtual environment (on Debian and Ubuntu not every one can).
newest_python() {
    local candidate
    for candidate in python3.14 python3.13 python3.12 python3.11 python3 python; do
        if new_enough "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later found that can make .venv (on Debian and Ubuntu: apt install python3-venv); set PYTHON to one"
}

# use_environment EXTRAS MODULE...: set PYTHON to a Python that has this checkout with these extras: $PYTHON, or the
# current one, if its llava is this checkout (another llava, such as LLaVA-NeXT's, may be installed), else .venv, made
# when needed by $PYTHON, or by the newest Python here.
use_environment() {
    local extras="$1" candidate candidates=(python python3) current=""
    shift
    if [[ -n "${PYTHON:-}" ]]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON, expected a Python 3.11 or later"
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if new_enough "$candidate" && has_checkout "$candidate"; then
            current="$(command -v "$candidate")"
            break
        fi
    done
    if [[ -n "$current" ]] && has_checkout "$current" "$@"; then
        PYTHON="$current"
    else
        if [[ -n "$current" ]]; then
            echo "$current has this checkout but not all of its extras [$extras]; using .venv"
        fi
        make_venv "$extras" "$@"
    fi
    if [[ -n "${PYTHONPATH:-}" ]]; then
        export PYTHONPATH="$ROOT:$PYTHONPATH" # a llava that PYTHONPATH names must not hide this one
    fi
    has_driver || export DS_ACCELERATOR=cpu # DeepSpeed then does not warn at every import
    PATH="$(dirname "$PYTHON"):$PATH" # DeepSpeed calls ninja, which pip put beside this Python
    export PYTHON PATH
}

make_venv() {
    local extras="$1" base="${PYTHON:-}" venv="$ROOT/.venv" stamp
    shift
    PYTHON="$venv/bin/python"
    stamp="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
    if [[ -f "$venv/installed-$extras" && "$(cat "$venv/installed-$extras")" == "$stamp" ]] &&
        (unset PYTHONPATH && has_checkout "$PYTHON" "$@"); then
        return
    fi
    echo "installing this checkout into .venv"
    if ! new_enough "$PYTHON"; then
        [[ -n "$base" ]] || base="$(newest_python)" || exit
        "$base" -m venv --clear "$venv" || fail "$base cannot make .venv (on Debian and Ubuntu: apt install python3-venv)"
    fi
    (cd "$ROOT" && unset PYTHONPATH && "$PYTHON" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]") ||
        fail "the installation into .venv failed"
    (unset PYTHONPATH && has_checkout "$PYTHON" "$@") || fail "$venv lacks some of: llava from this checkout, $*"
    echo "$stamp" >"$venv/installed-$extras"
}

# use_lmms_environment: set PYTHON to a Python that has this checkout and lmms-eval. It is not installed unasked: it
# brings gigabytes, and other versions of packages than constraints.txt names.
use_lmms_environment() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} "$ROOT/.venv-lmms/bin/python" python python3; do
        if new_enough "$candidate" && has_checkout "$candidate" lmms_eval; then
            PYTHON="$(command -v "$candidate")"
            export PYTHON
            return
        fi
    done
    fail "no Python with lmms-eval and this checkout found. Give it an environment of its own (some GB), then run this again:
    python3 -m venv $ROOT/.venv-lmms && $ROOT/.venv-lmms/bin/pip install -e '${ROOT}[lmms-eval]'"
}

DRIVER_SIGNS=(/proc/driver/nvidia/version /dev/nvidiactl /dev/nvidia0 /dev/dxg) # the last one in WSL

# has_driver: there may be a GPU here. Containers often come without nvidia-smi; asking PyTorch would take seconds.
has_driver() {
    local sign
    command -v nvidia-smi >/dev/null && return
    for sign in "${DRIVER_SIGNS[@]}"; do
        if [[ -e "$sign" ]]; then
            return
        fi
    done
    return 1
}

# cuda_devices: how many CUDA devices PyTorch sees, 0 where NUM_PROCS asks for the CPU; an error where it can use none of
# them. PyTorch is asked only where there may be a GPU.
cuda_devices() {
    if [[ -n "${NUM_PROCS:-}" ]] || ! has_driver; then
        echo 0
    else
        (cd "$ROOT" && "$PYTHON" -W ignore -m llava.train.devices)
    fi
}

# launch [CONFIG] --key value ...: one training run. On CUDA: torchrun (or LAUNCHER=deepspeed) with NUM_GPUS processes on
# each of NNODES nodes (LEAST:MOST), this one being RANK, with ADDR and PORT to meet at; of the devices in
# CUDA_VISIBLE_DEVICES, where that is set. Without CUDA: one plain process, or NUM_PROCS processes, which also keeps a machine with CUDA on its CPU.
launch() {
    local devices processes program="$ROOT/llava/train/train_mem.py"
    # what this script starts ends with it, also where it is killed outright; of a recipe, with what started that
    export LLAVA_SCRIPT_PID="${LLAVA_STARTED_BY:-$$}"
    devices="$(cuda_devices)" || exit
    if [[ "$devices" == 0 ]]; then
        if [[ -z "${NUM_PROCS:-}" && "${NUM_GPUS:-1}" != 1 ]]; then
            fail "NUM_GPUS=$NUM_GPUS, but there is no CUDA device; NUM_PROCS=N runs N processes on the CPU"
        fi
        processes="${NUM_PROCS:-1}"
        export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
        # Threads that wait soon sleep: no slower on an idle machine, and much faster beside a busy process.
        export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
        if [[ "$processes" == 1 && "${NNODES:-1}" == 1 && "${MAX_RESTARTS:-0}" == 0 ]]; then
            supervise tell_ranks "$PYTHON" "$program" "$@"
            return
        fi
        local threads=$(($(nproc) / processes))
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    else
        processes="${NUM_GPUS:-$devices}"
        if [[ -z "${HOSTFILE:-}" ]] && ((processes > devices)); then
            fail "NUM_GPUS=$NUM_GPUS, but PyTorch sees $devices CUDA device(s) (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-not set})"
        fi
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    fi
    case "${LAUNCHER:-${HOSTFILE:+deepspeed}}" in
        deepspeed) launch_with_deepspeed "$processes" "$program" "$@" ;;
        torchrun | "") launch_with_torchrun "$processes" "$program" "$@" ;;
        *) fail "LAUNCHER=$LAUNCHER, expected torchrun or deepspeed" ;;
    esac
}

# launch_with_torchrun PROCESSES PROGRAM ARGUMENT...: this node's part of a run.
launch_with_torchrun() {
    local processes="$1" nodes="${NNODES:-1}" meet
    shift
    if [[ ! "$nodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || ((${nodes%:*} > ${nodes#*:})); then
        fail "NNODES=$nodes, expected a number of nodes, or LEAST:MOST"
    fi
    [[ "${MAX_RESTARTS:-0}" =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS, expected a number"
    [[ -z "${HOSTFILE:-}" ]] || fail "HOSTFILE is for LAUNCHER=deepspeed; torchrun is started on every node"
    choose_meeting "$nodes"
    # told to stop itself, as by a scheduler that tells every process, torchrun kills its ranks after 30 seconds
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
    set -- "$PYTHON" -m torch.distributed.run --nproc_per_node "$processes" "${meet[@]}" "$@"
    if [[ " ${meet[*]} " == *" --rdzv_endpoint "* && "$NODE_RANK" != 0 ]]; then
        follow_node_0 "${MAX_RESTARTS:-3}" "$@"
    else
        supervise tell_ranks "$@"
    fi
}

# follow_node_0 TIMES COMMAND...: torchrun on another node than the first, which ends when node 0 is lost, as that keeps
# the list of nodes; then node 0 is waited for, so many times.
follow_node_0() {
    local times="$1" status why
    shift
    why="$(mktemp)"
    while :; do
        status=0
        TORCHELASTIC_ERROR_FILE="$why" supervise tell_ranks "$@" || status=$?
        if [[ "$status" == 0 || -n "$TOLD" || "$times" == 0 ]] || ! grep -q RendezvousConnectionError "$why"; then
            break
        fi
        echo "node $NODE_RANK: node 0 (ADDR=${ADDR:-127.0.0.1}) is lost; waiting for it, $times times at most" >&2
        times=$((times - 1))
        : >"$why"
    done
    rm -f "$why"
    return "$status"
}

# choose_meeting NODES: set meet, torchrun's words for how the nodes find each other. Where nodes may be fewer, or the run
# may be started again (MAX_RESTARTS), they meet as often as one is lost or comes back; node 0 keeps the list.
choose_meeting() {
    local head="${ADDR:-127.0.0.1}" port="${PORT:-29500}" restarts="${MAX_RESTARTS:-}" address="${LOCAL_ADDR:-}" way
    if [[ "$1" == 1 && -z "${ADDR:-}${PORT:-}" ]]; then
        meet=(--standalone ${restarts:+--max_restarts "$restarts"})
        return
    fi
    if [[ "$1" != 1 ]]; then
        way="$(cd "$ROOT" && "$PYTHON" -m llava.train.nodes "$head" "$port")" || exit
        address="${address:-${way% *}}" way="${GLOO_SOCKET_IFNAME:-${way#* }}"
        [[ -z "$way" ]] || export GLOO_SOCKET_IFNAME="$way" # else gloo takes what the node's name stands for
    fi
    if [[ "$1" != *:* && "${restarts:-0}" == 0 ]]; then
        meet=(--nnodes "$1" --node_rank "$NODE_RANK" --master_addr "$head" --master_port "$port")
        return
    fi
    # Else the processes keep the store of those before them, with what these wrote into it, also when its node is lost.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    local keeps=0
    [[ "$NODE_RANK" != 0 ]] || keeps=1
    meet=(--nnodes "$1" --max_restarts "${restarts:-3}" --rdzv_backend c10d --rdzv_endpoint "$head:$port"
        --rdzv_id "${RDZV_ID:-llava}" --rdzv_conf "is_host=$keeps${RDZV_CONF:+,$RDZV_CONF}"
        ${address:+--local_addr "$address"})
}

# launch_with_deepspeed PROCESSES PROGRAM ARGUMENT...: by DeepSpeed's launcher, on this node or on those of HOSTFILE.
launch_with_deepspeed() {
    local processes="$1" visible="${CUDA_VISIBLE_DEVICES-unset}"
    shift
    [[ "${NNODES:-1}" != *:* && "${MAX_RESTARTS:-0}" == 0 ]] ||
        fail "NNODES=LEAST:MOST and MAX_RESTARTS are for LAUNCHER=torchrun"
    if [[ -n "${HOSTFILE:-}" && ! -f "$HOSTFILE" ]]; then # DeepSpeed would go on with this node alone
        fail "HOSTFILE=$HOSTFILE: no such file, expected one as scripts/hostfile.example"
    fi
    local where=(${HOSTFILE:+--hostfile "$HOSTFILE"} ${ADDR:+--master_addr "$ADDR"} ${PORT:+--master_port "$PORT"})
    # /job/hostfile is read without being named
    if [[ "$visible" == unset || -n "${HOSTFILE:-}" || "${NNODES:-1}" != 1 || -f /job/hostfile ]]; then
        where=(--num_gpus "$processes" ${NNODES:+--num_nodes "$NNODES"} ${where[@]+"${where[@]}"})
        supervise tell_ranks "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" "$@"
        return
    fi
    # Told how many devices to use, the launcher counts them from 0 and drops CUDA_VISIBLE_DEVICES. It takes numbers in its
    # own way; anything else (GPU-..., MIG-..., or nothing: the CPU) is given to each process.
    if [[ "$visible" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        where=(--include "localhost:$(cut -d, -f "1-$processes" <<<"$visible")" ${where[@]+"${where[@]}"})
    else
        where=(--num_gpus "$processes" --no_local_rank --no_python ${where[@]+"${where[@]}"})
        set -- env CUDA_VISIBLE_DEVICES="$visible" "$PYTHON" -u "$@"
    fi
    supervise tell_ranks with_all_devices "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" "$@"
}

with_all_devices() {
    unset CUDA_VISIBLE_DEVICES
    "$@"
}

# is_recipe FILE: it is a recipe, not a training run's YAML.
is_recipe() {
    grep -q '^stages:' "$1" 2>/dev/null
}

# folder_of CONFIG [--key value ...]: the output_dir of a training run or a recipe.
folder_of() {
    if is_recipe "$1"; then
        "$PYTHON" -P -m llava.train.recipe "$@" --print-folder
    else
        "$PYTHON" -P -m llava.config value output_dir "$@"
    fi
}

# run_recipe RECIPE.yaml [FLAG...]: in place of this script.
run_recipe() {
    use_environment train,demo torch transformers deepspeed
    exec env RANK="$NODE_RANK" "$PYTHON" -m llava.train.recipe "$@"
}

# demo_recipe RECIPE [FLAG...]: a demo's recipe from the root of the checkout, in place of this script. Its steps are
# counted for one process: it gets the first device, unless the caller names some or says how many.
demo_recipe() {
    local recipe="$1" words=() folder=no word
    shift
    if [[ -z "${NUM_GPUS:-}${NUM_PROCS:-}" ]]; then
        export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
    fi
    for word in "$@"; do # a folder is the caller's
        if [[ "$folder" == yes && "$word" != /* ]]; then
            word="$PWD/$word"
        elif [[ "$word" == --output_dir=[!/]* ]]; then
            word="--output_dir=$PWD/${word#*=}"
        fi
        folder=no
        [[ "$word" != --output_dir ]] || folder=yes
        words+=("$word")
    done
    cd "$ROOT" || exit
    use_environment train,demo torch transformers deepspeed sklearn matplotlib
    exec "$PYTHON" -m llava.train.recipe "configs/recipes/$recipe.yaml" ${words[@]+"${words[@]}"}
}
