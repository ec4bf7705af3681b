"""Make the demo's starting point: a tokenizer and tiny models with random weights, in the folders real ones come in.

    python playground/make_demo_model.py --output playground/demo --seed 0

Reads the texts that `make_demo_data.py` wrote and leaves beside them `llm/` (Qwen2 architecture, with the tokenizer),
`clip_tower/`, `siglip_tower/`, `hevc_vit_tower/` (vision towers of one size, with their image processors),
`clip_fine_tower/` (CLIP with patches of half the side: four times the tokens) and `dinov2_tower/`, `siglip2_tower/`
(NaFlex), `aimv2_tower/`, and `qwen2_vl/`, a whole Qwen2-VL of that size, as stock folders are.
"""

import argparse
import json
from pathlib import Path

from llava.errors import report_errors

IMAGE_SIZE, PATCH_SIZE = 56, 14  # pixels: 16 visual tokens
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MODEL_MAX_LENGTH = 512  # tokens, visual ones included
TEMPLATE_TEXT = "system\nYou are a helpful assistant.\nuser\nassistant\n"  # so that its words become single tokens
# Qwen2's pre-tokenizer: among others, every digit is a token of its own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Weights of this spread, three times the usual, make so narrow a model learn from the first steps on.
SPREAD = 0.06
LLM = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": SPREAD,
}
TOWER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE_STATISTICS = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
KINDS = ("clip", "siglip", "hevc_vit", "clip_fine")
LATER_KINDS = ("dinov2", "siglip2", "aimv2")  # made last, so that the others' weights are those of earlier versions
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN2_VL_VISION = {"depth": 4, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 3}
QWEN2_VL_LLM = LLM | {"num_attention_heads": 2, "num_key_value_heads": 2}
# Shares of a head's 24 rotary pairs for time, row and column, the fastest first. In a grid this small only fast pairs
# tell places apart: of equal shares, with a base of 1e4, the next column turns one by 0.002, and left looks like right.
MROPE = {"rope_theta": 1e3, "mrope_section": [1, 2, 21]}
QWEN2_VL_PIXELS = (84 * 112, 112 * 112)  # makes 8 x 8 patches of any picture of the demo
# Qwen2-VL's: the system's turn, then the turns as they come, an image between its two marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def demo_texts(folder: Path) -> list[str]:
    """Every turn of the training files (not the held-out ones), and the words of the chat template."""
    texts = [TEMPLATE_TEXT] * 100
    for name in ("pretrain.json", "train.json"):
        records = json.loads((folder / name).read_text())
        texts += [turn["value"] for record in records for turn in record["conversations"]]
    return texts


def make_tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer as Qwen2's: no unknown characters, special tokens last, padded with <|endoftext|>."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The 256 bytes come first, in GPT-2's order, so a newline is token 198 as in every Qwen vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=512, min_frequency=20, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=MODEL_MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_llm(folder: Path, tokenizer) -> None:
    """A random Qwen2 language model with `tokenizer` beside it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=MODEL_MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **LLM,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_encoder(kind: str):
    """A random vision encoder of one of `KINDS` or `LATER_KINDS`."""
    sizes = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **TOWER}
    if kind in ("clip", "clip_fine"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        patch = {"patch_size": PATCH_SIZE // 2} if kind == "clip_fine" else {}
        return CLIPVisionModel(CLIPVisionConfig(**sizes | patch, initializer_range=SPREAD))
    if kind == "siglip":  # whose own initialisation knows no spread
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionModel(SiglipVisionConfig(**sizes))
    if kind in LATER_KINDS:
        return _later_encoder(kind, sizes)
    from llavavit import LlavaViTConfig, LlavaViTModel

    heads = {"num_attention_heads": 3}  # its heads come in widths of 32
    return LlavaViTModel(LlavaViTConfig(**sizes | heads, initializer_range=SPREAD))


def _later_encoder(kind: str, sizes: dict):
    """Of those that `hf_vision` takes; all at their own size, where no positions are interpolated."""
    if kind == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        return Dinov2Model(Dinov2Config(**sizes | {"mlp_ratio": 3}, initializer_range=SPREAD))
    if kind == "siglip2":  # NaFlex has a table of positions and no size, and its initialisation knows no spread
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        side = IMAGE_SIZE // PATCH_SIZE
        return Siglip2VisionModel(Siglip2VisionConfig(**TOWER, patch_size=PATCH_SIZE, num_patches=side**2))
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    return Aimv2VisionModel(Aimv2VisionConfig(**sizes, is_native=True, initializer_range=SPREAD))


def make_tower(folder: Path, kind: str) -> None:
    """A random vision tower with its image processor; `LATER_KINDS` have none, and get their published statistics."""
    make_encoder(kind).save_pretrained(folder)
    if kind in LATER_KINDS:
        return
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mean, std = IMAGE_STATISTICS["siglip" if kind == "siglip" else "clip"]
    processor = {
        "image_processor_type": "SiglipImageProcessor" if kind == "siglip" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if kind == "siglip" else {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    if kind != "siglip":
        processor |= {"do_center_crop": True, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def make_qwen2_vl(folder: Path, tokenizer) -> None:
    """A random Qwen2-VL with the demo's tokenizer, to which its image tokens are added."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    language = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MODEL_MAX_LENGTH,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", **MROPE},
    }
    config = Qwen2VLConfig(
        text_config=language | QWEN2_VL_LLM,
        vision_config=QWEN2_VL_VISION | {"hidden_size": QWEN2_VL_LLM["hidden_size"], "initializer_range": SPREAD},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mean, std = IMAGE_STATISTICS["clip"]
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": dict(zip(("shortest_edge", "longest_edge"), QWEN2_VL_PIXELS, strict=True)),
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def make(output: Path, seed: int) -> None:
    """Write `llm/`, the towers and `qwen2_vl/` under `output`, which holds the demo data."""
    import torch

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(demo_texts(output))
    make_llm(output / "llm", tokenizer)
    for kind in KINDS:
        make_tower(output / f"{kind}_tower", kind)
    make_qwen2_vl(output / "qwen2_vl", tokenizer)
    for kind in LATER_KINDS:
        make_tower(output / f"{kind}_tower", kind)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's tokenizer and its tiny models with random weights.")
    parser.add_argument("--output", type=Path, default=Path("playground/demo"), help="folder that holds the demo data")
    parser.add_argument("--seed", type=int, default=0, help="decides the random weights")
    args = parser.parse_args()
    missing = [name for name in ("pretrain.json", "train.json") if not (args.output / name).is_file()]
    if missing:
        parser.error(f"{args.output} lacks {' and '.join(missing)}: run playground/make_demo_data.py first")
    make(args.output, args.seed)
    print(f"{args.output}: llm, {', '.join(f'{kind}_tower' for kind in KINDS + LATER_KINDS)}, qwen2_vl")


if __name__ == "__main__":
    main()
