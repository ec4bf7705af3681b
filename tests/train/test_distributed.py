"""Two processes, plain or under ZeRO-2 and ZeRO-3, take the same steps as one process on the same global batch."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.model import own_encoders

ROOT = Path(__file__).parents[2]
# Global batch 8 in 2 accumulated micro-batches. With two ranks of 2 rows, rank 1's first micro-batch has no image, and
# in the last step rank 0 has none at all.
KINDS = "iittimti" + "miittiti" + "ttiittim"


DEEPSPEED = pytest.mark.skipif(
    shutil.which("c++") is None, reason="DeepSpeed compiles an extension at first use: no C++ compiler"
)
RATES = {"mm_projector_lr": 2e-3, "mm_vision_tower_lr": 5e-4}
NATIVE = {  # every image a size of its own, packed
    "vision_tower": "hevc_vit",
    "mm_vision_tower_type": "hevc_vit_packing",
    "mm_projector_type": "spatial_merge",
    "image_aspect_ratio": "native",
    "gradient_checkpointing": True,
}
ADAPTIVE = {  # every image a number of tokens of its own
    **NATIVE,
    "adaptive_patches": '{"method": "budget", "alpha": 0.5}',
    "min_pixels": 56 * 56,
}
COMPRESSED = {  # stage 1 with a compressor, which trains behind a frozen tower
    "vision_tower": "clip_fine",
    "mm_tunable_parts": "mm_mlp_adapter",
    "use_token_compression": True,
    "compression_input_size": 4,
    "compression_output_size": 2,
}
LORA = {  # over a whole checkpoint, with a tower that trains too
    "model_name_or_path": "trained",
    "lora_enable": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "gradient_checkpointing": True,
}
EVALUATED = {  # five batches of two for two ranks, some without an image; after the first step some answers are right
    "eval_data_path": "tttiimtti",
    "eval_max_new_tokens": 1,
    "learning_rate": 1e-2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_exact_match": True,
    "eval_blank_images": True,
    "per_device_eval_batch_size": 2,
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_exact_match", "save_total_limit": 1},
    **{"save_strategy": "steps", "save_steps": 1},
}
OWN = {"vision_tower": "own", "vision_tower_image": json.dumps(own_encoders.IMAGE)}  # with parts that get no gradient
ROWS = {"pack_sequences": True}  # the samples of a step share its four rows; one process has them padded
SHORT = ROWS | {"kinds": "iittimti" + "miittiti" + "it"}  # the last step has a sample for each of two rows, of four
PROJECTOR_ALONE = {"mm_tunable_parts": "mm_mlp_adapter", "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def single(kit, tmp_path_factory):
    """A function: the folder of one process's run, made at its first use."""
    folder, made = tmp_path_factory.mktemp("single"), {}

    def of(kinds=KINDS, pack_sequences=False, **changes):
        key = "_".join([f"{len(kinds)}", *changes])
        if key not in made:
            made[key] = kit.run(folder / key, kinds, gradient_accumulation_steps=2, **RATES, **changes)
        return made[key]

    return of


CASES = {  # name -> ZeRO stage, keys
    "ddp": (None, {}),
    "ddp-evaluated": (None, EVALUATED),
    "zero3-evaluated": (3, EVALUATED),
    "zero2": (2, {}),
    "zero3-from-a-checkpoint": (3, {"model_name_or_path": "trained"}),
    "zero3-projector": (3, PROJECTOR_ALONE),
    "zero3-packed-native": (3, NATIVE),
    "zero3-packed-adaptive": (3, ADAPTIVE),
    "zero3-lora": (3, LORA),
    "zero3-compressor": (3, COMPRESSED),
    "zero3-own-tower": (3, OWN),
    "ddp-rows": (None, ROWS),
    "zero2-rows-left-empty": (2, SHORT),
    "zero3-rows-left-empty": (3, SHORT),
    "zero3-adaptive-in-rows": (3, ADAPTIVE | ROWS),
    "zero3-lora-in-rows": (3, LORA | ROWS),
}
SHORT_OF_TIME = ("ddp", "zero2", "zero3-from-a-checkpoint", "zero3-projector", "zero3-evaluated", "zero3-lora")
SHORT_OF_TIME += ("zero2-rows-left-empty", "zero3-adaptive-in-rows")
if not os.environ.get("LLAVA_LONG_TESTS"):  # scripts/test_long.sh tries all
    CASES = {case: CASES[case] for case in SHORT_OF_TIME}


def keys_of(case, kit, single) -> dict:
    """The keys of a case, its parts as files."""
    changes = dict(CASES[case][1])
    if "model_name_or_path" in changes:  # stage 2: tower, projector and newline come from a LLaVA checkpoint
        changes["model_name_or_path"] = single()
    if "vision_tower" in changes:  # named as the kit's
        changes["vision_tower"] = getattr(kit, changes["vision_tower"])
    if "eval_data_path" in changes:
        path = Path(kit.records(changes["eval_data_path"]))
        records = json.loads(path.read_text())
        for number, record in enumerate(records):
            record["conversations"][1]["value"] = "BA"[number % 2]  # what is learned begins with A
        changes["eval_data_path"], changes["eval_image_folder"] = path.with_name("ask.json"), path.parent / "images"
        changes["eval_data_path"].write_text(json.dumps(records))
    return changes


@pytest.fixture(scope="module")
def two(kit, forks, single, tmp_path_factory):
    """The folder that holds a folder for each case's run on two processes, which take one case after the other."""
    out, runs = tmp_path_factory.mktemp("two"), []
    for case, (stage, _) in CASES.items():
        deepspeed = None if stage is None else ROOT / f"scripts/zero{stage}.json"
        if case == "zero3-evaluated":  # small weights are split as well
            settings = json.loads(deepspeed.read_text())
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            deepspeed = out / "zero3_all.json"
            deepspeed.write_text(json.dumps(settings))
        halved = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, deepspeed=deepspeed, use_cpu=True)
        keys = {"kinds": KINDS, **halved, **RATES, **keys_of(case, kit, single)}
        runs.append(kit.flags(out / case, **keys))
    status, said = forks.runs(2, runs, out)
    assert status == 0, said[-9000:]
    return out


def tokens_of(step: dict) -> tuple[float, float]:
    """Tokens of a sample, and the share of pictures in them, over all ranks."""
    return step["perf/tokens_per_s"] / step["perf/samples_per_s"], step["perf/visual_token_share"]


def evaluations(out: Path) -> list[dict]:
    """What was logged of the evaluations in a run, without their seconds."""
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k != "eval_runtime"} for entry in logged if "eval_loss" in entry]


@DEEPSPEED
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(kit, single, two, case):
    changes = keys_of(case, kit, single)
    expected, out = single(**changes), two / case
    ours, theirs = tiny.history(out, measured=True), tiny.history(expected, measured=True)
    assert len(ours) == len(theirs) == 3
    for got, want in zip(ours, theirs, strict=True):
        assert tokens_of(got) == pytest.approx(tokens_of(want), rel=1e-4)
        assert abs(got["loss"] - want["loss"]) <= 1e-5, (got, want)
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5, (got, want)

    found, wanted = evaluations(out), evaluations(expected)
    assert len(found) == len(wanted) == (3 if "eval_strategy" in changes else 0)
    for got, want in zip(found, wanted, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
        assert got["eval_n"] == 9 and {"eval_exact_match_all", "eval_blank_images_exact_match"} <= got.keys()
    if found:
        assert found[0]["eval_exact_match"] > found[-1]["eval_exact_match"]
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]

    # what is saved is whole, and the same
    names = ["mm_projector"] if changes.get("mm_tunable_parts") == "mm_mlp_adapter" else ["model"]
    for name in ["adapter_model", "non_lora_trainables"] if "lora_enable" in changes else names:
        whole, other = (load_file(folder / f"{name}.safetensors") for folder in (expected, out))
        assert whole.keys() == other.keys()
        assert all(torch.allclose(whole[key], other[key], atol=1e-4) for key in whole)
