"""Training data: records -> prompts -> tokens and labels, images, sampling, collation.

The names below are loaded when they are first used, since some need torch.
"""

from importlib import import_module

_HOMES = {
    "BadRecord": "dataset",
    "DataCollatorForSupervisedDataset": "collator",
    "LazySupervisedDataset": "dataset",
    "LengthGroupedSampler": "sampler",
    "Records": "records",
    "load_image": "images",
    "load_records": "records",
    "load_video": "images",
    "make_supervised_data_module": "module",
    "resolve_path": "paths",
    "resolve_supervise": "preprocess",
    "validate_records": "validate",
}

# `preprocess` is a module and not among the names: `from llava.data.preprocess import preprocess`
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
