"""Qwen2-VL and Qwen2.5-VL with adaptive patches against stock transformers and against direct formulas."""

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from llava.errors import LlavaError
from llava.families import get_family
from llava.model.adaptive_patches import patch_entropy, select_patches_by_budget
from llava.model.qwen2_vl import AdaptiveQwen2VLImageProcessor
from tests.model.qwen2_vl.parts import make_folder, picture, prompt

SIZES = ((112, 112), (224, 140), (84, 196))
BUDGET = {"patch_selection_method": "budget", "alpha": 0.3}


STOCK = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
}


KINDS = {name: get_family(name) for name in ("qwen2_vl", "qwen2_5_vl")}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kind):
    return make_folder(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def processor(folder, kind):
    return KINDS[kind].classes()[1].from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder, kind):
    return KINDS[kind].classes()[0].from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def stock(folder, kind):
    return STOCK[kind][0].from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def stock_processor(folder, kind, processor):
    class StockProcessor(STOCK[kind][1]):  # which without torchvision cannot be made
        get_attributes = KINDS[kind].classes()[1].get_attributes

    return StockProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), processor.tokenizer)


def batch(processor, **images_kwargs):
    """Three rows: two images, one, none; padded on the left."""
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    texts = [prompt(2), prompt(1), prompt(0) + "and a longer question than the others"]
    processor.tokenizer.padding_side = "left"
    return processor(
        images=[pictures[:2], pictures[2:], []],
        text=texts,
        padding=True,
        return_tensors="pt",
        images_kwargs=images_kwargs,
    )


def one(processor, size=(224, 140), **images_kwargs):
    return processor(images=picture(*size), text=prompt(1), return_tensors="pt", images_kwargs=images_kwargs)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_device_changes_nothing(processor, alpha):
    """Without a GPU the device is the host, given by name, and memory laid out in another way."""
    plain = batch(processor, patch_selection_method="budget", alpha=alpha)
    named = batch(processor, patch_selection_method="budget", alpha=alpha, device="cpu")
    assert set(plain) == set(named) and all(torch.equal(plain[key], named[key]) for key in plain)
    arrays = [np.flip(np.asarray(picture(*SIZES[0])).transpose(2, 0, 1), 2)] * 2  # strides below 0
    made = [
        processor.image_processor(image, patch_selection_method="budget", alpha=alpha, do_resize=False)
        for image in (arrays[0], arrays[1].copy())
    ]
    assert isinstance(made[0]["pixel_values"], np.ndarray)
    assert all(np.array_equal(made[0][key], made[1][key]) for key in made[1])


@pytest.mark.parametrize("kwargs", [{}, {"patch_selection_method": "budget", "alpha": 1.0}], ids=["none", "alpha 1"])
def test_all_base_patches_equal_stock(model, stock, processor, stock_processor, kwargs):
    ours, theirs = batch(processor, **kwargs), batch(stock_processor)
    assert ("image_patch_levels" in ours) == bool(kwargs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    with torch.no_grad():
        assert (model(**ours).logits - stock(**theirs).logits).abs().max() <= 1e-5
    new = model.generate(**ours, max_new_tokens=8, do_sample=False)
    assert torch.equal(new, stock.generate(**theirs, max_new_tokens=8, do_sample=False))
    assert len(set(new[0, -8:].tolist())) > 2  # it says something


def test_positions_of_all_base_patches_are_stock(model, stock, processor):
    full = batch(processor, patch_selection_method="budget", alpha=1.0)
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    theirs, their_deltas = stock.model.get_rope_index(**{key: full[key] for key in keys})
    ours, deltas = model.model.get_rope_index(
        **{key: full[key] for key in keys}, image_patch_levels=full["image_patch_levels"]
    )
    assert torch.equal(ours, theirs) and torch.equal(deltas, their_deltas)


@pytest.mark.parametrize("method", ["budget", "v1", "v2"])
@pytest.mark.parametrize("alpha", [0.2, 0.6])
def test_counts(processor, model, method, alpha):
    inputs = batch(processor, patch_selection_method=method, alpha=alpha)
    levels, total, tokens = inputs["image_patch_levels"], 0, []
    at = 0
    for _, height, width in inputs["image_grid_thw"].tolist():
        grid = levels[at : at + height * width].view(height, width)
        at += height * width
        kept = sum(float((grid == level).sum()) / 4 ** (level - 1) for level in (1, 2, 3))
        total += kept
        tokens.append(int(((grid == 1).sum() + (grid == 2).sum()) // 4 + (grid == 3).sum() // 16))
        if method == "budget":
            assert kept <= round(alpha * height * width)
    assert at == len(levels) and total == len(inputs["pixel_values"]) < len(levels)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [sum(tokens[:2]), tokens[2], 0]
    features = model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], image_patch_levels=inputs["image_patch_levels"]
    )
    assert [len(part) for part in features.pooler_output] == tokens


def test_selection_and_pixels(processor):
    """Levels are those of the resized picture, a merged patch is the mean of its pixels."""
    size = (224, 168)  # a multiple of 28 already
    inputs, full = one(processor, size, **BUDGET), one(processor, size)
    pixels = torch.tensor(np.array(picture(*size))).permute(2, 0, 1)[None]
    labels = select_patches_by_budget(patch_entropy(pixels, 14), alpha=0.3)[1][0]
    assert torch.equal(inputs["image_patch_levels"].view(12, 16), labels)
    # stock rows come cell by cell; lay them out as a picture [C, H, W]
    rows = full["pixel_values"].view(6, 8, 2, 2, 3, 2, 14, 14)
    assert torch.equal(rows[..., 0, :, :], rows[..., 1, :, :])
    image = rows[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, 168, 224)
    expected = []
    for cell_row in range(6):
        for cell_col in range(8):
            for row, col in ((0, 0), (0, 1), (1, 0), (1, 1)):
                r, c = 2 * cell_row + row, 2 * cell_col + col
                side = 2 ** (int(labels[r, c]) - 1)
                if r % side or c % side:
                    continue
                patch = image[:, 14 * r : 14 * (r + side), 14 * c : 14 * (c + side)]
                patch = patch.reshape(3, 14, side, 14, side).mean((2, 4))
                expected.append(patch[:, None].expand(-1, 2, -1, -1).flatten())
    assert {int(level) for level in labels.unique()} == {1, 2, 3}
    assert torch.allclose(inputs["pixel_values"], torch.stack(expected), atol=1e-6)


def test_vision_is_its_formula(model, processor, kind):
    """Patches one image at a time, centres as positions, a large patch four times in the merger."""
    inputs = batch(processor, **BUDGET)
    visual = model.model.visual
    levels, at, first = inputs["image_patch_levels"], 0, 0
    features = model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], image_patch_levels=levels
    ).pooler_output
    for found, (_, height, width) in zip(features, inputs["image_grid_thw"].tolist(), strict=True):
        grid = levels[at : at + height * width].view(height, width)
        at += height * width
        centres, groups = [], []
        for cell_row in range(height // 2):
            for cell_col in range(width // 2):
                corner = grid[2 * cell_row, 2 * cell_col]
                if corner == 1:
                    groups.append([len(centres) + i for i in range(4)])
                    centres += [(2 * cell_row + i, 2 * cell_col + j) for i in (0, 1) for j in (0, 1)]
                elif corner == 2 or (cell_row % 2 == 0 and cell_col % 2 == 0):
                    groups.append([len(centres)] * 4)
                    middle = 0.5 if corner == 2 else 1.5
                    centres.append((2 * cell_row + middle, 2 * cell_col + middle))
        last = first + len(centres)
        hidden = visual.patch_embed(inputs["pixel_values"][first:last])
        first = last
        rotary = visual.rotary_pos_emb(hidden, torch.tensor(centres))
        # Qwen2.5-VL: most blocks see the windows of 8 x 8 base patches one by one
        in_windows = {}
        for number, (row, col) in enumerate(centres):
            in_windows.setdefault((row // 8, col // 8), []).append(number)
        everything = [list(range(len(centres)))]
        for number, block in enumerate(visual.blocks):
            windowed = kind == "qwen2_5_vl" and number not in visual.fullatt_block_indexes
            out = torch.empty_like(hidden)
            for own in in_windows.values() if windowed else everything:
                here = tuple(part[own] for part in rotary)
                out[own] = block(hidden[own], cu_seqlens=torch.tensor([0, len(own)]), position_embeddings=here)
            hidden = out
        assert torch.allclose(found, visual.merger(hidden[torch.tensor(groups)].flatten(0, 1)), atol=1e-5)
    assert first == len(inputs["pixel_values"])


@pytest.mark.parametrize("kwargs", [{}, BUDGET], ids=["all", "budget"])
def test_vision_attention_is_transformers(model, processor, monkeypatch, kwargs):
    """All images in one call, against transformers' image by image: features and gradients."""
    inputs = batch(processor, **kwargs)
    images = [inputs.get(key) for key in ("pixel_values", "image_grid_thw", "image_patch_levels")]
    weight = model.model.visual.blocks[0].attn.qkv.weight
    found = {}
    for name in ("eager", "sdpa", "varlen"):
        monkeypatch.setattr(model.model.visual.config, "_attn_implementation", name)
        features = torch.cat(model.model.get_image_features(*images).pooler_output)
        found[name] = features.detach(), torch.autograd.grad(features.square().sum(), weight)[0]
    for name in ("sdpa", "varlen"):
        for ours, theirs in zip(found[name], found["eager"], strict=True):
            assert theirs.abs().max() > 0.1
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_images_of_one_size_are_one_call(model, processor, monkeypatch):
    calls, stock = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: calls.append(len(query)) or stock(query, *args, **kwargs),
    )
    images = processor.image_processor([picture(112, 112, seed) for seed in range(5)], return_tensors="pt")
    model.model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    assert calls == [5] * len(model.model.visual.blocks)  # of 112 pixels, one window each


def test_positions(model, processor):
    """Image tokens at their cells; the text after an image where stock has it."""
    few, full = one(processor, **BUDGET), one(processor)
    image_token = model.config.image_token_id
    found, delta = model.model.get_rope_index(
        **{key: few[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "image_patch_levels")}
    )
    stock = model.model.get_rope_index(
        **{key: full[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    )[0]
    ours, theirs = few["input_ids"][0] == image_token, full["input_ids"][0] == image_token
    assert torch.equal(found[:, 0, ~ours], stock[:, 0, ~theirs])
    _, height, width = few["image_grid_thw"][0].tolist()
    grid = few["image_patch_levels"].view(height // 2, 2, width // 2, 2)[:, 0, :, 0]
    rows, cols = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    kept = (grid < 3) | ((rows % 2 == 0) & (cols % 2 == 0))
    assert torch.equal(found[:, 0, ours], stock[:, 0, theirs][:, kept.flatten()])
    assert (grid == 1).any() and (grid == 3).any()
    assert delta.item() == stock.max() + 1 - few["input_ids"].shape[1]


def test_generation_with_cache_is_generation_without(model, processor):
    for inputs in (one(processor, **BUDGET), batch(processor, **BUDGET)):
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)
        step = inputs["input_ids"]  # token by token, by forward alone
        mask, kinds = inputs["attention_mask"], inputs["mm_token_type_ids"]
        for _ in range(6):
            rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            with torch.no_grad():
                logits = model(input_ids=step, attention_mask=mask, mm_token_type_ids=kinds, **rest).logits
            step = torch.cat([step, logits[:, -1:].argmax(-1)], 1)
            mask, kinds = (torch.cat([x, x.new_full((len(x), 1), n)], 1) for x, n in ((mask, 1), (kinds, 0)))
        assert torch.equal(cached, step)


def test_padding_changes_nothing(model, processor):
    together = model.generate(**batch(processor, **BUDGET), max_new_tokens=6, do_sample=False)
    alone = processor(images=picture(*SIZES[2], 2), text=prompt(1), return_tensors="pt", images_kwargs=BUDGET)
    assert torch.equal(model.generate(**alone, max_new_tokens=6, do_sample=False)[0, -6:], together[1, -6:])


def test_beams_and_several_answers(model, processor):
    inputs = batch(processor, **BUDGET)
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    greedy = model.generate(**inputs, max_new_tokens=4, num_beams=1, do_sample=False)
    assert beams.shape == greedy.shape
    for row in range(3):
        single = {"text": [prompt(2), prompt(1), prompt(0) + "and a longer question than the others"][row]}
        pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
        own = [pictures[:2], pictures[2:], None][row]
        alone = processor(images=own, **single, return_tensors="pt", **({"images_kwargs": BUDGET} if own else {}))
        assert torch.equal(
            model.generate(**alone, max_new_tokens=4, num_beams=3, do_sample=False)[0, -4:], beams[row, -4:]
        )


def test_training(model, processor, folder):
    model = type(model).from_pretrained(folder).train()
    model.gradient_checkpointing_enable()
    inputs = batch(processor, **BUDGET)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        lacking = [name for name, value in model.named_parameters() if value.grad is None]
        assert not lacking and model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_save_and_load(model, processor, folder, kind, tmp_path):
    model.save_pretrained(tmp_path)
    changed = type(processor).from_pretrained(folder, **BUDGET)
    changed.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    assert (again.image_processor.patch_selection_method, again.image_processor.alpha) == ("budget", 0.3)
    assert type(again.image_processor) is AdaptiveQwen2VLImageProcessor
    inputs = again(images=picture(224, 140), text=prompt(1), return_tensors="pt")
    expected = one(processor, **BUDGET)
    assert all(torch.equal(inputs[key], value) for key, value in expected.items())
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**expected).logits)
    stock = STOCK[kind][0].from_pretrained(tmp_path)  # it stays a stock checkpoint
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_constructor_and_call_defaults(folder):
    image_processor = AdaptiveQwen2VLImageProcessor.from_pretrained(folder, patch_selection_method="v1")
    default = image_processor(picture(224, 140), return_tensors="pt")
    explicit = AdaptiveQwen2VLImageProcessor.from_pretrained(folder)(
        picture(224, 140), return_tensors="pt", patch_selection_method="v1", patch_thresholds=[3.0, 2.0]
    )
    assert torch.equal(default["image_patch_levels"], explicit["image_patch_levels"])
    none = image_processor(picture(224, 140), return_tensors="pt", patch_thresholds=[0.0, 0.0])
    assert set(none["image_patch_levels"].tolist()) == {1}


def test_videos_pass_through(model, stock, processor):
    torch.manual_seed(0)
    grid = torch.tensor([[2, 4, 6]])
    pixels = torch.randn(48, 3 * 2 * 14 * 14)
    few = one(processor, **BUDGET)
    video = (
        [model.config.vision_start_token_id] + [model.config.video_token_id] * 12 + [model.config.vision_end_token_id]
    )
    ids = torch.cat([few["input_ids"], torch.tensor([video])], 1)
    kinds = torch.cat([few["mm_token_type_ids"], torch.tensor([[0] + [2] * 12 + [0]])], 1)
    mixed = {**few, "input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        both = model(**mixed, pixel_values_videos=pixels, video_grid_thw=grid).logits
        alone = model(**few).logits
    assert torch.allclose(both[:, : alone.shape[1]], alone, atol=1e-5)  # causal: what precedes the video is unchanged
    only = {"input_ids": torch.tensor([video]), "mm_token_type_ids": torch.tensor([[0] + [2] * 12 + [0]])}
    with torch.no_grad():
        ours = model(**only, pixel_values_videos=pixels, video_grid_thw=grid).logits
        theirs = stock(**only, pixel_values_videos=pixels, video_grid_thw=grid).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_positions_of_videos_beside_images(model, stock, processor, kind):
    """Of two videos behind an image whose base patches are all kept, against stock; Qwen2.5-VL's go by the clock."""
    full = one(processor, patch_selection_method="budget", alpha=1.0)
    grids = torch.tensor([[3, 4, 6], [2, 8, 4]])
    kinds, ids = full["mm_token_type_ids"][0].tolist(), full["input_ids"][0].tolist()
    for frames, height, width in grids.tolist():
        kinds += [0] + [2] * (frames * height * width // 4) + [0]
    ids = torch.tensor([ids + [5] * (len(kinds) - len(ids))])
    common = {"input_ids": ids, "mm_token_type_ids": torch.tensor([kinds]), "video_grid_thw": grids}
    common |= {"image_grid_thw": full["image_grid_thw"], "attention_mask": torch.ones_like(ids)}
    # of whole seconds: older versions of transformers drop what is behind the point
    for seconds in [None, torch.tensor([1.0, 3.0])] if kind == "qwen2_5_vl" else [None]:
        timed = common if seconds is None else common | {"second_per_grid_ts": seconds}
        ours, delta = model.model.get_rope_index(**timed, image_patch_levels=full["image_patch_levels"])
        theirs, their_delta = stock.model.get_rope_index(**timed)
        assert torch.equal(ours, theirs) and torch.equal(delta, their_delta)
        assert torch.equal(model.model.get_rope_index(**timed)[0], theirs)  # without levels it is stock's own
    with pytest.raises(LlavaError, match="more videos than video_grid_thw"):
        model.model.get_rope_index(
            **common | {"video_grid_thw": grids[:1]}, image_patch_levels=full["image_patch_levels"]
        )
    if kind == "qwen2_5_vl":
        half = model.model.get_rope_index(
            **common, second_per_grid_ts=torch.tensor([0.5, 0.5]), image_patch_levels=full["image_patch_levels"]
        )[0]
        first = full["input_ids"].shape[1] + 1
        times = half[0, 0, first : first + 18]
        assert (times - times[0]).tolist() == [0] * 6 + [1] * 6 + [2] * 6  # 2 a second


def test_refusals(model, processor, folder):
    with pytest.raises(LlavaError, match="alpha"):
        one(processor, patch_selection_method="budget", alpha=-1.0)
    with pytest.raises(LlavaError, match="patch_selection_method"):
        one(processor, patch_selection_method="best")
    inputs = one(processor, **BUDGET)
    with pytest.raises(LlavaError, match="rows, expected"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][1:]})
    with pytest.raises(LlavaError, match="image_patch_levels: found"):
        model(**{**inputs, "image_patch_levels": inputs["image_patch_levels"][1:]})
    with pytest.raises(LlavaError, match="multiples of 28"):
        processor.image_processor(picture(100, 100), return_tensors="pt", do_resize=False, **BUDGET)
