"""`recipe.json` in a recipe's folder: what has become of its stages and evaluations, and with which settings."""

import datetime
import json
import subprocess
from pathlib import Path

from llava.train.checkpoints import write_json
from llava.train.recipe_file import Recipe

FILE, SCHEMA = "recipe.json", 1
STATUSES = ("waiting", "running", "finished", "preempted", "failed")


class RecipeState:
    """The state of a recipe's folder, written at every change.

    Args:
        recipe: as read.
        out: its folder; what an earlier start has left there is kept.
        config_hash: of the recipe and all settings.
        writes: whether this process keeps the file (of several machines, the first one).

    Attributes:
        stages, evaluations: {name: entry}.
    """

    def __init__(self, recipe: Recipe, out: Path, config_hash: str, writes: bool = True):
        self.path, self.writes, self.recipe, self.config_hash = out / FILE, writes, recipe, config_hash
        before = read_recipe_state(out) or {}
        self.stages = {stage.name: _stage(stage.name) for stage in recipe.stages}
        self.evaluations = {one.name: _evaluation(one.name) for one in recipe.evaluations}
        for kept, entries in ((self.stages, before.get("stages")), (self.evaluations, before.get("evaluations"))):
            for entry in entries or ():
                if entry.get("name") in kept:
                    kept[entry["name"]] |= entry

    def tell(self, entry: dict, **values) -> None:
        """Change an entry and write the file."""
        entry |= values
        self.write()

    def write(self) -> None:
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "recipe": self.recipe.name, "file": self.recipe.path, "commit": commit()}
        content |= {"config_hash": self.config_hash, "written": datetime.datetime.now(datetime.UTC).isoformat()}
        content |= {"stages": list(self.stages.values()), "evaluations": list(self.evaluations.values())}
        write_json(self.path, content)


def _stage(name: str) -> dict:
    return {"name": name, "status": "waiting", "seconds": 0.0, "steps": None, "command": None, "last_line": None}


def _evaluation(name: str) -> dict:
    return {"name": name, "status": "waiting", "file": None, "seconds": 0.0, "last_line": None}


def read_recipe_state(out: str | Path) -> dict | None:
    """The content of a folder's `recipe.json`; None where there is none, or none that can be read."""
    try:
        content = json.loads((Path(out) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("stages"), list) else None


def commit() -> str | None:
    """Of this checkout; None where it is not one, or git is not there."""
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
