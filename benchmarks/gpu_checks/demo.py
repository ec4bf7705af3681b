"""The demo, trained by the very commands of scripts/finetune.sh but in bf16 and in a folder of its own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu_checks.registry import Context, Result, check

BAR = 0.90  # held-out exact match of the whole demo
CONFIGS = {"pretrain": "configs/train/demo_pretrain.yaml", "finetune": "configs/train/demo.yaml"}
CUT_STEPS, CUT_QUESTIONS = 2, 64  # on a CPU, unless --demo-steps says otherwise
NEEDED = ("pydantic", "yaml", "sklearn", "accelerate")


class Runner:
    """Runs the demo's commands from the root of the checkout, each with a log file."""

    def __init__(self, context: Context, folder: Path):
        self.root, self.folder = context.root, folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(context.root), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",
        }
        if context.device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, title: str, *command) -> float:
        """Seconds that the command took; raises RuntimeError with the end of its output when it fails."""
        log = self.folder / f"{title}.log"
        start = time.monotonic()
        with open(log, "w") as file:
            words = [sys.executable, *map(str, command)]
            done = subprocess.run(words, cwd=self.root, env=self.environment, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise RuntimeError(f"{title} ended with status {done.returncode}: {log.read_text()[-300:]}")
        return round(time.monotonic() - start, 1)


def stage_flags(data: Path, steps: int | None) -> list:
    """What both stages are told beyond their configs."""
    flags = ["--bf16", "True", "--image_folder", data / "images", "--vision_tower", data / "clip_tower"]
    return flags + (["--max_steps", steps] if steps else [])


def training_figures(folder: Path) -> dict:
    """Steps, last loss and seconds of a finished stage."""
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    runtime = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
    return {
        "steps": state["global_step"],
        "last_loss": losses[-1] if losses else None,
        "train_seconds": round(runtime[-1], 1) if runtime else None,
    }


@check("demo")
def demo(context: Context, result: Result):
    """The demo in bf16: data, models, both stages, held-out exact match (on a CPU cut to a few steps)."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise RuntimeError(f"training needs {', '.join(lacking)}; put a folder that holds them on PYTHONPATH")
    missing = [config for config in CONFIGS.values() if not (context.root / config).is_file()]
    if missing:
        raise RuntimeError(f"there is no {' and no '.join(missing)}")
    cut = context.device == "cpu" and context.options.demo_steps is None
    steps = CUT_STEPS if cut else context.options.demo_steps or None
    data, out = context.workdir / "demo", context.workdir / "demo_runs"
    for folder in (data, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    runner, common = Runner(context, out), stage_flags(data, steps)
    seconds = {
        "data": runner.run("data", "playground/make_demo_data.py", "--output", data),
        "models": runner.run("models", "playground/make_demo_model.py", "--output", data),
    }
    train = ("-m", "llava.train.train")
    stages = {
        "pretrain": (data / "llm", data / "pretrain.json"),
        "finetune": (out / "pretrain", data / "train.json"),
    }
    for name, (start_from, records) in stages.items():
        own = ["--model_name_or_path", start_from, "--data_path", records, "--output_dir", out / name]
        seconds[name] = runner.run(name, *train, CONFIGS[name], *common, *own)
        result.figure(f"stage {name}", **training_figures(out / name))
    evaluation = ["--model-path", out / "finetune", "--data-path", data / "heldout.json"]
    evaluation += ["--image-folder", data / "images", "--device", context.device, "--output", out / "eval.json"]
    evaluation += ["--limit", CUT_QUESTIONS] if steps else []
    seconds["evaluation"] = runner.run("evaluation", "-m", "llava.eval.exact_match", *evaluation)
    score = json.loads((out / "eval.json").read_text())
    result.figure("seconds", **seconds, total=round(sum(seconds.values()), 1))
    kinds = {kind: round(values["exact_match"], 4) for kind, values in score["by_kind"].items()}
    result.figure("held-out exact match", overall=score["exact_match"], n=score["n"], **kinds)
    text = f"{score['exact_match']:.3f} (n={score['n']}) in {sum(seconds.values()):.0f} s"
    if steps:
        done = all(training_figures(out / name)["steps"] == steps for name in stages)
        result.test("cut demo runs", done and score["n"] >= CUT_QUESTIONS, f"{steps} steps a stage, exact match {text}")
    else:
        result.test("held-out exact match", score["exact_match"] >= BAR, f"{text}, bar {BAR}")
