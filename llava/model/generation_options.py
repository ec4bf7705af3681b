"""Options of transformers' `generate` that a model refuses, since they would fail halfway or answer something else, and
what is padding in a batch of prompts.

`docs/generation.md` lists every option; those that are not named here are transformers' own.
"""

import torch

from llava.errors import LlavaError

# what says that an option is not used, besides None
_UNUSED = {"guidance_scale": (1,), "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,)}

ALWAYS = {
    "assistant_early_exit": "a shortened copy of the model would see no image",
    "token_healing": "the prompt would be written anew without its images",
    "cache_implementation=paged": "continuous batching takes no images",
}
# with a prompt of embeddings, as every one of a LLaVA model is
EMBEDDED = ALWAYS | {
    "assistant_model": "it would be asked without the prompt, which is made of embeddings",
    "encoder_repetition_penalty": "it is for a prompt of tokens, and this one is made of embeddings",
    "encoder_no_repeat_ngram_size": "it is for a prompt of tokens, and this one is made of embeddings",
    "forced_bos_token_id": "it would come second, behind a prompt of embeddings",
    "prefill_chunk_size": "the prompt is made of embeddings, which transformers does not cut",
}
# where the tokens of the prompt stand for images
WITH_IMAGES = ALWAYS | {
    "guidance_scale": "transformers asks again without the image's positions, and fails",
    "prompt_lookup_num_tokens": "what is looked up in the prompt can be the tokens of an image",
}


def check_options(model, refused: dict[str, str], options: dict) -> None:
    """Refuse options that are set in a call or in generation settings.

    Args:
        model: its `generation_config` has what neither `options` nor their `generation_config` say.
        refused: option, or option=value -> why.
        options: keyword arguments of `generate`.

    Raises:
        LlavaError: one of them is set.
    """
    for entry, reason in refused.items():
        name, _, only = entry.partition("=")
        value = option(model, name, options)
        if value is None or value is False or value in _UNUSED.get(name, ()) or (only and value != only):
            continue
        shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        raise LlavaError(f"generate: {name}: found {shown}, which is not taken here: {reason}")


def option(model, name: str, options: dict):
    """The value of an option, from a call, its `generation_config`, or the model's; None where none of them says."""
    if name in options:  # None too
        return options[name]
    settings = (options.get("generation_config"), model.generation_config)
    values = (getattr(said, name, None) for said in settings)
    return next((value for value in values if value is not None), None)


def padding_mask(model, ids, options: dict):
    """[B, L], False on the pad ids at the ends of rows; None where there is no padding.

    transformers' rule, and two cases that it gets wrong: a row's own first token, where prompts begin with the pad id,
    is no padding; and where the pad id ends answers too, nothing tells padding from prompt.

    Args:
        ids: [B, L] prompts that came without a mask.
        options: keyword arguments of `generate`.

    Raises:
        LlavaError: a pad id that ends answers too, at the ends of rows, and more of them in one row than in another.
    """
    pad, eos, bos = (option(model, f"{name}_token_id", options) for name in ("pad", "eos", "bos"))
    ends = eos.tolist() if isinstance(eos, torch.Tensor) else eos
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    pad = ends[0] if pad is None else pad  # as transformers pads
    if len(ids) == 1 or pad is None:
        return None
    real = ids != pad
    before, behind = real.cumsum(1) == 0, real.flip(1).cumsum(1).flip(1) == 0
    first, last = before.sum(1), behind.sum(1)
    if pad in ends:
        if bool((first != first[0]).any() or (last != last[0]).any()):
            raise LlavaError(
                f"attention_mask: found none, and rows that begin or end with the pad id {int(pad)}, which ends "
                "answers too: expected the mask, 0 on padding"
            )
        return None
    if pad == bos and bool((first > 0).all()):
        before[torch.arange(len(ids), device=ids.device), first - 1] = False
    return ~(before | behind)
