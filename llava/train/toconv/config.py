"""The keys of `llava.train.train_toconv`: one definition each, from which YAML, command line and --help derive."""

from typing import Literal

from pydantic import ConfigDict

from llava.config.commandline import WHERE, parse_command_line
from llava.config.files import read_yaml
from llava.config.keys import KeyGroup, key
from llava.config.rules import (
    ABOVE_0,
    COUNT,
    FROM_0,
    POSITIVE,
    SEED,
    SHARE_BELOW_1,
    WHOLE,
)
from llava.config.schema import convert, find_key, keys_of
from llava.errors import LlavaError


class ToConvConfig(KeyGroup):
    """A resolved run. Keys that the tower has too are called as in tower configs."""

    model_config = ConfigDict(frozen=True)

    vision_tower: str = key(..., "hub id or folder of the vision encoder, which stays frozen")
    image_folder: str = key(
        ..., "training images, looked for in all subfolders; the first subfolder is an image's class"
    )
    output_dir: str = key(..., "where checkpoints, heat maps and the log go")
    mm_vision_tower_type: str | None = key(None, "kind of tower; nothing: as the encoder's config says")
    mm_vision_select_layer: int = key(-2, "hidden state that the LLaVA tower will feed to the compressor", within=WHOLE)
    compression_input_size: int = key(24, "tokens per side that the tower gives", within=POSITIVE)
    compression_output_size: int = key(12, "tokens per side that are left", within=POSITIVE)
    eval_folder: str | None = key(None, "held-out images; nothing: a share of image_folder")
    eval_share: float = key(
        0.05, "share of image_folder that is held out where there is no eval_folder", within=SHARE_BELOW_1
    )
    objective: Literal["sinkhorn", "wgan_gp"] = key(
        "sinkhorn", "optimal transport + receptive-field cosine, or critic + decoder"
    )
    sinkhorn_weight: float = key(1.0, "weight of the optimal transport loss", within=FROM_0)
    field_weight: float = key(1.0, "weight of the receptive-field cosine loss", within=FROM_0)
    sinkhorn_epsilon: float = key(0.1, "entropic regularisation of the optimal transport", within=ABOVE_0)
    sinkhorn_iterations: int = key(100, "Sinkhorn iterations", within=POSITIVE)
    lambda_gp: float = key(10.0, "wgan_gp: weight of the gradient penalty", within=FROM_0)
    critic_steps: int = key(5, "wgan_gp: steps of the critic per step of the compressor", within=POSITIVE)
    adversarial_weight: float = key(
        1.0, "wgan_gp: weight of the critic's score beside the reconstruction error", within=FROM_0
    )
    epochs: int = key(100, "passes over the training images", within=POSITIVE)
    batch_size: int = key(128, "images per step, over all processes", within=POSITIVE)
    learning_rate: float = key(1e-4, "peak learning rate of AdamW", within=ABOVE_0)
    min_learning_rate: float = key(1e-6, "learning rate at the end of the cosine", within=FROM_0)
    warmup_epochs: float = key(3.0, "epochs of linear warm-up", within=FROM_0)
    weight_decay: float = key(0.05, "AdamW's weight decay", within=FROM_0)
    adam_beta1: float = key(0.9, "AdamW's first beta", within=SHARE_BELOW_1)
    adam_beta2: float = key(0.999, "AdamW's second beta", within=SHARE_BELOW_1)
    bf16: bool = key(False, "run the frozen encoder in bfloat16; the compressor stays in float32")
    num_workers: int = key(4, "processes that read images, per training process", within=COUNT)
    feature_cache: str | None = key(
        None, "folder for the encoder's tokens: computed once, read from disk in every epoch"
    )
    save_steps: int = key(0, "also write `last` every so many steps (0: after each epoch alone)", within=COUNT)
    heatmap_epochs: int = key(5, "epochs between heat maps of the similarity per token (0: none)", within=COUNT)
    probe_images: int = key(
        1000, "images, of training and of held-out ones each, for the linear probe (0: none)", within=COUNT
    )
    resume: bool = key(True, "go on from output_dir/last where there is one")
    report_to: Literal["none", "wandb"] = key("none", "where the log goes besides output_dir/log.jsonl")
    seed: int = key(0, "decides weights, order and what is held out", within=SEED)


KEYS = keys_of("toconv", ToConvConfig)
REQUIRED = [name for name, info in ToConvConfig.model_fields.items() if info.is_required()]


def resolve(argv: list[str]) -> ToConvConfig:
    """The run that `--config FILE.yaml --key value ...` describes; the command line stands above the file.

    Raises:
        LlavaError: an unknown key (with the nearest valid one), a value that is none, or a required key left out.
    """
    line = parse_command_line(argv, KEYS, files=("config",))
    content = {} if line.config is None else read_yaml(line.config)
    found = {name: convert(find_key(name, line.config, KEYS), value, line.config) for name, value in content.items()}
    values = found | line.values
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise LlavaError(f"{line.config or WHERE}: missing {', '.join(missing)}; {KEYS[missing[0]].description}")
    resolved = ToConvConfig(**values)
    if resolved.eval_folder is None and resolved.eval_share == 0:
        raise LlavaError("eval_share: found 0 without eval_folder, expected a share of images that is held out")
    return resolved


def help_text() -> str:
    """All keys with their types, defaults and meaning."""
    lines = []
    for name, entry in KEYS.items():
        default = "required" if name in REQUIRED else f"default {entry.default}"
        lines.append(f"  --{name} ({entry.expected}; {default})\n        {entry.description}")
    return "\n".join(lines)
