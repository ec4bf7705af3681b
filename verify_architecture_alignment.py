"""`scripts/verify_architecture_alignment.py` under its published place: same flags, same exit status.

    python verify_architecture_alignment.py [--verbose] [--hub-dir D] [--config C]

It may be called from any folder.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).resolve().parent / "scripts" / "verify_architecture_alignment.py"
    runpy.run_path(str(script), run_name="__main__")
