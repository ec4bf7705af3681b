"""ModelArguments and DataArguments of LLaVA-NeXT's train.py, for programs that parse or build them themselves."""

import dataclasses
from functools import cache


def _parsed_type(key):
    """A key's type in the form that the parser takes: of several kinds, as of a path or a list, the first."""
    first = next(kind for kind in key.kinds if kind is not type(None))
    return first | None if type(None) in key.kinds else first


@cache
def arguments_class(name: str) -> type:
    """ "ModelArguments" or "DataArguments": a dataclass of the keys of that group, with their defaults.

    It is made for `transformers.HfArgumentParser`, whose `--key value` it takes as LLaVA-NeXT's does; of a file, of
    other names of a key and of what does not exist here `llava.train.arguments.parse_args` knows more.
    """
    from llava.config.schema import own_keys

    group = name.removesuffix("Arguments").lower()
    fields = [
        (
            key.name,
            _parsed_type(key),
            dataclasses.field(default=key.default, metadata={"help": key.description}),
        )
        for key in own_keys().values()
        if key.group == group
    ]
    made = dataclasses.make_dataclass(name, fields, namespace={"__module__": "llava.train.train"})
    made.__doc__ = f"The {group} keys of a run; see docs and `python -m llava.config`."
    return made


def __getattr__(name: str):
    if name in ("ModelArguments", "DataArguments"):
        return arguments_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
