"""Configs of encoders that are none of transformers: mappings, dataclasses, plain objects."""

import dataclasses
import json
from collections.abc import Mapping

from llava.errors import LlavaError


class PlainConfig(dict):
    """A mapping whose members are attributes too: what becomes of a tower's `config` that is a dict."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config: no {name!r}, found {', '.join(map(str, self)) or 'nothing'}") from None


def plain_config(config):
    """A config as an object with attributes, where it is a mapping."""
    return PlainConfig(config) if isinstance(config, Mapping) and not hasattr(config, "to_dict") else config


def config_values(config) -> dict:
    """The values of a tower's config, for config.json: of one of transformers, a dataclass, a mapping, or an object
    with attributes.

    Raises:
        LlavaError: a value that JSON does not have.
    """
    if hasattr(config, "to_dict"):
        values = config.to_dict()
    elif dataclasses.is_dataclass(config):
        values = dataclasses.asdict(config)
    elif isinstance(config, Mapping):
        values = dict(config)
    else:  # also those of its class and of slots, but nothing that is computed
        names = [name for name in dir(config) if not name.startswith("_")]
        names = [name for name in names if not isinstance(getattr(type(config), name, None), property)]
        values = {name: value for name in names if not callable(value := getattr(config, name))}
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise LlavaError(
                f"vision tower: its config's {name} is a {type(value).__name__}, expected what a checkpoint's "
                "config.json can hold: numbers, texts, lists and mappings of such"
            ) from None
    return values
