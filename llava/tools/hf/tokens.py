"""The tokenizer of a LLaVA checkpoint with tokens for images, and without them again; how generation stops."""

import json
import os

from llava.errors import LlavaError

IMAGE, VIDEO = "<image>", "<video>"


# LLaVA encodes the text behind an image by itself, and Llama's tokenizers put a blank before every text. Those that put
# none after their special tokens get it by this rule, which needs `<image>` to be looked for after normalisation.
_BLANK_AFTER_IMAGE = {
    "type": "Replace",
    "pattern": {"Regex": r"<image>(?!<image>|\z)"},
    "content": f"{IMAGE} ",
}


def _blank_at_start_only(spec: dict) -> bool:
    """Whether a tokenizer.json puts the blank before a whole text, but not before its pieces between special tokens."""
    pre = spec.get("pre_tokenizer") or {}
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme") == "first" and not pre.get("split", True)


def rebuild(tokenizer, added: tuple[str, ...] = (), without: tuple[str, ...] = (), padding_side: str = "left"):
    """A fast tokenizer that gives `tokenizer`'s ids, whatever class reads it back.

    Llama's legacy tokenizers put a blank before every piece of text; transformers 5 does so only where none is there
    already, which `llava.text_encoding` mends. Here that mending goes into tokenizer.json, and so does the blank behind
    an image.

    Args:
        tokenizer: any with a fast backend.
        added: special tokens to add, where it has none of that name.
        without: special tokens to take out; must be its last ones.
        padding_side: of the new one; generation pads on the left.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    from llava.text_encoding import text_encoder

    spec = json.loads(text_encoder(tokenizer).to_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in without]
    blank = IMAGE in added and spec["normalizer"] is None and _blank_at_start_only(spec)
    if blank:
        spec["normalizer"] = _BLANK_AFTER_IMAGE
    elif IMAGE in without and spec["normalizer"] == _BLANK_AFTER_IMAGE:
        spec["normalizer"] = None
    backend = Tokenizer.from_str(json.dumps(spec))
    for text in added:
        backend.add_special_tokens([AddedToken(text, special=True, normalized=blank and text == IMAGE)])
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    extra = {f"{text.strip('<>')}_token": text for text in added}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=extra,
        **{name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name, None) is not None},
    )
    made.chat_template = None
    return made


def save(tokenizer, folder: str) -> None:
    """Write tokenizer.json and tokenizer_config.json, under the class name that all versions of transformers know."""
    tokenizer.save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")


def last_tokens(tokenizer, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that are the tokenizer's very last tokens, which can be taken out without moving others."""
    ids = {index: text for text, index in tokenizer.get_vocab().items()}
    found = []
    for index in sorted(ids, reverse=True):
        if ids[index] not in names:
            break
        found.append(ids[index])
    return tuple(found)


def stop_ids(tokenizer, template: str, settings) -> tuple[list[int], list[str]]:
    """(ids that end an answer, stop texts of the template that are no single token).

    Args:
        tokenizer: of the checkpoint.
        template: conversation template.
        settings: the checkpoint's generation config.
    """
    from llava.conversation import get_template, stop_strings

    vocabulary = tokenizer.get_vocab()
    ids = settings.eos_token_id
    ids = set(ids if isinstance(ids, (list, tuple)) else [ids]) | {tokenizer.eos_token_id}
    left = []
    for text in stop_strings(template):
        if text in vocabulary:
            ids.add(vocabulary[text])
        elif text.strip():  # a captioner stops at a newline, which few tokenizers have a token of their own for
            left.append(text)
    for index in get_template(template).stop_token_ids or ():
        token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
        if token in tokenizer.all_special_tokens or token in tokenizer.get_added_vocab():
            ids.add(index)
    return sorted(index for index in ids if index is not None), left


def generation_config(path: str, tokenizer, template: str):
    """(generation config with the checkpoint's settings and the stop tokens, stop texts it cannot hold).

    Raises:
        LlavaError: a generation_config.json that cannot be read.
    """
    from transformers import GenerationConfig

    from llava.model.generation import mended, read_settings

    settings = GenerationConfig()
    if os.path.isfile(os.path.join(path, "generation_config.json")):
        try:
            settings = read_settings(path)
        except (OSError, ValueError, TypeError) as error:
            raise LlavaError(f"{path}: generation_config.json: {str(error).splitlines()[0][:160]}") from None
        settings = mended(settings, path)
    ids, left = stop_ids(tokenizer, template, settings)
    settings.eos_token_id = ids if len(ids) != 1 else ids[0]
    if not ids:
        settings.eos_token_id = None
    settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    return settings, left
