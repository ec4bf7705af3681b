#!/usr/bin/env bash
# Correctness and speed on one CUDA machine, or in small shapes on a CPU: bash benchmarks/gpu_suite.sh [--help]
# Installs nothing: runs with PYTHON, else .venv, else the first Python here that has torch and transformers.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

has_torch() {
    command -v "$1" >/dev/null && "$1" -c '
import importlib.util, sys
sys.exit(sys.version_info < (3, 11) or any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")))
' 2>/dev/null
}

for candidate in ${PYTHON:+"$PYTHON"} "$ROOT/.venv/bin/python" python python3; do
    if has_torch "$candidate"; then
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
        export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}" # one device, the first
        exec "$candidate" "$ROOT/benchmarks/gpu_suite.py" "$@"
    fi
done
echo "error: no Python 3.11 or later with torch and transformers found; set PYTHON to one" >&2
exit 2
