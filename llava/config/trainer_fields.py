"""The fields of the installed `transformers.TrainingArguments`, read from its source.

Importing transformers costs seconds; a config can be checked and shown without that. The field names, types and
literal defaults of the one dataclass are all that is needed, and they are there to read.
"""

import ast
import importlib.util
import typing
from functools import cache
from pathlib import Path

NOT_LITERAL = "(computed)"  # stands for a default that is not a literal in the source


class _TypeNames(dict):
    """The names in annotations; what is not listed (enums, mostly) is written as text on a command line."""

    def __missing__(self, name: str):
        return str


_NAMES = {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")}
_NAMES |= {kind.__name__: kind for kind in (int, float, bool, str, dict, list)}
_NAMES["typing"] = typing


@cache
def trainer_fields() -> dict[str, tuple[typing.Any, typing.Any]]:
    """{field name: (type, default)} of `transformers.TrainingArguments`; enums count as `str`."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    tree = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or node.value is None or not isinstance(node.target, ast.Name):
            continue
        arguments = {item.arg: item.value for item in getattr(node.value, "keywords", ())}
        if not node.target.id.startswith("_"):
            fields[node.target.id] = (_type_of(node.annotation), _default_of(node.value, arguments))
    return fields


def _type_of(annotation: ast.expr):
    code = compile(ast.Expression(annotation), "TrainingArguments", "eval")
    return eval(code, {"__builtins__": {}}, _TypeNames(_NAMES))


def _default_of(value: ast.expr, arguments: dict[str, ast.expr]):
    try:
        return ast.literal_eval(arguments.get("default", value))
    except ValueError:
        return NOT_LITERAL
