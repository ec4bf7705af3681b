"""Which room of the house may import which: arrows point one way, and what a model is called is asked in two rooms."""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import llava
from llava.conversation import conv_templates
from llava.families import FAMILIES

ROOT = Path(__file__).parents[1]
# a room may import those of the rows above its own, and the plain modules beside them
RANKS = [
    ("llavavit",),
    ("config", "images", "drawing"),
    ("model",),
    ("data",),
    ("families",),
    ("inference",),
    ("mm_utils",),  # a public face of those above
    ("eval",),
    ("train",),  # which evaluates
    ("compare",),  # which trains
    ("tools", "serve"),
    ("doctor",),  # which imports none of them: whatever may be broken, it runs
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
PLAIN = {"absent", "constants", "conversation", "conversation_pictures", "errors", "text_encoding", "utils"}
# the settings of a run are asked of the model's family where they are shown
EXEMPT = {"llava/config/__main__.py"}
OUTSIDE = ("data", "train", "eval", "serve", "inference", "tools", "config")


def files(room: str) -> list[Path]:
    folder = ROOT / room if room == "llavavit" else ROOT / "llava" / room
    found = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return [path for path in found if str(path.relative_to(ROOT)) not in EXEMPT]


def imported(tree: ast.AST, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, full name of a module or of what is taken from one) of every import, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *([node.module] if node.module else [])))
            found += [(node.lineno, f"{start}.{alias.name}") for alias in node.names]
    return found


def wrong_arrows(room: str, text: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """The imports of a file of `room` that it may not have."""
    wrong = []
    for line, name in imported(ast.parse(text), package):
        first, *rest = name.split(".")
        target = rest[0] if first == "llava" and rest else first
        if first in ("tests", "benchmarks", "scripts", "playground"):
            wrong.append((line, name))
        elif first in ("llava", "llavavit") and target != room and target not in PLAIN:
            if RANK.get(target, len(RANKS)) >= RANK[room]:
                wrong.append((line, name))
        elif first == "llava" and room == "llavavit":
            wrong.append((line, name))
    return wrong


@pytest.mark.parametrize("room", RANK)
def test_arrows_point_one_way(room):
    assert files(room)
    found = []
    for path in files(room):
        where = path.relative_to(ROOT)
        found += [f"{where}:{line}: {name}" for line, name in wrong_arrows(room, path.read_text(), where.parts[:-1])]
    assert not found


def test_the_doctor_imports_the_standard_library_alone():
    found = set()
    for path in files("doctor"):
        found |= {name.split(".")[0] for _, name in imported(ast.parse(path.read_text()), ("llava", "doctor"))}
        names = {name for _, name in imported(ast.parse(path.read_text()), ("llava", "doctor"))}
        assert all(name.startswith(("llava.doctor.", "llava.errors.")) for name in names if name.startswith("llava"))
    assert found - {"llava"} <= sys.stdlib_module_names


def test_every_room_has_its_place():
    rooms = {path.parent.name for path in (ROOT / "llava").glob("*/__init__.py")}
    assert rooms == RANK.keys() - {"llavavit", "mm_utils"}
    for name in PLAIN:
        tree = ast.parse((ROOT / "llava" / f"{name}.py").read_text())
        found = [name.split(".")[1] for _, name in imported(tree, ("llava",)) if name.startswith("llava.")]
        assert set(found) <= PLAIN


@pytest.mark.parametrize(
    ("room", "text", "count"),
    [
        ("data", "def f():\n    from llava.families import family_of\n", 1),
        ("data", "from llava.data.turns import x\nimport llava.model.builder, torch\nfrom llava import errors\n", 0),
        ("images", "from llava import config", 1),
        ("images", "from ..model.lora import x", 1),
        ("images", "from . import reading", 0),
        ("model", "from llava.mm_utils import x", 1),
        ("model", "import llavavit.layers\nfrom tests import tiny", 1),
        ("llavavit", "from llava.errors import LlavaError", 1),
    ],
)
def test_wrong_arrows_are_found(room, text, count):
    package = ("llavavit",) if room == "llavavit" else ("llava", room)
    assert len(wrong_arrows(room, text, package)) == count


def asked_names(text: str) -> list[tuple[int, str]]:
    """Where a file compares something with a model's name: `== "qwen..."`, `in ("qwen2_vl", ...)`, `startswith`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            parts = node.args
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        texts = [leaf.value for part in parts for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)]
        found += [(node.lineno, text) for text in texts if isinstance(text, str) and names_a_model(text)]
    return found


def names_a_model(text: str) -> bool:
    """Of a family but LLaVA, or of any Qwen; a conversation template's name is none."""
    return (text.lower().startswith("qwen") or text in FAMILIES.keys() - {"llava"}) and text not in conv_templates


def test_only_families_and_models_ask_which_model_it_is():
    found = []
    for path in [path for room in OUTSIDE for path in files(room)]:
        found += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in asked_names(path.read_text())]
    assert not found


def test_such_questions_are_found():
    for text in (
        'if kind == "qwen2_vl": pass',
        'x = config.model_type in ("llava", "qwen3")',
        'x = name.lower().startswith("qwen")',
        'match kind:\n    case "qwen2_5_vl": pass',
    ):
        assert len(asked_names(text)) == 1
    assert not asked_names('if version == "qwen_1_5" or family == "llava": pass\nkind = "qwen2_vl"')


# --- names ---


def is_there(name: str) -> bool:
    """A module, or what one has; what it has may be loaded when it is first asked for."""
    module, _, last = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), last) or bool(importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in ("llava", "llavavit"):
            return False
        raise


@pytest.mark.parametrize("folder", ["llava", "llavavit", "benchmarks", "playground", "scripts"])
def test_every_name_that_is_imported_is_there(folder):
    """Also inside functions, which no other test may come through."""
    asked = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        where = path.relative_to(ROOT)
        for line, name in imported(ast.parse(path.read_text()), where.parts[:-1]):
            if name.startswith(("llava.", "llavavit.")):
                asked.setdefault(name, f"{where}:{line}: {name}")
    assert asked and not [where for name, where in asked.items() if not is_there(name)]


PACKAGES = [info.name for info in pkgutil.walk_packages(llava.__path__, "llava.") if info.ispkg]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_resolves(package):
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_a_name_that_is_not_there_is_found():
    assert is_there("llava.data.load_records") and is_there("llava.model.builder")
    assert not is_there("llava.data.text_encoder") and not is_there("llava.eval.inference.Inference")
