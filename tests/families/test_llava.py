"""LLaVA's samples where alpha is drawn, by the rule that every family has."""

from llava.data import LazySupervisedDataset, load_records
from llava.data.sampler import EpochSampler
from llava.model.adaptive_patches import PatchChoice
from tests import tiny
from tests.data.common import llava_parts, tokenizer
from tests.train.conftest import Kit


def test_alphas_of_a_record_come_from_seed_epoch_record_and_image(tmp_path):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    choice = PatchChoice("budget", (0.2, 0.9))
    records = load_records(tiny.records(tmp_path, "imt"))
    options = {"image_folder": str(tmp_path / "images"), "seed": 5}
    family, loaded, args = llava_parts(tokenizer("qwen"), processor, patch_choice=choice, **options)
    data = LazySupervisedDataset(records, family, loaded, args)
    assert data[2, 0]["patch_alphas"] == [choice.draw(5, 2, 0, 0)]
    assert data[0, 1]["patch_alphas"] == [choice.draw(5, 0, 1, 0), choice.draw(5, 0, 1, 1)]
    assert "patch_alphas" not in data[0, 2]
    batch = family.collate([data[0, number] for number in (1, 2, 0)], loaded, args)
    assert batch["patch_alphas"] == [choice.draw(5, 0, 1, 0), choice.draw(5, 0, 1, 1), choice.draw(5, 0, 0, 0)]
    fixed = LazySupervisedDataset(records, *llava_parts(tokenizer("qwen"), processor, **options))
    assert "patch_alphas" not in fixed[0] and not fixed.draws and data.draws


def test_every_epoch_trains_with_alphas_of_its_own(tmp_path, monkeypatch):
    """Those of the batch reach the tower, from a worker process too."""
    from llava.model.multimodal_encoder.hevc_vit_packing_tower import HEVCViTPackingVisionTower

    kit, seen, choose = Kit(tmp_path / "parts"), [], HEVCViTPackingVisionTower.choose_patches

    def watched(self, images, alphas=None, levels=None):
        seen.append(alphas)
        for image, alpha, found in zip(images, alphas, levels, strict=True):  # a worker has chosen already
            assert found.equal(self.patch_chooser.levels_of(image, alpha))
        return choose(self, images, alphas, levels)

    monkeypatch.setattr(HEVCViTPackingVisionTower, "choose_patches", watched)
    order = []
    monkeypatch.setattr(EpochSampler, "__iter__", lambda self: iter([order.append(i) or i for i in pairs(self)]))
    kit.run(
        tmp_path / "out",
        "iiii",
        vision_tower=kit.hevc_vit,
        mm_vision_tower_type="hevc_vit_packing",
        image_aspect_ratio="square",
        image_grid_pinpoints=None,
        adaptive_patches="{method: budget, alpha: [0.3, 0.9]}",
        train_sampling_strategy=None,
        per_device_train_batch_size=2,
        dataloader_num_workers=1,
        max_steps=4,
        seed=3,
    )
    choice = PatchChoice("budget", (0.3, 0.9))
    drawn = [choice.draw(3, *at, 0) for at in order]
    assert {epoch for epoch, _ in order} >= {0, 1} and len(set(drawn)) == len(drawn)
    assert [alpha for batch in seen for alpha in batch] == drawn[:8]


def pairs(sampler) -> list[tuple[int, int]]:
    return [(sampler.epoch, index) for index in sampler.sampler]
