"""Names that a module imports when they are first asked for: each of them is there."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lazy_modules() -> dict[str, ast.FunctionDef]:
    """The modules of both packages with a `__getattr__` of their own, by name, and that function."""
    found = {}
    for path in sorted(path for package in ("llava", "llavavit") for path in (ROOT / package).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
                found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = node
    return found


LAZY = lazy_modules()


def exported(module, function: ast.FunctionDef) -> set[str]:
    """`__all__`, the keys of every table that `__getattr__` looks into, and the names it compares with."""
    names = set(getattr(module, "__all__", ()))
    for node in ast.walk(function):
        table = getattr(module, node.id, None) if isinstance(node, ast.Name) else None
        if isinstance(table, dict):
            names |= table.keys()
        elif isinstance(node, ast.Compare):
            names |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return names


def test_the_modules_are_found():
    assert {"llava.data", "llava.model", "llava.train.arguments"} <= LAZY.keys()


@pytest.mark.parametrize("name", LAZY)
def test_every_name_resolves(name):
    module = importlib.import_module(name)
    names = exported(module, LAZY[name])
    assert names and all(isinstance(found, str) for found in names)
    for found in sorted(names):
        assert getattr(module, found) is not None
    with pytest.raises(AttributeError, match="has no attribute 'of_no_such_name'"):
        module.of_no_such_name  # noqa: B018
