"""LLaVA models of named sizes with random weights, made without any file, and batches for them."""

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

# The published sizes; "demo" is about that of the demo in playground/, "small" the same with a large vocabulary.
_DEMO = dict(
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LLMS = {
    "demo": dict(**_DEMO, vocab_size=512),
    "small": dict(**_DEMO, vocab_size=32768),
    "qwen2-0.5b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2-1.5b": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2-7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
}
TOWERS = {
    "demo": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    ),
    "clip-l336": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
}


def make_config(llm: str, tower: str, layers: int | None = None, image_size: int | None = None, **changes):
    """Config of a LLaVA (Qwen2 and CLIP, anyres with up to four crops and the base) of named sizes.

    Args:
        llm, tower: keys of `LLMS` and `TOWERS`.
        layers: fewer layers of the language model than its size has.
        image_size: pixels of a crop's side, where they are to differ from the tower's own.
        **changes: further config values.
    """
    for name, known in ((llm, LLMS), (tower, TOWERS)):
        if name not in known:
            raise ValueError(f"size {name!r}: expected one of {', '.join(known)}")
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig

    from llava.model.language_model.llava_qwen import LlavaQwenConfig

    side = image_size or TOWERS[tower]["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    values = {
        **LLMS[llm],
        "max_position_embeddings": 32768,
        "mm_vision_tower": f"random-{tower}",
        "mm_vision_tower_type": "clip",
        "mm_vision_config": CLIPVisionConfig(**TOWERS[tower] | {"image_size": side}).to_dict(),
        "mm_image_processor_config": processor.to_dict(),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[side * w, side * h] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
        "tokenizer_padding_side": "right",
        **changes,
    }
    if layers is not None:
        values["num_hidden_layers"] = layers
    return LlavaQwenConfig(**values)


def make_model(config, device: str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0):
    """A model with random weights, made on its device."""
    from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaQwenForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    model.get_vision_tower().is_loaded = True
    return model.eval()


def anyres_images(model, shapes: list[tuple[int, int]], seed: int):
    """Random pixels as the image processor gives them (mean 0, deviation 1), crops with the base first.

    Args:
        shapes: (across, down) crops of each image.

    Returns:
        (list of [1 + across * down, 3, side, side] in the model's dtype, list of (width, height)); the images are a
        little narrower than their grid, so that padding is cut off.
    """
    random = torch.Generator().manual_seed(seed)
    side = model.get_vision_tower().image_size
    images = [torch.randn(1 + w * h, 3, side, side, generator=random) for w, h in shapes]
    sizes = [(round(side * w * 0.9), side * h) for w, h in shapes]
    return [image.to(model.device, model.dtype) for image in images], sizes


def make_batch(model, rows: int, shapes: list[tuple[int, int]], text: tuple[int, int], answer: tuple[int, int], seed=0):
    """A batch as the collator makes it: one image per row, random tokens, padded on the right.

    Args:
        shapes: (across, down) crops, taken in turn by the rows.
        text, answer: least and most tokens of the prompt and of the supervised answer; most of 0: no answer.

    Returns:
        dict of input_ids, labels, attention_mask [rows, L], images, image_sizes, modalities.
    """
    random = torch.Generator().manual_seed(seed + 1)

    def length(bounds):
        return int(torch.randint(bounds[0], bounds[1] + 1, (1,), generator=random))

    lengths = [(length(text), length(answer)) for _ in range(rows)]
    width = max(map(sum, lengths))
    ids = torch.zeros(rows, width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, reply) in enumerate(lengths):
        ids[i, : prompt + reply] = torch.randint(3, model.config.vocab_size, (prompt + reply,), generator=random)
        labels[i, prompt : prompt + reply] = ids[i, prompt : prompt + reply]
        mask[i, : prompt + reply] = True
    ids[:, 4] = IMAGE_TOKEN_INDEX
    images, sizes = anyres_images(model, [shapes[i % len(shapes)] for i in range(rows)], seed)
    return {
        "input_ids": ids.to(model.device),
        "labels": labels.to(model.device),
        "attention_mask": mask.to(model.device),
        "images": images,
        "image_sizes": sizes,
        "modalities": ["image"] * rows,
    }


def left_padded(batch: dict) -> dict:
    """The batch as a prompt for `generate`: no labels, padding moved to the left."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    for i, length in enumerate(mask.sum(1).tolist()):
        ids[i], mask[i] = ids[i].roll(ids.shape[1] - length), mask[i].roll(ids.shape[1] - length)
    rest = {key: batch[key] for key in ("images", "image_sizes", "modalities")}
    return {"input_ids": ids, "attention_mask": mask.long(), **rest}


def row_lengths(model, batch: dict) -> list[int]:
    """Tokens of each row after the merge, visual ones included."""
    count = model.visual_token_counter()
    text = batch["attention_mask"].sum(1).tolist()
    visual = [count(image.shape, size) for image, size in zip(batch["images"], batch["image_sizes"], strict=True)]
    return [t - 1 + v for t, v in zip(text, visual, strict=True)]


def merged_inputs(model, batch: dict):
    """(inputs_embeds [B, S, D], labels [B, S], mask [B, S]) of a training batch."""
    _, _, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"],
        None,
        batch["attention_mask"],
        None,
        batch.get("labels"),
        batch["images"],
        batch["modalities"],
        batch["image_sizes"],
    )
    return embeds, labels, mask


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def training_flops(model, batch: dict) -> float:
    """Floating-point operations that one training step must do, all parts trained; see `llava.train.flops`."""
    from llava.constants import TUNABLE_PARTS
    from llava.train.flops import step_flops

    model.get_model().describe_vision()
    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    crops = sum(len(image) for image in batch["images"])
    patches = [(model.get_vision_tower().image_size // model.get_vision_tower().config.patch_size) ** 2] * crops
    return step_flops(model.config, row_lengths(model, batch), patches, set(TUNABLE_PARTS), supervised=supervised)
