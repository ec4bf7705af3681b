"""What the cost model takes as given: devices, published models and data, and what was measured here."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """name: as PyTorch has it (its peak is in `llava.train.flops`); memory: 1e9 bytes that a process sees; link, net:
    GB/s that one device sends to those of its node, and to others."""

    name: str
    memory: float
    link: float
    net: float


# Makers' data sheets: memory; NVLink in one direction (PCIe 4 x16 for the L40S); one network card of 200 (A100, L40S)
# or 400 Gbit/s (H100, H200) for each device, as in DGX A100 and DGX H100.
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 42.3, 300, 25),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 85.0, 300, 25),
    "h100-80": Gpu("NVIDIA H100 80GB HBM3", 85.0, 450, 50),
    "h200-141": Gpu("NVIDIA H200", 150.0, 450, 50),
    "l40s-48": Gpu("NVIDIA L40S", 47.7, 32, 25),
}

_QWEN2_7B = dict(
    model_type="qwen2",
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
_QWEN2_VL_7B = {key: value for key, value in _QWEN2_7B.items() if key != "model_type"}


class Published(NamedTuple):
    """values: of config.json; parameters: as published, of what `values` describe; source: where both are from."""

    values: dict
    parameters: int
    source: str


# hub ids that the shipped configs name, and larger ones to look ahead with
MODELS = {
    "Qwen/Qwen2-0.5B-Instruct": Published(
        dict(
            model_type="qwen2",
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        494_032_768,
        "config.json and model card of Qwen/Qwen2-0.5B-Instruct (0.49B)",
    ),
    "Qwen/Qwen2-1.5B-Instruct": Published(
        dict(
            model_type="qwen2",
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        1_543_714_304,
        "config.json and model card of Qwen/Qwen2-1.5B-Instruct (1.54B)",
    ),
    "Qwen/Qwen2-7B-Instruct": Published(
        _QWEN2_7B, 7_615_616_512, "config.json and model card of Qwen/Qwen2-7B-Instruct (7.62B)"
    ),
    "Qwen/Qwen2-72B-Instruct": Published(
        dict(
            model_type="qwen2",
            hidden_size=8192,
            intermediate_size=29568,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=152064,
        ),
        72_706_203_648,
        "config.json and model card of Qwen/Qwen2-72B-Instruct (72.7B)",
    ),
    "lmms-lab/llava-onevision-qwen2-7b-si": Published(
        _QWEN2_7B, 7_615_616_512, "its language model alone: Qwen2-7B, as the model card says"
    ),
    "lmsys/vicuna-7b-v1.5": Published(
        dict(
            model_type="llama",
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32000,
        ),
        6_738_415_616,
        "config.json of lmsys/vicuna-7b-v1.5; size of Llama-2-7B (arXiv 2307.09288)",
    ),
    "Qwen/Qwen2-VL-7B-Instruct": Published(
        dict(
            model_type="qwen2_vl",
            text_config=_QWEN2_VL_7B,
            vision_config=dict(depth=32, embed_dim=1280, num_heads=16, hidden_size=3584, mlp_ratio=4),
        ),
        8_291_375_616,
        "config.json and model card of Qwen/Qwen2-VL-7B-Instruct (8.29B)",
    ),
}

_CLIP_PROCESSOR = {"size": {"shortest_edge": 448}, "crop_size": {"height": 448, "width": 448}}
# encoders that the project does not know offline: (config, image processor), sizes of their config.json or model card
TOWERS = {
    "facebook/dinov2-large": (
        dict(
            model_type="dinov2",
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            mlp_ratio=4,
            image_size=518,
            patch_size=14,
        ),
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    ),
    "google/siglip2-so400m-patch16-naflex": (
        dict(
            model_type="siglip2_vision_model",
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            num_patches=256,
            patch_size=16,
        ),
        {"patch_size": 16, "max_num_patches": 256},
    ),
    "lmms-lab-encoder/onevision-encoder-large": (
        dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=448,
            patch_size=14,
        ),
        _CLIP_PROCESSOR,
    ),
}


class Data(NamedTuple):
    """samples; text: tokens of a sample besides its picture, labels: those that are supervised; source."""

    samples: int
    text: int
    labels: int
    source: str


# by the last part of `data_path`; token counts are assumed
DATA = {
    "blip_558k_plain.json": Data(558_128, 30, 25, "records of liuhaotian/LLaVA-Pretrain; a caption each"),
    "llava_next_raw_format_processed.json": Data(
        779_289, 300, 150, "records of lmms-lab/LLaVA-NeXT-Data; token counts assumed"
    ),
    "llava_v1_5_mix665k.json": Data(665_298, 350, 200, "records of llava_v1_5_mix665k; token counts assumed"),
    "example_mixture.yaml": Data(
        1_600_000, 300, 150, "samples of LLaVA-OneVision's last stage (arXiv 2408.03326); token counts assumed"
    ),
}
ELSE_TOKENS = 300, 150  # text and labels of a sample of other data
PICTURE = 640, 480  # (width, height) of the picture that every sample is taken to have: most of these data are COCO's
LARGEST = 2000, 2000  # of the one that memory must suffice for
LONGEST_TEXT = 1024  # tokens beside it

# global batch of the published runs, which the comments of the configs tell
GLOBAL_BATCH = {"pretrain_blip558k": 512, "finetune_onevision": 256}
GLOBAL_BATCH_ELSE = 128


class Measured(NamedTuple):
    """The step that the model is calibrated by: Qwen2-1.5B with CLIP-L/336, all parts, float32 weights under bf16
    autocast, batch 4 of anyres images, padded, no DeepSpeed; `benchmarks/README.md`, CUDA, training step."""

    device: str = "NVIDIA H100 80GB HBM3"
    model: str = "Qwen/Qwen2-1.5B-Instruct"
    tokens: int = 10_359
    supervised: int = 531
    crops: int = 17
    parameters: float = 1.85e9
    gib: float = 73.8  # without gradient checkpointing
    gib_checkpointing: float = 29.3
    utilisation: float = 0.26
    utilisation_checkpointing: float = 0.21


MEASURED = Measured()
