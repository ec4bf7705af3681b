"""Finding and importing the class of an encoder that a user brings along.

Whether it may be imported at all is for `trust.py` to say. It is found among what the user has installed or put beside
the work; nothing is run from the checkpoint's own folder or the hub's cache, unless `trusting_checkpoints`, and no file
in which no such class is defined.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys

from llava.config.own_tower import ClassPath
from llava.errors import LlavaError

from .trust import trusts_checkpoints


def load_class(path: ClassPath, checkpoint: str | None = None):
    """The class of a path.

    A file is looked for at its path, then by its name in the working directory and the folders of PYTHONPATH.

    Args:
        checkpoint: folder that a model is read from, in which no code is run.

    Raises:
        LlavaError: no such file, module or class, one that may not be run, or one whose code fails.
    """
    module = _load_file(path, checkpoint) if path.is_file else _load_module(path, checkpoint)
    found = getattr(module, path.name, None)
    if not isinstance(found, type):
        what = "nothing" if found is None else type(found).__name__
        raise LlavaError(f"vision tower {path}: {path.name} is {what}, expected a class")
    return found


def reading(error: BaseException, file: str | None = None) -> str:
    """An exception of a user's code in a line: its type, what it says, and where it was raised in `file`."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if file is not None and trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    said = " ".join(str(error).split())[:240]
    at = f" (line {line} of {file})" if line else ""
    return f"{type(error).__name__}: {said}{at}" if said else f"{type(error).__name__}{at}"


# --- files ---


def _load_file(path: ClassPath, checkpoint: str | None):
    file = _find_file(path, checkpoint)
    with open(file, "rb") as stream:
        text = stream.read()
    _check_defines(path, text, file)
    # by content: a notebook that has changed the file gets the new class
    name = f"llava_tower_{os.path.basename(file)[:-3]}_{hashlib.sha256(file.encode() + text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _importable(os.path.dirname(file)):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise LlavaError(f"vision tower {path}: {file} cannot be imported: {reading(error, file)}") from error
    return module


def _find_file(path: ClassPath, checkpoint: str | None) -> str:
    name = os.path.basename(path.source)
    places = [path.source, name, *(os.path.join(folder, name) for folder in sys.path if folder)]
    if trusts_checkpoints() and checkpoint:
        places.append(os.path.join(checkpoint, name))
    files = [os.path.realpath(place) for place in places if os.path.isfile(place)]
    allowed = [file for file in files if _may_run(file, checkpoint)]
    if allowed:
        return allowed[0]
    if files or os.path.isfile(os.path.join(checkpoint or "", name)):
        raise _not_trusted(path, files[0] if files else os.path.join(checkpoint, name))
    raise LlavaError(
        f"vision tower {path}: found no file {path.source}, expected {name}, which defines the class {path.name}, in "
        "the working directory or in a folder of PYTHONPATH"
    )


def _may_run(file: str, checkpoint: str | None) -> bool:
    """Code in a checkpoint's folder, or downloaded with one, is not run."""
    if trusts_checkpoints():
        return True
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [HF_HUB_CACHE, *([checkpoint] if checkpoint and os.path.isdir(checkpoint) else [])]
    return not any(_inside(file, os.path.realpath(folder)) for folder in folders)


def _inside(file: str, folder: str) -> bool:
    return os.path.commonpath([file, folder]) == folder


def _not_trusted(path: ClassPath, file: str) -> LlavaError:
    return LlavaError(
        f"vision tower {path}: found {file}, which came with the checkpoint and is not run; read it and copy it to the "
        "working directory, or load with trust_remote_code=True"
    )


def _check_defines(path: ClassPath, text: bytes, file: str) -> None:
    """Refuse a file that does not define the class, before any of it is run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise LlavaError(f"vision tower {path}: {file} is not Python ({error})") from None
    if defines(tree, path.name):
        return
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    raise LlavaError(
        f"vision tower {path}: {file} defines no class {path.name}"
        + (f", expected one of {', '.join(classes)}" if classes else "")
    )


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a module gives a name at its top level, or may do so (`import *`, `__getattr__`, under an `if`)."""
    return any(_gives(node, name) for node in ast.walk(tree))


def _gives(node: ast.AST, name: str) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return any((alias.asname or alias.name) in (name, "*") for alias in node.names)
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    if isinstance(node, ast.FunctionDef):
        return node.name == "__getattr__"
    return isinstance(node, ast.ClassDef) and node.name == name


# --- modules ---


def _load_module(path: ClassPath, checkpoint: str | None):
    top = path.source.split(".")[0]
    with _importable(os.getcwd()):
        for name in dict.fromkeys((top, path.source)):  # the package's own code runs where its module is looked for
            spec = _spec(name, path)
            if spec is None:
                raise LlavaError(
                    f"vision tower {path}: found no module {name}, expected it installed, in the working directory or "
                    "in a folder of PYTHONPATH"
                )
            places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
            for place in map(os.path.realpath, places):
                if not _may_run(place, checkpoint):
                    raise _not_trusted(path, place)
        if spec.has_location and spec.origin.endswith(".py") and path.source not in sys.modules:
            with open(spec.origin, "rb") as stream:
                _check_defines(path, stream.read(), spec.origin)
        try:
            return importlib.import_module(path.source)
        except Exception as error:
            said = reading(error, spec.origin)
            raise LlavaError(f"vision tower {path}: {path.source} cannot be imported: {said}") from error


def _spec(name: str, path: ClassPath):
    try:
        return importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        return None
    except Exception as error:  # the package's own code
        raise LlavaError(f"vision tower {path}: {name} cannot be imported: {reading(error)}") from error


@contextlib.contextmanager
def _importable(folder: str):
    """Inside, modules beside the class are found first, as those beside a script are."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
