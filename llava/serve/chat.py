"""A conversation with a model: its turns and pictures, the prompt they make, and the file they can be saved in."""

import contextlib
import json
import os
from collections.abc import Callable

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError
from llava.inference.engine import Inference
from llava.inference.pictures import Picture, open_picture
from llava.serve.stream import AnswerStream, noted_interrupts


class Chat:
    """One conversation.

    Args:
        inference: the model.
        max_new_tokens: longest answer, in tokens.
        allow_remote: whether addresses may be read.
        **options: of transformers' `generate`: do_sample, temperature, ...

    Attributes:
        turns: (speaker, text) so far, "human" and "gpt" in turn; `<image>` marks where the pictures are.
        pictures: of all turns, in order.
        waiting: pictures that go with the next message.
        interruptible: whether an interrupt ends the answer alone.
    """

    def __init__(self, inference: Inference, *, max_new_tokens: int = 512, allow_remote: bool = False, **options):
        self.inference, self.max_new_tokens, self.allow_remote = inference, max_new_tokens, allow_remote
        self.options = options
        self.turns: list[tuple[str, str]] = []
        self.pictures: list[Picture] = []
        self.waiting: list[Picture] = []
        self.interruptible = True
        self._saved: set[str] = set()

    def add_picture(self, source: str) -> Picture:
        """A picture for the next message; LlavaError where there is none or the model does not see."""
        if self.inference.image_processor is None:
            raise LlavaError(f"image {source}: the model has no vision tower, expected text alone")
        picture = open_picture(source, self.allow_remote)
        self.waiting.append(picture)
        return picture

    def clear(self) -> None:
        """Forget everything that was said and shown."""
        self.turns, self.pictures, self.waiting = [], [], []

    def message(self, text: str) -> str:
        """What the user typed with its pictures: in front, as in training, or where the text itself has `<image>`.

        Raises:
            LlavaError: as many `<image>` as there are pictures were not typed.
        """
        typed = text.count(DEFAULT_IMAGE_TOKEN)
        if not typed:
            return f"{DEFAULT_IMAGE_TOKEN}\n" * len(self.waiting) + text
        if typed != len(self.waiting):
            raise LlavaError(f"message: found {typed} <image> for {len(self.waiting)} new pictures, expected as many")
        return text

    def prompt(self, turns: list[tuple[str, str]]) -> str:
        """The text of `turns` in the model's template, up to where the next answer begins."""
        return self.inference.family.prompt_text(turns, self.inference.loaded)

    def ask(self, text: str, emit: Callable[[str], None] = lambda piece: None) -> str:
        """The answer to a message; `emit` gets it piece by piece while it comes.

        An interrupt (KeyboardInterrupt) ends the answer; what there is of it is kept and returned. A message without
        any answer is not kept, and its pictures wait for the next one.

        Raises:
            LlavaError: the conversation is too long, or its `<image>` do not match.
        """
        turns = [*self.turns, ("human", self.message(text))]
        pictures = [*self.pictures, *self.waiting]
        inference = self.inference
        inputs = self._inputs(turns, pictures)
        room = self._room(inputs)
        interrupts = noted_interrupts() if self.interruptible else contextlib.nullcontext(lambda: False)
        with interrupts as interrupted:
            stream = AnswerStream(inference.tokenizer, inference.stop_texts, emit, interrupted)
            try:
                options = {**self.options, "max_new_tokens": min(self.max_new_tokens, room), "streamer": stream}
                answer = inference.answer(inputs, **options)[0]
            except KeyboardInterrupt:
                if not self.interruptible:
                    raise
                stream.end()
                answer = stream.text
        if answer:
            # an <image> that the model writes is no picture
            kept = answer.replace(DEFAULT_IMAGE_TOKEN, "")
            self.turns, self.pictures, self.waiting = [*turns, ("gpt", kept)], pictures, []
        return answer

    def _inputs(self, turns: list[tuple[str, str]], pictures: list[Picture]) -> dict:
        inference = self.inference
        try:
            return inference.inputs([inference.prompt(turns)], [[picture.image for picture in pictures]])
        except LlavaError as error:  # sizes such as 2000 x 10 that no processor takes
            names = ", ".join(picture.source for picture in pictures)
            raise LlavaError(f"{names}: {error}; /clear removes it" if pictures else str(error)) from None

    def _room(self, inputs: dict) -> int:
        """Tokens left for an answer; LlavaError if there are none."""
        inference = self.inference
        limit, (text, visual) = inference.loaded.context, inference.family.sequence_length(inputs, inference.loaded)
        if text + visual >= limit:
            raise LlavaError(
                f"the conversation has {text + visual:,} tokens ({text:,} of text, {visual:,} of pictures), expected "
                f"fewer than the model's {limit:,}; /clear starts anew"
            )
        return limit - text - visual

    def save(self, path: str) -> str:
        """Write the conversation as one record of LLaVA's data format; its image folder is the file's folder.

        Pictures that lie elsewhere are copied beside the file, into a folder of its name.

        Returns:
            the path.

        Raises:
            LlavaError: nothing to save, another ending than .json and .jsonl, a file that is not this chat's, or no
                permission.
        """
        path = os.path.expanduser(path)
        if not self.turns:
            raise LlavaError(f"{path}: nothing was said yet, expected a conversation to save")
        stem, ending = os.path.splitext(path)
        if ending not in (".json", ".jsonl"):
            raise LlavaError(f"{path}: found an unknown kind of data file, expected .json or .jsonl")
        if os.path.exists(path) and os.path.abspath(path) not in self._saved:
            raise LlavaError(f"{path}: exists already, expected a new file")
        record = {"id": os.path.basename(stem)}
        try:
            names = [self._keep(picture, stem, number) for number, picture in enumerate(self.pictures)]
            if names:
                record["image"] = names[0] if len(names) == 1 else names
            record["conversations"] = [{"from": speaker, "value": text} for speaker, text in self.turns]
            content = json.dumps([record], indent=1) if ending == ".json" else json.dumps(record)
            with open(path, "w", encoding="utf-8") as file:
                file.write(content + "\n")
        except OSError as error:
            raise LlavaError(f"{path}: cannot be written ({error.strerror or error})") from None
        self._saved.add(os.path.abspath(path))
        return path

    def _keep(self, picture: Picture, stem: str, number: int) -> str:
        """The picture's path relative to the saved file's folder, copied there unless it lies inside."""
        folder = os.path.dirname(os.path.abspath(stem))
        if not picture.remote:
            inside = os.path.relpath(os.path.abspath(os.path.expanduser(picture.source)), folder)
            if not inside.startswith(".."):
                return inside
        images = f"{stem}_images"
        os.makedirs(images, exist_ok=True)
        name = f"{number}.png"
        picture.image.save(os.path.join(images, name))
        return os.path.join(os.path.basename(images), name)
