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
    """{field name: (type, default)} of `transformers.TrainingArguments`.

    An enum is the `Literal` of its words, and so is a field whose source lists its choices.
    """
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    trees = [
        ast.parse((folder / name).read_text(encoding="utf-8")) for name in ("training_args.py", "trainer_utils.py")
    ]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    enums = {name: _words_of(node) for name, node in classes.items() if _is_enum(node)}
    fields = {}
    for node in classes["TrainingArguments"].body:
        if not isinstance(node, ast.AnnAssign) or node.value is None or not isinstance(node.target, ast.Name):
            continue
        arguments = {item.arg: item.value for item in getattr(node.value, "keywords", ())}
        if not node.target.id.startswith("_"):
            kind = _type_of(node.annotation, enums, _choices(arguments.get("metadata")))
            fields[node.target.id] = (kind, _default_of(node.value, arguments))
    return fields


def _is_enum(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases)


def _words_of(enum: ast.ClassDef) -> tuple[str, ...]:
    values = [line.value.value for line in enum.body if isinstance(line, ast.Assign) and _is_text(line.value)]
    return tuple(values)


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _choices(metadata: ast.expr | None) -> tuple[str, ...]:
    """The words that a field's metadata lists, where they are literal."""
    if not isinstance(metadata, ast.Dict):
        return ()
    found = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True) if key is not None}
    choices = found.get("choices")
    return tuple(item.value for item in choices.elts if _is_text(item)) if isinstance(choices, ast.List) else ()


def _type_of(annotation: ast.expr, enums: dict[str, tuple[str, ...]], choices: tuple[str, ...]):
    code = compile(ast.Expression(annotation), "TrainingArguments", "eval")
    kind = eval(code, {"__builtins__": {}}, _TypeNames(_NAMES))
    first = annotation.left if isinstance(annotation, ast.BinOp) else annotation  # `SchedulerType | str`
    closed = choices or enums.get(first.id if isinstance(first, ast.Name) else "", ())
    if not closed:
        return kind
    words = typing.Literal[closed]
    return words | None if type(None) in typing.get_args(kind) else words


def _default_of(value: ast.expr, arguments: dict[str, ast.expr]):
    try:
        return ast.literal_eval(arguments.get("default", value))
    except ValueError:
        return NOT_LITERAL
