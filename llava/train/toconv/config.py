"""The keys of `llava.train.train_toconv`: one definition each, from which YAML, command line and --help derive."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Literal

from llava.config.files import read_yaml
from llava.config.schema import Key, convert, convert_word, unknown_key
from llava.errors import LlavaError

COMMAND_LINE = "command line"


def key(description: str, default=MISSING):
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class ToConvConfig:
    """A resolved run. Keys that the tower has too are called as in tower configs."""

    vision_tower: str = key("hub id or folder of the vision encoder, which stays frozen")
    image_folder: str = key("training images, looked for in all subfolders; the first subfolder is an image's class")
    output_dir: str = key("where checkpoints, heat maps and the log go")
    mm_vision_tower_type: str | None = key("kind of tower; nothing: as the encoder's config says", None)
    mm_vision_select_layer: int = key("hidden state that the LLaVA tower will feed to the compressor", -2)
    compression_input_size: int = key("tokens per side that the tower gives", 24)
    compression_output_size: int = key("tokens per side that are left", 12)
    eval_folder: str | None = key("held-out images; nothing: a share of image_folder", None)
    eval_share: float = key("share of image_folder that is held out where there is no eval_folder", 0.05)
    objective: Literal["sinkhorn", "wgan_gp"] = key(
        "optimal transport + receptive-field cosine, or critic + decoder", "sinkhorn"
    )
    sinkhorn_weight: float = key("weight of the optimal transport loss", 1.0)
    field_weight: float = key("weight of the receptive-field cosine loss", 1.0)
    sinkhorn_epsilon: float = key("entropic regularisation of the optimal transport", 0.1)
    sinkhorn_iterations: int = key("Sinkhorn iterations", 100)
    lambda_gp: float = key("wgan_gp: weight of the gradient penalty", 10.0)
    critic_steps: int = key("wgan_gp: steps of the critic per step of the compressor", 5)
    adversarial_weight: float = key("wgan_gp: weight of the critic's score beside the reconstruction error", 1.0)
    epochs: int = key("passes over the training images", 100)
    batch_size: int = key("images per step, over all processes", 128)
    learning_rate: float = key("peak learning rate of AdamW", 1e-4)
    min_learning_rate: float = key("learning rate at the end of the cosine", 1e-6)
    warmup_epochs: float = key("epochs of linear warm-up", 3.0)
    weight_decay: float = key("AdamW's weight decay", 0.05)
    adam_beta1: float = key("AdamW's first beta", 0.9)
    adam_beta2: float = key("AdamW's second beta", 0.999)
    bf16: bool = key("run the frozen encoder in bfloat16; the compressor stays in float32", False)
    num_workers: int = key("processes that read images, per training process", 4)
    feature_cache: str | None = key(
        "folder for the encoder's tokens: computed once, read from disk in every epoch", None
    )
    save_steps: int = key("also write `last` every so many steps (0: after each epoch alone)", 0)
    heatmap_epochs: int = key("epochs between heat maps of the similarity per token (0: none)", 5)
    probe_images: int = key("images, of training and of held-out ones each, for the linear probe (0: none)", 1000)
    resume: bool = key("go on from output_dir/last where there is one", True)
    report_to: Literal["none", "wandb"] = key("where the log goes besides output_dir/log.jsonl", "none")
    seed: int = key("decides weights, order and what is held out", 0)

    def to_dict(self) -> dict:
        return asdict(self)


def all_keys() -> dict[str, Key]:
    """The keys by name."""
    return {f.name: Key(f.name, "toconv", f.type, f.default, f.metadata["description"]) for f in fields(ToConvConfig)}


def resolve(argv: list[str]) -> ToConvConfig:
    """The run that `--config FILE.yaml --key value ...` describes; the command line stands above the file.

    Raises:
        LlavaError: an unknown key (with the nearest valid one), a value that is none, or a required key left out.
    """
    keys, values, config, rest = all_keys(), {}, None, list(argv)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise LlavaError(f"{COMMAND_LINE}: found {name!r}, expected --key value")
        name = name[2:].replace("-", "_")
        words = [text] if equals else [rest.pop(0)] if rest and not rest[0].startswith("--") else []
        if name == "config":
            if not words:
                raise LlavaError(f"{COMMAND_LINE}: --config needs a value (a YAML file)")
            config = words[0]
        else:
            values[name] = convert_word(_find(keys, name, COMMAND_LINE), words, COMMAND_LINE)
    if config is not None:
        for name, value in read_yaml(config).items():
            found = convert(_find(keys, name, config), value, config)
            values.setdefault(name, found)
    missing = [name for name, entry in keys.items() if entry.default is MISSING and name not in values]
    if missing:
        raise LlavaError(f"{config or COMMAND_LINE}: missing {', '.join(missing)}; {keys[missing[0]].description}")
    resolved = ToConvConfig(**values)
    _check(resolved)
    return resolved


def _find(keys: dict[str, Key], name: str, where: str) -> Key:
    if name not in keys:
        raise unknown_key(name, where, [*keys, "config"])
    return keys[name]


def _check(config: ToConvConfig) -> None:
    """Raise `LlavaError` for values that no run can have."""
    at_least = dict.fromkeys(("epochs", "batch_size", "critic_steps", "sinkhorn_iterations"), 1)
    at_least |= dict.fromkeys(("num_workers", "save_steps", "heatmap_epochs", "probe_images", "warmup_epochs"), 0)
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise LlavaError(f"{name}: found {getattr(config, name)}, expected at least {least}")
    for name in ("sinkhorn_epsilon", "learning_rate"):
        if not getattr(config, name) > 0:
            raise LlavaError(f"{name}: found {getattr(config, name)}, expected a number above 0")
    if config.eval_folder is None and not 0 < config.eval_share < 1:
        raise LlavaError(f"eval_share: found {config.eval_share}, expected a share between 0 and 1")


def help_text() -> str:
    """All keys with their types, defaults and meaning."""
    lines = []
    for name, entry in all_keys().items():
        default = "required" if entry.default is MISSING else f"default {entry.default}"
        lines.append(f"  --{name} ({entry.expected}; {default})\n        {entry.description}")
    return "\n".join(lines)
