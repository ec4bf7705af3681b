"""Every shipped train config, shrunk, in its own precision and ZeRO stage: what breaks first on a new machine."""

import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gpu_checks.demo import Runner
from gpu_checks.registry import Context, Result, check

STEPS, RECORDS, TOKENS = 2, 8, 4
RESUMED_LOSS = 1e-2  # kernels may differ from one process to the next
# encoder that a tower config names -> the demo's of that kind
TOWERS = {"clip": "clip_tower", "siglip": "siglip_tower", "onevision": "hevc_vit_tower", "hevc_vit": "hevc_vit_tower"}
SHRUNK = {
    **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1},
    **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0},
    **{"model_max_length": 512, "report_to": "none"},
}


@dataclass
class Outcome:
    """What became of one config; `error` is empty where nothing went wrong."""

    error: str = ""
    losses: tuple[float, ...] = ()
    resumed: tuple[float, ...] = ()
    seconds: float = 0.0


def make_records(folder: Path) -> None:
    """Records with pictures of noise, of questions one in four without any, where the demo's models look for them."""
    rng, records = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for number in range(RECORDS):
        question = "<image>\nWhat is shown?" if number % 4 else "What is that?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A number of digits."}]
        record = {"id": str(number), "conversations": turns}
        if number % 4:
            pixels = rng.integers(0, 255, (60 + 20 * number, 100, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            record["image"] = f"{number}.png"
        records.append(record)
    captions = [record for record in records if "image" in record]
    for name, some in (("pretrain.json", captions), ("train.json", records)):
        (folder / name).write_text(json.dumps(some))


def shrunk_flags(config: Path, data: Path, device: str) -> dict:
    """Keys that let this config run in seconds on the demo's random models; precision, ZeRO stage, LoRA, merge kind
    and optimizer stay its own."""
    from llava.config import resolve

    run = resolve([str(config), "--output_dir", "unused"])
    records = "pretrain.json" if run["version"] == "plain" else "train.json"
    flags = {**SHRUNK, "data_path": data / records, "image_folder": data / "images"}
    if "qwen2-vl" in run["model_name_or_path"].lower() or "qwen2_vl" in run["model_name_or_path"]:
        flags |= {"model_name_or_path": data / "qwen2_vl", "min_pixels": 56 * 56, "max_pixels": 112 * 112}
    else:
        name = run["vision_tower"].lower()
        kind = next(kind for kind in TOWERS if kind in name)
        flags |= {"model_name_or_path": data / "llm", "vision_tower": data / TOWERS[kind]}
        flags["pretrain_mm_mlp_adapter"] = None
        if "anyres" in run["image_aspect_ratio"]:
            flags["image_grid_pinpoints"] = "(1x1),...,(2x2)"
        if run["image_aspect_ratio"] == "native":
            flags |= {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    if device == "cpu":
        flags |= {"use_cpu": True} | {name: True for name in ("bf16", "fp16") if run[name]}
    if run["deepspeed"] and importlib.util.find_spec("deepspeed") is None:
        flags["deepspeed"] = None
    return flags


def losses(folder: Path) -> tuple[float, ...]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return tuple(entry["loss"] for entry in history if "loss" in entry)


def try_config(config: Path, data: Path, out: Path, runner: Runner, device: str) -> Outcome:
    """Two steps, and the second of them again from the checkpoint after the first."""
    outcome = Outcome()
    try:
        flags = shrunk_flags(config, data, device) | {"output_dir": out}
        words = [word for key, value in flags.items() for word in (f"--{key}", value)]
        for title in ("train", "resume"):
            outcome.seconds += runner.run(f"{title}-{config.stem}", "llava/train/train_mem.py", config, *words)
            found = losses(out)
            if title == "train":
                outcome.losses = found
                (out / "trainer_state.json").unlink()
                shutil.rmtree(out / f"checkpoint-{STEPS}")
            else:
                outcome.resumed = found
    except Exception as error:  # the other configs still run
        outcome.error = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    return outcome


def answer(folder: Path, base: Path, device: str, picture: Path) -> int:
    """Tokens that the saved model answers with, loaded as any user of it would."""
    from llava.families import family_of

    family = family_of(str(folder))
    base = None if (folder / "adapter_config.json").exists() or list(folder.glob("model*.safetensors")) else str(base)
    loaded = family.load(str(folder), base=base, device=device)
    prompt = family.prompt([("human", "<image>\nWhat is shown?")], loaded)
    inputs = family.inputs([prompt], [[Image.open(picture).convert("RGB")]], loaded)
    with torch.no_grad():
        made = loaded.model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return made.shape[1] - (inputs["input_ids"].shape[1] if family.returns_prompt else 0)


@check("smoke")
def smoke(context: Context, result: Result):
    """Each shipped train config, shrunk: two steps, a resumed one, load and generate."""
    data, out = context.workdir / "smoke", context.workdir / "smoke_runs"
    for folder in (data, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    runner = Runner(context, out)
    make_records(data)
    runner.run("models", "playground/make_demo_model.py", "--output", data)
    configs = sorted((context.root / "configs" / "train").glob("*.yaml"))
    if context.options.smoke_configs is not None:
        configs = [config for config in configs if config.stem in context.options.smoke_configs]
    at_once = max(1, min(len(configs), (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = list(pool.map(lambda c: try_config(c, data, out / c.stem, runner, context.device), configs))
    for config, outcome in zip(configs, outcomes, strict=True):
        if outcome.error:
            result.test(config.stem, False, outcome.error)
            continue
        same = len(outcome.losses) == len(outcome.resumed) == STEPS and all(
            abs(a - b) <= RESUMED_LOSS for a, b in zip(outcome.losses, outcome.resumed, strict=True)
        )
        text = f"losses {outcome.losses}, resumed {outcome.resumed}"
        result.test(f"{config.stem}: trains and resumes", same and bool(np.isfinite(outcome.losses).all()), text)
        try:
            tokens = answer(out / config.stem, data / "llm", context.device, data / "images" / "1.png")
        except Exception as error:
            result.test(
                f"{config.stem}: answers", False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        else:
            result.test(f"{config.stem}: answers", tokens == TOKENS, f"{tokens} tokens, expected {TOKENS}")
        result.figure(config.stem, seconds=round(outcome.seconds, 1))
