#!/usr/bin/env bash
# Encoders of timm against timm itself: the tests that are skipped where timm is missing. Makes an environment of its own
# (1 GB), with the torch that constraints.txt pins and the torchvision of that version. The package index has torchvision
# for CUDA alone; beside a CPU build of torch its operators do not load, of which timm needs none: the tests then go on
# without them (tests/support/bare_torchvision.py). VENV=DIR takes another environment than .venv-timm.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/test_timm.sh [pytest's arguments]
Tests encoders of timm against timm itself, in an environment of their own (1 GB), which is made if need be.
Environment: VENV (.venv-timm), PYTHON (the Python that makes it).
USAGE
    exit 0
fi

VENV="${VENV:-$ROOT/.venv-timm}"
if ! has_checkout "$VENV/bin/python" timm torchvision pytest; then
    base="${PYTHON:-$(newest_python)}" || exit
    new_enough "$base" || fail "$base is no Python 3.11 or later; set PYTHON to one"
    "$base" -m venv "$VENV"
    "$VENV/bin/pip" install --disable-pip-version-check -c "$ROOT/constraints.txt" -e "${ROOT}[train]" pytest hypothesis ||
        fail "the installation into $VENV failed"
    # without what they depend on: torchvision would bring a torch of its own
    "$VENV/bin/pip" install --disable-pip-version-check --no-deps torchvision==0.28.0 timm==1.0.31 ||
        fail "the installation of timm into $VENV failed"
fi
PYTHON="$VENV/bin/python"
cd "$ROOT"
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
bare=()
"$PYTHON" -c "import torchvision" 2>/dev/null || bare=(-p tests.support.bare_torchvision)
"$PYTHON" -m pytest -q ${bare[@]+"${bare[@]}"} -k timm tests/model/test_timm_source.py tests/model/test_timm_tower.py \
    tests/model/test_tower_contract.py tests/model/test_devices.py tests/model/test_packed_rows.py tests/families/test_lengths.py \
    tests/model/test_vision_blocks.py tests/tools/test_towers.py tests/train/test_timm_training.py "$@"
