#!/usr/bin/env bash
# What takes longer than the tests: faults at every moment of a run and under every way of DeepSpeed, thousands of steps,
# other world sizes, all that two processes must do as one does, the whole precision table, many more settings and numbers
# drawn at random, both demos cut short, a dry run of the installation for every Python that the scripts may take, encoders
# of timm in an environment of their own (scripts/test_timm.sh; TIMM="" leaves them out), and the whole demo over several
# seeds, then with the other towers, then Qwen2-VL's demo, with all and with fewer patches. Writes
# test_results/long_YYYYMMDD.json and fails below the bar.
# With LLAVA_LONG_TESTS the files of tests/ that look for it have more cases; all of these files are run here.
# SEEDS="0 1" TOWERS="demo_hevc_vit" QWEN2_VL_SEEDS="" (each may be empty) bash scripts/test_long.sh runs fewer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if asks_for_help "$@"; then
    cat <<'USAGE'
usage: bash scripts/test_long.sh [flags of scripts/test_long.py] [--key value ...]
       for example: SEEDS="0 1" TOWERS="demo_hevc_vit" QWEN2_VL_SEEDS="" TIMM="" bash scripts/test_long.sh
Hours on a CPU: the longer cases of the tests, those of scripts/long_tests, encoders of timm, then whole demos over several
seeds and towers, whose accuracies must be above a bar. Other keys go to the demos' runs, as those of scripts/finetune.sh.
Flags: --output FOLDER of the demos' runs (checkpoints/long), --json FILE of the results (test_results/long_YYYYMMDD.json).
Environment: SEEDS (0 1 2 3 4) of the demo, TOWERS (demo_hevc_vit demo_hevc_vit_packing demo_clip_toconv demo_dinov2
             demo_siglip2 demo_aimv2) for one more demo each, QWEN2_VL_SEEDS (0) of Qwen2-VL's demo; each may be empty.
             TIMM="" leaves the encoders of timm out, which get an environment of 1 GB. PYTHON as in scripts/finetune.sh.
USAGE
    exit 0
fi

use_environment test torch transformers deepspeed sklearn matplotlib pytest
cd "$ROOT"
"$PYTHON" scripts/test_long.py --check "$@" # before hours of tests
mapfile -t longer < <(grep -rl --include='test_*.py' LLAVA_LONG_TESTS tests)
LLAVA_LONG_TESTS=1 "$PYTHON" -m pytest -q scripts/long_tests "${longer[@]}"
[[ -z "${TIMM-yes}" ]] || bash scripts/test_timm.sh
"$PYTHON" scripts/test_long.py --seeds ${SEEDS-0 1 2 3 4} --towers ${TOWERS-demo_hevc_vit demo_hevc_vit_packing demo_clip_toconv demo_dinov2 demo_siglip2 demo_aimv2} \
    --qwen2-vl-seeds ${QWEN2_VL_SEEDS-0} "$@"
