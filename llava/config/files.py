"""Reading YAML files, with lines in the error messages, and finding the files that they name."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from llava.errors import LlavaError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no` is a word (save_strategy: no), 1e-3 is a number, 1:30 is not."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _construct_int(loader, node):
    return int(node.value)  # YAML 1.1 would read a leading zero as octal


def _construct_float(loader, node):
    return float(node.value)


def _construct_mapping(loader, node):
    loader.flatten_mapping(node)
    mapping = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if name in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key_node.start_mark)
        mapping[name] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def read_text(text: str) -> Any:
    """The content of a YAML text."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `LlavaError` if there is no such file, it does not parse or is not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise LlavaError(f"{path}: no such config file")
    try:
        content = read_text(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise LlavaError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except UnicodeDecodeError:
        raise LlavaError(f"{path}: not a text file in UTF-8") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LlavaError(f"{path}: is a {type(content).__name__}, expected `key: value` lines")
    for name in content:
        if not isinstance(name, str):
            raise LlavaError(f"{path}: {name!r} is not a key, expected `key: value` lines")
    return content


def find_file(name: str, config: str | Path | None) -> Path | None:
    """`name` from the working directory, else from the nearest folder above `config` in which it exists."""
    if Path(name).exists():
        return Path(name)
    if config is not None and not Path(name).is_absolute():
        for folder in Path(config).resolve().parents:
            if (folder / name).exists():
                return folder / name
    return None
