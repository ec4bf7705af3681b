"""A comparison of tiny towers on tiny data, and a program in the recipe's place that only writes down its work."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests import tiny
from tests.support.forks import hear_all

STUB = Path(__file__).with_name("stub_recipe.py")
TRAIN = """tower: {folder}/clip.yaml
model_name_or_path: {folder}/llm
version: qwen_1_5
mm_use_im_patch_token: false
mm_tunable_parts: mm_vision_tower,mm_mlp_adapter,mm_language_model
image_aspect_ratio: pad
data_path: {folder}/data/records.json
image_folder: {folder}/data/images
per_device_train_batch_size: 4
max_steps: 2
learning_rate: 1e-3
logging_steps: 1
model_max_length: 512
gradient_checkpointing: false
save_strategy: no
"""
RECIPE = """name: small
output_dir: {folder}/out
stages:
  - {{name: pretrain, config: {folder}/train.yaml}}
  - {{name: finetune, config: {folder}/train.yaml, from: pretrain, passes: model}}
evaluations:
  - {{name: heldout, kind: exact_match, data_path: {folder}/data/records.json, image_folder: {folder}/data/images}}
report: false
"""
TOWER = """vision_tower: {folder}/{name}
mm_vision_select_layer: -2
mm_vision_select_feature: patch
mm_projector_type: mlp2x_gelu
"""


class Small:
    """Files of a recipe and of its towers clip and siglip (4 tokens), fine (16 tokens) in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny.llm(folder / "llm")
        for name, options in {"clip": {}, "siglip": {"kind": "siglip"}, "fine": {"side": 56}}.items():
            tiny.tower(folder / name, **options)
            (folder / f"{name}.yaml").write_text(TOWER.format(folder=folder, name=name))
        tiny.records(folder / "data", "iitiittiiiti")
        (folder / "train.yaml").write_text(TRAIN.format(folder=folder))
        (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))

    def tower(self, name: str, tower: str = "clip", **more) -> dict:
        return {"name": name, "tower": str(self.folder / f"{tower}.yaml"), **more}

    def write(self, path: Path, towers: list[dict], **more) -> Path:
        """A comparison's YAML (JSON is YAML)."""
        content = {"name": "small", "recipe": str(self.folder / "recipe.yaml"), "seeds": [0, 1], "towers": towers}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | more))
        return path


def start(words: list, behave: dict | None = None) -> subprocess.Popen:
    """The command in a process of its own; with `behave` each run is `stub_recipe.py`, which behaves so."""
    env = dict(os.environ) | ({} if behave is None else {"STUB_RECIPE": json.dumps(behave)})
    command = [sys.executable, "-m", "tests.compare.small", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, preexec_fn=hear_all, **pipes)  # a background job may ignore Ctrl-C


def main(words: list[str]) -> int:
    """The command. Where the environment says how the stub is to behave, that is the recipe's program, and what needs
    torch is not looked at."""
    from llava.compare import driver, runs
    from llava.compare.command import command
    from llava.compare.facts import Facts
    from llava.tools.compare_towers import build_parser

    program, runs._LAST = runs.PROGRAM, 1.0
    if "STUB_RECIPE" in os.environ:
        program, driver.check = (sys.executable, str(STUB)), lambda plan: Facts()
    return command(*build_parser().parse_known_args(words), program)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)


if __name__ == "__main__":
    from llava.errors import report_errors

    sys.exit(report_errors(main)(sys.argv[1:]))
