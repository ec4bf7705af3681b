"""An answer's text while its tokens come."""

from collections.abc import Callable


class AnswerStream:
    """A streamer for transformers' `generate`: hands on text as soon as it is certain.

    All tokens are decoded anew each time, since a token's text may depend on those before it. What may still change is
    held back: half a character, blanks at the end, and the beginning of a text that ends the answer. What was handed on
    is therefore always the beginning of the answer that `Inference` returns.

    Args:
        tokenizer: decodes.
        stop_texts: texts at which an answer ends.
        emit: called with each new piece of text.
    """

    def __init__(self, tokenizer, stop_texts: list[str], emit: Callable[[str], None]):
        self.tokenizer, self.stop_texts, self.emit = tokenizer, stop_texts, emit
        self.ids: list[int] = []
        self.shown = ""

    def put(self, value) -> None:
        """New tokens, [n] or [1, n]; the prompt that `generate` puts first is empty, as it works from embeddings."""
        self.ids += value.flatten().tolist()
        if self.ids:
            self._show(self._certain(self._decoded()))

    def end(self) -> None:
        self._show(self.text)

    @property
    def text(self) -> str:
        """The answer so far, as `Inference.cut` would leave it."""
        text = self._decoded()
        for stop in self.stop_texts:
            text = text.split(stop, 1)[0]
        return text.strip()

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _certain(self, text: str) -> str:
        for stop in self.stop_texts:
            text = text.split(stop, 1)[0]
        text = text.rstrip("\ufffd")  # bytes of a character that is not whole yet
        overlaps = (_overlap(text, stop) for stop in self.stop_texts)
        text = text[: len(text) - max(overlaps, default=0)]
        return text.strip()

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):  # also where a tokenizer's cleaning has changed what was shown already
            self.emit(text[len(self.shown) :])
            self.shown = text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
