"""A training step hardly waits for the device, whatever the family and the batch; see `tests.support.waits`."""

from dataclasses import dataclass

import pytest
import torch

from tests import tiny
from tests.support.families import CHECKPOINTS
from tests.support.waits import Waits

NATIVE = {  # every image a size of its own, packed
    "mm_vision_tower_type": "hevc_vit_packing",
    "mm_projector_type": "spatial_merge",
    "image_aspect_ratio": "native",
    "min_pixels": 56 * 56,
}
BUDGET = '{"method": "budget", "alpha": 0.5}'
DRAWN = '{"method": "budget", "alpha": [0.2, 0.8]}'
# name: (family, tower, keys of the run)
RUNS = {
    "llava-pad": ("llava", "clip", {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}),
    "llava-anyres": ("llava", "clip", {}),
    "llava-compressed": (
        "llava",
        "clip_fine",
        {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2},
    ),
    "llava-hevc": ("llava", "hevc_vit", {"image_aspect_ratio": "pad", "mm_vision_tower_type": "hevc_vit"}),
    "llava-packed": ("llava", "hevc_vit", NATIVE),
    "llava-packed-adaptive": ("llava", "hevc_vit", NATIVE | {"adaptive_patches": BUDGET}),
    "llava-packed-drawn": ("llava", "hevc_vit", NATIVE | {"adaptive_patches": DRAWN}),
    "qwen2_vl": ("qwen2_vl", None, {}),
    "qwen2_vl-adaptive": ("qwen2_vl", None, {"adaptive_patches": BUDGET}),
    "qwen2_vl-drawn": ("qwen2_vl", None, {"adaptive_patches": DRAWN}),
    "qwen2_5_vl": ("qwen2_5_vl", None, {}),
    "qwen2_5_vl-adaptive": ("qwen2_5_vl", None, {"adaptive_patches": BUDGET}),
    "qwen3_vl": ("qwen3_vl", None, {}),
}


class _Enough(Exception):
    """Ends a run whose batches are known."""


@dataclass
class Step:
    """What one batch did: `loss`, `gradients` by name, and the waits."""

    loss: float
    gradients: dict
    waits: Waits


class Taken:
    """The model of a run and the batches of its first three steps, of which the third has no image."""

    def __init__(self, flags):
        from llava.train import train
        from llava.train.llava_trainer import LLaVATrainer

        self.batches = []

        def keep(trainer, model, inputs, count=None):
            self.model = model.train()
            self.batches.append((trainer._prepare_inputs(inputs), count))
            if len(self.batches) == 3:
                raise _Enough
            return torch.zeros(())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LLaVATrainer, "training_step", keep)
            with pytest.raises(_Enough):
                train.train(flags)

    def step(self, number: int, **changes) -> Step:
        batch, count = self.batches[number]
        self.model.zero_grad()
        with Waits() as waits:
            self.model = waits.to_device(self.model)
            batch, count = waits.to_device({**batch, **changes}), waits.to_device(count)
            loss = self.model(**batch, num_items_in_batch=count).loss
            loss.backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return Step(loss.detach(), found, waits)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A function: what the run of a name in `RUNS` takes."""
    made, folder = {}, tmp_path_factory.mktemp("runs")

    def of(name: str) -> Taken:
        if name not in made:
            family, tower, changes = RUNS[name]
            here = folder / name
            here.mkdir()
            checkpoint, keys = CHECKPOINTS[family](here)
            if tower is not None:
                side = 56 if tower == "clip_fine" else 28
                keys["vision_tower"] = tiny.tower(here / tower, kind=tower.removesuffix("_fine"), side=side)
            keys = {"model_name_or_path": checkpoint, **keys, **changes}
            run = {"data_path": tiny.records(here / "records", "imtitt"), "output_dir": here / "out"}
            run |= {"image_folder": here / "records/images", "per_device_train_batch_size": 2, **keys}
            if family != "llava":
                known = {"version": None, "vision_tower": None, **{key: None for key in LLAVA_ONLY}}
                run = known | run
            made[name] = Taken(tiny.train_flags(here, **run))
        return made[name]

    return of


LLAVA_ONLY = (
    *("mm_vision_select_layer", "mm_projector_type", "mm_patch_merge_type", "image_aspect_ratio"),
    *("image_grid_pinpoints", "mm_use_im_patch_token"),
)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_waits_of_a_step(taken, name, number):
    step = taken(name).step(number)
    print(f"COUNT {name} {number} {len(step.waits.where)}\n{step.waits}")
    assert len(step.waits.where) <= 3, str(step.waits)
