"""`packing_tower_example.py`, the walk through the packed HEVC-ViT tower, under its published name.

    python playground/example_packing_tower_usage.py [--vision_tower FOLDER]

It may be called from any folder.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().with_name("packing_tower_example.py")), run_name="__main__")
