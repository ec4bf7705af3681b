"""Keep Python's garbage collector from looking through what was imported.

Every training run collects garbage once, and PyTorch, transformers and DeepSpeed together are a million objects:
without this it takes longer than the steps of a small model.
"""

import gc
import sys

MANY = 50  # modules
_known = 0


def leave_imported_alone() -> None:
    """From now on, if there are many new modules; what is there now is never collected where it forms a cycle."""
    global _known
    if len(sys.modules) >= _known + MANY:
        gc.collect()
        gc.freeze()
        _known = len(sys.modules)
