"""What LLaVA's settings, and the configs of its language model and tower, show to be wrong without any weights."""

import contextlib
import os
from types import SimpleNamespace

from llava.errors import LlavaError, OutOfReach
from llava.families.llava_geometry import run_config
from llava.families.llava_layout import VisionLayout, check_layout, vision_layout
from llava.families.settings import (
    arguments,
    check_common,
    check_packs,
    check_parts,
    check_tower_part,
    tells_tower_part,
    trained_parts,
)
from llava.model.vision_change import Origin, VisionChange

# part that may be random -> its name, and the key that names weights for it
_RANDOM = {
    "mm_mlp_adapter": ("projector", "pretrain_mm_mlp_adapter"),
    "mm_token_compressor": ("token compressor", "pretrain_token_compressor"),
}


def check_fit(run) -> dict[str, str]:
    """Whether language model, tower, projector, crops and the parts that are trained fit each other.

    Returns:
        {part: where its weights start from}.

    Raises:
        LlavaError: what does not fit.
        OutOfReach: a model, tower or projector that is not here; the rest has been checked.
    """
    from llava.data.preprocess import resolve_supervise
    from llava.families.llava_training import architecture_for, rope_overrides
    from llava.model.builder import read_config

    check_common(run)
    resolve_supervise(run["version"], run["supervise"])
    lacking: list[str] = []
    model, origins = run["model_name_or_path"], {}
    args, checkpoint = arguments(run), None
    with _later(lacking):
        checkpoint = read_config(model)
        check_packs(run, checkpoint)
        architecture_for(args, checkpoint)
        rope_overrides(args, checkpoint)
    if run["vision_tower"] is None:
        check_tower_part(run, 0)
        check_parts(trained_parts(run), {"mm_language_model"})
    else:
        origins = _check_vision(run, checkpoint, lacking)
    if lacking:
        raise OutOfReach("; ".join(lacking))
    told = {part: origin.text.replace("the checkpoint", model, 1) for part, origin in origins.items()}
    return told | {"mm_language_model": model}


@contextlib.contextmanager
def _later(lacking: list[str]):
    """What is out of reach is said when the rest has been checked."""
    try:
        yield
    except OutOfReach as error:
        lacking.append(str(error))


def _check_vision(run, checkpoint: dict | None, lacking: list[str]) -> dict[str, Origin]:
    """Where the parts of the vision side start from, as far as that is in reach.

    Args:
        checkpoint: the config that the run's model comes with, None out of reach.
    """
    from llava.model.multimodal_encoder.token_compressor import load_token_compressor

    origins, file = {}, None
    with _later(lacking):
        layout = vision_layout(run_config(run))
        check_layout(layout, "image")
        if tells_tower_part(run):
            check_tower_part(run, len(layout.tower.blocks()))
        with _later(lacking):
            file = _projector_file(run)
        check_projector(layout, checkpoint and checkpoint.get("hidden_size"), file)
        if run["pretrain_token_compressor"] and layout.tower.token_compressor is not None:
            load_token_compressor(layout.tower.token_compressor, run["pretrain_token_compressor"])  # compares, on meta
        if not lacking:
            change = VisionChange.between(checkpoint, run_config(run), run["model_name_or_path"])
            compressor_file = run["pretrain_token_compressor"] or _compressor_in(file)
            origins = change.origins(layout.tower, file, compressor_file)
            _check_origins(trained_parts(run), origins)
            _check_tokens(run, trained_parts(run))
    return origins


def _check_origins(parts: set[str], origins: dict) -> None:
    """Refuse to train nothing, or behind a part that is random and stays so."""
    check_parts(parts, {"mm_language_model", *origins})
    for part, origin in origins.items():
        if origin.random and part not in parts:
            name, key = _RANDOM[part]
            raise LlavaError(
                f"mm_tunable_parts: the {name} is {origin.text}, and would stay so: only {', '.join(sorted(parts))} is "
                f"trained; expected {part} among the trained parts, or weights to start from ({key})"
            )


def check_media(run, kinds: set[str]) -> None:
    """Whether the kinds of media that the data have ("image", "video") become tokens with these settings."""
    if run["vision_tower"] is not None and "video" in kinds:
        check_layout(vision_layout(run_config(run)), "video")


def check_projector(layout: VisionLayout, hidden_size: int | None, file: str | None = None) -> None:
    """Build the projector without weights, and compare those of a file with it.

    Raises:
        LlavaError: there is none of that kind, or it fits not the tower, a language model of this width, or the file.
    """
    import torch

    from llava.model.checkpoint import load_projector
    from llava.model.multimodal_projector.builder import build_vision_projector

    kind, width = layout.token_grid.kind, layout.tower.hidden_size
    config = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=width, hidden_size=hidden_size or width)
    with torch.device("meta"):
        projector = build_vision_projector(config)
    if file is not None:
        load_projector(SimpleNamespace(mm_projector=projector, vision_tower=layout.tower, config=config), file)


def _projector_file(run) -> str | None:
    """The file that the projector starts from.

    Raises:
        OutOfReach: there is none at the path that is named.
    """
    from llava.model.checkpoint import PROJECTOR_NAME, find_projector, named_or_beside, what_is_there

    path = run["pretrain_mm_mlp_adapter"]
    if not path:
        return None
    file = find_projector(path) if os.path.isdir(path) else named_or_beside(path)
    if file is None or not os.path.isfile(file):
        missing = os.path.join(path, PROJECTOR_NAME) if os.path.isdir(path) else path
        raise OutOfReach(
            f"{run.source('pretrain_mm_mlp_adapter')}: pretrain_mm_mlp_adapter {path}: no such file, expected a "
            f"projector (mm_projector.safetensors or .bin); {what_is_there(missing)}"
        )
    return file


def _compressor_in(file: str | None) -> str | None:
    """The projector's file, if there is a token compressor in it too."""
    from llava.model.checkpoint import weight_names

    return file if file and any("token_compressor." in name for name in weight_names(file)) else None


def _check_tokens(run, parts: set[str]) -> None:
    """As `check_new_tokens`, with the tokenizer that the run will have."""
    from llava.families.llava_training import check_new_tokens
    from llava.model.builder import load_tokenizer

    if run["mm_use_im_start_end"]:
        args = arguments(run)
        check_new_tokens(args, args, load_tokenizer(run["model_name_or_path"], cache_dir=run["cache_dir"]))
