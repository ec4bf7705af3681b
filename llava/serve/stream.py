"""An answer's text while its tokens come, and how Ctrl-C ends it."""

import contextlib
import signal
import threading
from collections.abc import Callable


@contextlib.contextmanager
def noted_interrupts():
    """Ctrl-C is noted, and only a second one raised: an exception between any two steps may get lost in other code.

    Yields a function that says whether there was one. Without effect outside the main thread, which gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


class AnswerStream:
    """A streamer for transformers' `generate`: hands on text as soon as it is certain.

    All tokens are decoded anew each time, since a token's text may depend on those before it: transformers' own
    `TextStreamer` decodes line by line, and under Llama's tokenizer every line then lacks a blank of its indentation.
    What may still change is held back: half a character, blanks at the end, and the beginning of a text that ends the
    answer. What was handed on is therefore always the beginning of the answer that `Inference` returns.

    Args:
        tokenizer: decodes.
        stop_texts: texts at which an answer ends.
        emit: called with each new piece of text.
        interrupted: whether the answer is to end; KeyboardInterrupt is raised at the next token.
    """

    def __init__(
        self,
        tokenizer,
        stop_texts: list[str],
        emit: Callable[[str], None],
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.tokenizer, self.stop_texts, self.emit, self.interrupted = tokenizer, stop_texts, emit, interrupted
        self.ids: list[int] | None = None  # before the prompt
        self.shown = ""

    def put(self, value) -> None:
        """The prompt, which `generate` puts first (empty where it works from embeddings); then new tokens, [n]."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self._cut().rstrip("\ufffd")  # bytes of a character that is not whole yet
        held = max((_overlap(text, stop) for stop in self.stop_texts), default=0)
        self._show(text[: len(text) - held].strip())
        if self.interrupted():
            raise KeyboardInterrupt

    def end(self) -> None:
        self._show(self.text)

    @property
    def text(self) -> str:
        """The answer so far, as `Inference.cut` would leave it."""
        return self._cut().strip()

    def _cut(self) -> str:
        text = self.tokenizer.decode(self.ids or [], skip_special_tokens=True)
        for stop in self.stop_texts:
            text = text.split(stop, 1)[0]
        return text

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):  # also where a tokenizer's cleaning has changed what was shown already
            self.emit(text[len(self.shown) :])
            self.shown = text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
