"""Qwen2-VL with adaptive patches in named sizes: random weights, a processor, pictures, and the operations it needs."""

import importlib.util
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from llava.drawing.page import font

# language model and vision encoder; "mid" is for a CPU, those named so are published
PRESETS = {
    "small": (
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=512,
        ),
        dict(depth=2, embed_dim=64, num_heads=2, mlp_ratio=2),
    ),
    "mid": (
        dict(
            hidden_size=768,
            intermediate_size=4096,
            num_hidden_layers=6,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=8192,
        ),
        dict(depth=6, embed_dim=320, num_heads=4, mlp_ratio=4),
    ),
    "qwen2-vl-2b": (
        dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4),
    ),
    "qwen2-vl-7b": (
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
        dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4),
    ),
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QUESTION = "what does this picture show and which words can be read in it ? answer in one or two sentences"
PROMPT = f"<|im_start|> user <|vision_start|><|image_pad|><|vision_end|> {QUESTION} <|im_end|> <|im_start|> assistant"
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 28 * 28 * 1280  # of transformers' image processor
PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # 640x427, with scikit-learn
PAGE = (476, 616)  # width, height: 1,496 base patches


def make_tokenizer():
    """A tokenizer of whole words that knows `PROMPT`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<pad>", *SPECIAL, *f"user assistant {QUESTION}".split(), "<unk>"])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
    )


def make_processor(most_pixels: int | None = None):
    """The processor as a user has it, images up to `most_pixels`."""
    from transformers.utils import is_torchvision_available

    from llava.model.qwen2_vl import AdaptiveQwen2VLImageProcessor, AdaptiveQwen2VLProcessor

    size = {"shortest_edge": LEAST_PIXELS, "longest_edge": most_pixels or MOST_PIXELS}
    parts = [AdaptiveQwen2VLImageProcessor(size=size), make_tokenizer()]
    if is_torchvision_available():  # then a processor must have one for videos
        from transformers import Qwen2VLVideoProcessor

        parts.append(Qwen2VLVideoProcessor())
    return AdaptiveQwen2VLProcessor(*parts)


def make_config(preset: str, layers: int | None = None):
    """Config of a Qwen2-VL of a named size; `layers`: fewer of the language model than the size has."""
    from transformers import Qwen2VLConfig

    if preset not in PRESETS:
        raise ValueError(f"size {preset!r}: expected one of {', '.join(PRESETS)}")
    text, vision = PRESETS[preset]
    head = text["hidden_size"] // text["num_attention_heads"]
    section = [head // 8, 3 * head // 16, 3 * head // 16]  # 16, 24, 24 of 64 pairs in the published sizes
    ids = make_tokenizer()
    return Qwen2VLConfig(
        text_config=dict(
            **text | ({} if layers is None else {"num_hidden_layers": layers}),
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=ids.pad_token_id,
        ),
        vision_config=dict(**vision, hidden_size=text["hidden_size"]),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        image_token_id=ids.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=ids.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=ids.convert_tokens_to_ids("<|vision_end|>"),
    )


def make_model(config, device: str, dtype: torch.dtype):
    """`AdaptiveQwen2VLForConditionalGeneration` with random weights, made on its device."""
    from llava.model.qwen2_vl import AdaptiveQwen2VLForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(device):
        model = AdaptiveQwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model.eval()


# --- pictures ---------------------------------------------------------------------------------------------------------


def load_pictures(paths: list[Path] | None = None) -> dict[str, Image.Image]:
    """{name: picture}: of these files, else two photographs that come with scikit-learn and a page of text.

    Raises:
        ValueError: a file that is no picture, or no scikit-learn.
    """
    if paths is None:
        found = importlib.util.find_spec("sklearn")
        if found is None:
            raise ValueError(
                "the photographs come with scikit-learn, which is not installed; or name pictures yourself"
            )
        folder = Path(found.origin).parent / "datasets" / "images"
        return load_pictures([folder / name for name in PHOTOGRAPHS]) | {"page of text": text_page()}
    pictures = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                pictures[path.name if path.name not in pictures else str(path)] = image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path}: not read as a picture: {error}") from None
    return pictures


def text_page(size: tuple[int, int] = PAGE, seed: int = 0) -> Image.Image:
    """Black words on white, line under line, with a heading and the end of each paragraph left empty."""
    draw_word, (width, height) = random.Random(seed), size
    words = [
        "".join(draw_word.choice("aeiou" if i % 2 else "bcdfglmnprstv") for i in range(draw_word.randint(2, 9)))
        for _ in range(400)
    ]
    page = Image.new("RGB", size, "white")
    draw, margin, text, title = ImageDraw.Draw(page), 28, font(13), font(24)
    draw.text((margin, margin), " ".join(words[:4]).capitalize(), fill="black", font=title)
    y = margin + 44
    while y < height - margin - 13:
        line, last = draw_word.choice(words).capitalize(), draw_word.random() < 0.15
        limit = (width - 2 * margin) * (draw_word.uniform(0.2, 0.7) if last else 1.0)
        while draw.textlength(longer := f"{line} {draw_word.choice(words)}", font=text) < limit:
            line = longer
        draw.text((margin, y), line + ("." if last else ""), fill="black", font=text)
        y += 30 if last else 18
    return page


# --- operations that a request needs ----------------------------------------------------------------------------------


def vision_flops(config, lengths: list[int], merged: int) -> float:
    """Floating-point operations of the vision encoder's forward pass over images of `lengths` kept patches.

    With N patches in all and n_i of image i, M merged tokens, D = embed_dim, I = mlp_ratio D, K = depth, H = width of
    the language model, P = channels x frames x patch^2:
        patch embedding     2 P D N
        blocks' weights     K (8 D^2 + 4 D I) N
        attention products  K 4 D sum(n_i^2)
        merger              (2 (4 D)^2 + 2 (4 D) H) M
    """
    c = config.vision_config
    tokens, width, inner = sum(lengths), c.embed_dim, int(c.embed_dim * c.mlp_ratio)
    patch, joined = c.in_channels * c.temporal_patch_size * c.patch_size**2, width * c.spatial_merge_size**2
    blocks = c.depth * ((8 * width**2 + 4 * width * inner) * tokens + 4 * width * sum(n * n for n in lengths))
    return float(2 * patch * width * tokens + blocks + (2 * joined**2 + 2 * joined * c.hidden_size) * merged)


def llm_flops(config, lengths: list[int]) -> float:
    """Floating-point operations of the language model's prefill over rows of `lengths` tokens, text included.

    With S tokens of a row, H wide, A = heads x head size, G the same of the key/value heads, J in the MLP, L layers, V
    words: layers' weights L (4 H A + 4 H G + 6 H J) S, causal attention L 2 A S^2, output layer 2 V H for the one
    position that is needed; summed over the rows.
    """
    c = config.text_config
    width, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    inner, grouped = c.num_attention_heads * head, c.num_key_value_heads * head
    weights = 4 * width * inner + 4 * width * grouped + 6 * width * c.intermediate_size
    per_row = [c.num_hidden_layers * (weights * s + 2 * inner * s * s) + 2 * c.vocab_size * width for s in lengths]
    return float(sum(per_row))
