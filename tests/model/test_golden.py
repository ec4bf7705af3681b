"""A LLaVA-NeXT checkpoint gives the numbers that LLaVA-NeXT gave."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import parse_grid_pinpoints, process_images, select_best_resolution, tokenizer_image_token
from tests.model import golden

EMBEDS, LOGITS, LOSS, PIXELS = 1e-5, 1e-4, 1e-5, 1e-6


def check_outputs(model, case):
    merged_mask = case.io["merged_attention_mask"].bool()
    inputs = case.inputs
    with torch.no_grad():
        none, positions, mask, cache, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            inputs["input_ids"],
            None,
            inputs["attention_mask"],
            None,
            case.io["labels"],
            inputs["images"],
            inputs["modalities"],
            inputs["image_sizes"],
        )
        logits = model(**inputs).logits
        loss = model(**inputs, labels=case.io["labels"]).loss
    assert none is None and positions is None and cache is None
    assert torch.equal(mask.bool(), merged_mask) and mask.dtype == inputs["attention_mask"].dtype
    assert (embeds - case.io["inputs_embeds"])[merged_mask].abs().max() <= EMBEDS
    assert torch.equal(labels[merged_mask], case.io["merged_labels"][merged_mask])
    assert (logits - case.io["logits"])[merged_mask].abs().max() <= LOGITS
    assert abs(loss - case.io["loss"].item()) <= LOSS
    model.train()
    assert abs(model(**inputs, labels=case.io["labels"]).loss - case.io["loss"].item()) <= LOSS
    model.eval()


@pytest.mark.parametrize("name", golden.CASES)
def test_numbers_equal_llava_next(name, tmp_path):
    case = golden.case(name)
    tokenizer, model, processor, context_len = golden.load(case.folder)
    assert context_len == model.config.max_position_embeddings

    if case.info["modalities"][0] == "video":
        pixels = [processor.preprocess(case.pictures, return_tensors="pt")["pixel_values"]]
    else:
        pixels = process_images(case.pictures, processor, model.config)
    for ours, theirs in zip(pixels, case.pixels, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= PIXELS

    for row, mask, prompt in zip(case.io["input_ids"], case.io["attention_mask"], case.info["prompts"], strict=True):
        assert tokenizer_image_token(prompt, tokenizer) == row[mask].tolist()

    check_outputs(model, case)

    # what was loaded, saved: the same names and numbers, complete without the tower's folder
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    before, after = load_file(case.folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    moved = shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    _, model, processor, _ = golden.load(moved)
    check_outputs(model, case)
    if case.info["modalities"][0] != "video":
        again = process_images(case.pictures, processor, model.config)
        assert all(torch.equal(a, b) for a, b in zip(again, pixels, strict=True))


@pytest.mark.parametrize("name", golden.CASES)
def test_token_count_is_the_merge(name):
    """What the counter says an image takes is what it takes."""
    case = golden.case(name)
    _, model, _, _ = golden.load(case.folder)
    count = model.visual_token_counter()
    expected = [
        sum(
            count(pixels.shape, size, modality)
            for pixels, size, modality in zip(
                case.pixels, case.inputs["image_sizes"], case.inputs["modalities"], strict=True
            )
        )
        + int((case.io["input_ids"][case.io["attention_mask"]] != IMAGE_TOKEN_INDEX).sum())
    ]
    assert expected == [int(case.io["merged_attention_mask"].sum())]


@pytest.mark.parametrize("model_type", ["llava", "llava_qwen"])
@pytest.mark.parametrize("architectures", [None, ["LlavaQwenForCausalLM"]])
def test_published_model_type(tmp_path, model_type, architectures):
    """`model_type` "llava" is ambiguous; architectures, else the name, decide."""
    case = golden.case("qwen_clip_anyres_unpad")
    folder = tmp_path / "llava-onevision-qwen2-tiny"
    shutil.copytree(case.folder, folder)
    values = json.loads((folder / "config.json").read_text())
    values.update(model_type=model_type, architectures=architectures)
    (folder / "config.json").write_text(json.dumps(values))
    _, model, _, _ = golden.load(folder)
    assert type(model).__name__ == "LlavaQwenForCausalLM"
    check_outputs(model, case)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llava_qwen"


def test_select_best_resolution():
    grids = json.loads((golden.GOLDEN / "select_best_resolution.json").read_text())
    pinpoints = {
        "pinpoints_336": ([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], 336),
        "grid_1x1_to_6x6_384": ("(1x1),...,(6x6)", 384),
    }
    assert grids.keys() == pinpoints.keys()
    for name, rows in grids.items():
        candidates = parse_grid_pinpoints(*pinpoints[name])
        assert len(rows) > 100
        for width, height, best_width, best_height in rows:
            assert select_best_resolution((width, height), candidates) == (best_width, best_height)
