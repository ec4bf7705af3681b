"""Text to token ids with character positions, as the tokenizers of LLaVA-NeXT's time did it."""

import contextlib
import json
import weakref
from typing import NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError

_BATCH = 64  # texts that are counted at once; of more, what they become no longer fits into the cache

_ENCODERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Encoding(NamedTuple):
    """Token ids of a text and, per token, the characters (begin, end) it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class TextEncoder:
    """Encodes text with the `tokenizers` backend of a Hugging Face tokenizer.

    It works on a copy of the backend, so that padding or truncation that somebody else switched on does not matter,
    and it restores one behaviour for Llama-like vocabularies. The sentencepiece tokenizer that LLaVA-NeXT trained
    with puts a blank in front of EVERY piece of text (each one after `<image>` or `</s>` too), whether or not the
    piece begins with a blank already; transformers 5 leaves it out if one is there, which gives other ids for
    "<image> a cat". Legacy tokenizers get the blank always, the others only at the very start.

    Attributes:
        vocab_size: number of tokens when the copy was made.
        bos_token_id: id of the token that starts a text, or None.
    """

    def __init__(self, tokenizer):
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise LlavaError(
                f"tokenizer {type(tokenizer).__name__}: found no character offsets, expected a fast tokenizer"
            )
        spec = json.loads(backend.to_str())
        pre = spec.get("pre_tokenizer") or {}
        sentencepiece = pre.get("type") == "Metaspace" and not pre.get("split", True)
        scheme = pre.get("prepend_scheme") if sentencepiece else None
        if scheme == "always" and spec.get("normalizer") is None:
            blank = pre["replacement"]
            spec["pre_tokenizer"] = None
            spec["normalizer"] = {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": blank},
                    {"type": "Replace", "pattern": {"String": " "}, "content": blank},
                ],
            }
        self._backend = Tokenizer.from_str(json.dumps(spec))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._blank_at_start = scheme == "first"
        self._fixed: dict[str, list[int]] = {}
        self._put_off: list[tuple[str, bool]] | None = None
        self.vocab_size = backend.get_vocab_size()
        self.bos_token_id = tokenizer.bos_token_id

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Ids and offsets of `text`; `add_special_tokens` adds what the tokenizer puts around every text (bos)."""
        if self._put_off is not None:
            self._put_off.append((text, add_special_tokens))
            return Encoding([], [])
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        if self._blank_at_start and text.startswith(" "):
            found = self._backend.encode(" " + text, add_special_tokens=add_special_tokens)
            return Encoding(found.ids, [(max(begin - 1, 0), max(end - 1, 0)) for begin, end in found.offsets])
        found = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return Encoding(found.ids, found.offsets)

    @contextlib.contextmanager
    def put_off(self):
        """Where only the number of tokens is asked for: within it `encode` finds none, but adds its text to the list
        that is given, for `count`."""
        before, self._put_off = self._put_off, []
        try:
            yield self._put_off
        finally:
            self._put_off = before

    def count(self, texts: list[tuple[str, bool]]) -> list[int]:
        """How many ids `encode` finds of each (text, whether special tokens are added), without offsets and in batches,
        which takes a good half of the time."""
        counts = dict.fromkeys(texts, 0)
        for special in (False, True):
            asked = [text for text, added in counts if added == special]
            for batch in (asked[at : at + _BATCH] for at in range(0, len(asked), _BATCH)):
                given = [" " + text if self._blank_at_start and text.startswith(" ") else text for text in batch]
                found = self._backend.encode_batch_fast(given, add_special_tokens=special)
                counts |= {(text, special): len(ids) for text, ids in zip(batch, found, strict=True)}
        return [counts[text] for text in texts]

    def to_json(self) -> str:
        """The backend as the content of a tokenizer.json."""
        return self._backend.to_str()

    def fixed_ids(self, text: str) -> list[int]:
        """Ids of a text that recurs in every sample, remembered; the caller must not change the list."""
        if text not in self._fixed:
            self._fixed[text] = self._encode(text, False).ids
        return self._fixed[text]


def text_encoder(tokenizer) -> TextEncoder:
    """The encoder of `tokenizer`, made once and again only after tokens were added."""
    encoder = _ENCODERS.get(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if encoder is None or backend is None or backend.get_vocab_size() != encoder.vocab_size:
        encoder = _ENCODERS[tokenizer] = TextEncoder(tokenizer)
    return encoder


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text by itself, with what the tokenizer puts around every text; an `<image>` in it is text."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer(text).input_ids
    return text_encoder(tokenizer).encode(text, add_special_tokens=True).ids


def tokenizer_image_token(prompt, tokenizer, image_token_index=IMAGE_TOKEN_INDEX, return_tensors=None):
    """Token ids of `prompt` with every `<image>` replaced by `image_token_index`.

    The text between images is tokenised piece by piece; a BOS token that the tokenizer puts before every piece is kept
    once, at the front.

    Returns:
        list of int, or LongTensor [L] with `return_tensors="pt"`.
    """
    chunks = [text_ids(tokenizer, chunk) for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    input_ids = list(chunks[0])
    for chunk in chunks[1:]:
        input_ids.append(image_token_index)
        # llama3's template writes the BOS itself: then only a tokenizer that adds one put it before this piece, too
        bos = bool(chunk) and chunk[0] == tokenizer.bos_token_id
        input_ids.extend(chunk[1:] if bos else chunk)
    if return_tensors is None:
        return input_ids
    if return_tensors == "pt":
        import torch

        return torch.tensor(input_ids, dtype=torch.long)
    raise LlavaError(f'tokenizer_image_token: return_tensors is {return_tensors!r}, expected None or "pt"')
