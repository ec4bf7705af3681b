"""The chat format of Qwen's vision-language models: prompts, and training tokens with their labels."""

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Turn
from llava.errors import LlavaError
from llava.families.base import Loaded, Turns

IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
PAD = IMAGE_TOKENS[1]
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_OPEN = "<|im_start|>assistant\n"


class QwenChat:
    """How a family writes its conversations, before `Family`.

    Attributes:
        title: the model's name in messages.
        system: the system text where a conversation has none; None: there is none then.
    """

    title: str
    system: str | None

    def chat_turns(self, turns: Turns, images: bool = True, system_turn: str | None = None) -> list[Turn]:
        """A conversation as the chat template writes it, piece by piece; the first piece is the system's.

        Args:
            images: whether an `<image>` stands for an image. It stays `<image>`; a newline right behind one, as LLaVA's
                data has it, is left out, since the template's own prompts have none there.
            system_turn: "template": a system turn at the front is dropped; else it takes the place of the family's own
                system text, as in the chat template.
        """
        system = self.system
        if turns and turns[0][0] == "system":
            system, turns = system if system_turn == "template" else turns[0][1], turns[1:]
        pieces = [] if system is None else [Turn(f"<|im_start|>system\n{system}<|im_end|>\n")]
        for speaker, text in turns:
            header = f"<|im_start|>{_ROLES[speaker]}\n"
            text = text.replace(DEFAULT_IMAGE_TOKEN + "\n", DEFAULT_IMAGE_TOKEN) if images else text
            said = header + text
            answer = (len(header), len(said)) if speaker == "gpt" else ()
            pieces += [Turn(said + "<|im_end|>", *answer), Turn("\n")]
        return pieces

    def check_chat_template(self, processor, where: str) -> None:
        """Refuse a model whose chat template writes something else than `chat_turns`; one without a template passes."""
        render = processor if getattr(processor, "chat_template", None) is not None else processor.tokenizer
        if render.chat_template is None:
            return
        turns = [("system", "Be brief."), ("human", f"{DEFAULT_IMAGE_TOKEN}\nWhat?"), ("gpt", "A b."), ("human", "So?")]
        for chat in (turns[1:], turns):
            messages = []
            for speaker, text in chat:
                images = [{"type": "image"}] * text.count(DEFAULT_IMAGE_TOKEN)
                words = [{"type": "text", "text": text.removeprefix(f"{DEFAULT_IMAGE_TOKEN}\n")}]
                messages.append({"role": _ROLES[speaker], "content": images + words})
            theirs = render.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ours = "".join(turn.text for turn in self.chat_turns(chat)) + _OPEN
            if theirs != ours.replace(DEFAULT_IMAGE_TOKEN, "".join(IMAGE_TOKENS)):
                raise LlavaError(f"{where}: its chat template writes {theirs!r}, expected {self.title}'s")

    def encode(self, source: list, loaded: Loaded, images: bool):
        """`Encoded` conversation: ids (-200 marks an image) and labels, the answers' with the token that ends them.

        Args:
            source: as a record has it.
            images: whether an `<image>` stands for an image; else it is text.

        Raises:
            LlavaError: not a conversation, or one that spells out image tokens.
        """
        from llava.data.preprocess import Encoded, encode_spans
        from llava.data.turns import leading_system, place_image, read_turns
        from llava.text_encoding import text_encoder

        encoder, system = text_encoder(loaded.tokenizer), leading_system(source)
        turns = [(speaker, place_image(text) if images else text) for speaker, text in read_turns(source)]
        ids: list[int] = []
        labels: list[int] = []
        answer = None
        turns = turns if system is None else [("system", system), *turns]
        pieces = self.chat_turns(turns, images, loaded.system_turn)
        if any(PAD in piece.text for piece in pieces):
            raise LlavaError(f"conversations: found {PAD} in a text, expected <image> for an image")
        for turn in pieces:
            spans = [] if turn.answer_start is None else [(turn.answer_start, len(turn.text))]
            found = encode_spans(encoder, turn.text, spans, images, answers=turn.answer)
            if answer is None and found.answer is not None:
                answer = len(ids) + found.answer
            ids += found.ids
            labels += found.labels
        return Encoded(ids, labels, answer)

    def prompt_text(self, turns: Turns, loaded: Loaded, *, answer=None, images=True) -> str:
        from llava.data.turns import place_image

        placed = [(speaker, place_image(text) if images and speaker == "human" else text) for speaker, text in turns]
        pieces = self.chat_turns(placed, images, loaded and loaded.system_turn)
        return "".join(piece.text for piece in pieces) + _OPEN + (answer or "")

    def tokens(self, text, loaded, *, images=True):
        from llava.data.preprocess import encode_spans
        from llava.text_encoding import text_encoder

        return encode_spans(text_encoder(loaded.tokenizer), text, [], images=images).ids
