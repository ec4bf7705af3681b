"""Checkpoints that are no LLaVA's: said what they are, and what becomes of them. No import of transformers' classes."""

from llava.errors import LlavaError

IMPORTABLE = ("llava", "llava_next", "llava_onevision")  # types of transformers' own models that `import_hf` takes
OTHER_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # which `llava.families` loads, by classes of their own
_TOWERS = ("clip_vision_model", "siglip_vision_model")


def refuse_foreign(values: dict, path: str) -> None:
    """Refuse the config of a checkpoint in another format than LLaVA's or that of a plain language model.

    Args:
        values: its config.json.
        path: folder or hub id.

    Raises:
        LlavaError: says what it is, and what to do where something can be done.
    """
    from llava.model.families import LANGUAGE_MODELS, LLAVA_TYPES, PLAIN_TYPES

    names, kind = [str(name) for name in values.get("architectures") or ()], values.get("model_type")
    if any(name in LANGUAGE_MODELS for name in names) or kind in LLAVA_TYPES:
        return
    parts = [key for key in ("text_config", "vision_config") if values.get(key) is not None]
    stock = [name for name in names if name.endswith(("ForConditionalGeneration", "ForVision2Seq"))]
    if kind in PLAIN_TYPES or not (parts or stock):
        return
    found = f"{path}: found a {(stock or names or [kind])[0]} in the format of transformers (model_type {kind!r})"
    if kind in OTHER_FAMILIES:
        raise LlavaError(
            f"{found}, which is no LLaVA: the commands, training and llava.families.family_of({path!r}).load take it"
        )
    if kind not in IMPORTABLE:
        raise LlavaError(f"{found}, which there is no way in for; expected {taken()}")
    text, vision = ((values.get(key) or {}).get("model_type") for key in ("text_config", "vision_config"))
    if text not in (None, *PLAIN_TYPES) or vision not in (None, *_TOWERS):
        raise LlavaError(
            f"{found} with {text} and {vision}, which llava.tools.import_hf does not take; expected one of "
            f"{', '.join(PLAIN_TYPES)} and {' or '.join(_TOWERS)}"
        )
    raise LlavaError(
        f"{found}; expected a LLaVA checkpoint: `python -m llava.tools.import_hf --model-path {path} --output FOLDER` "
        "makes one of it"
    )


def taken() -> str:
    """What can be loaded, in words."""
    from llava.model.families import LANGUAGE_MODELS

    return (
        f"a LLaVA checkpoint (architectures naming one of {', '.join(LANGUAGE_MODELS)}), one of transformers' "
        f"{', '.join(IMPORTABLE)} after llava.tools.import_hf, or {', '.join(OTHER_FAMILIES)}"
    )
