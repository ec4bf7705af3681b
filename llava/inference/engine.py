"""A checkpoint ready to answer: prompts and pictures in, texts out. Evaluation, prediction, chat and tools share it."""

from dataclasses import replace

from llava.errors import LlavaError


class Inference:
    """One model with what belongs to it.

    Args:
        family: the model's, see `llava.families`.
        loaded: as the family's `load` returns it.
        version: name of the conversation template to ask with; None: the checkpoint's.

    Raises:
        LlavaError: no such template, or a model whose chat template is its own.
    """

    def __init__(self, family, loaded, version: str | None = None):
        from llava.conversation import conv_templates

        if version is not None and not family.chooses_template:
            raise LlavaError(f"template {version!r}: {family.name} has a chat template of its own, expected none")
        version = version or loaded.template
        if version not in conv_templates:
            raise LlavaError(f"template {version!r}: unknown, expected one of {', '.join(conv_templates)}")
        self.family, self.loaded = family, replace(loaded, template=version)
        self.model, self.tokenizer, self.image_processor = loaded.model, loaded.tokenizer, loaded.image_processor

    @classmethod
    def load(cls, model_path, model_base=None, *, version=None, device=None, dtype=None, **overrides):
        """From a checkpoint of any family.

        Args:
            model_path, model_base, device, dtype, **overrides: as the family's `load`.
            version: as the class.

        Raises:
            LlavaError: the checkpoint cannot be loaded, or the template is not there.
        """
        from llava.families import family_of

        family = family_of(model_path)
        loaded = family.load(model_path, base=model_base, dtype=dtype, device=device, **overrides)
        return cls(family, loaded, version)

    @property
    def template(self):
        """The conversation template by whose rules its turns are checked, a `Conversation`."""
        from llava.conversation import conv_templates

        return conv_templates[self.loaded.template]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return self.family.stops(self.loaded)[0]

    @property
    def stop_texts(self) -> list[str]:
        """Texts that end an answer and are no token of their own."""
        return self.family.stops(self.loaded)[1]

    def prompt(self, turns: list[tuple[str, str]], answer: str | None = None, images: bool = True) -> list[int]:
        """Token ids of a conversation up to where its next answer begins (or to the end of `answer`), IMAGE_TOKEN_INDEX
        for every `<image>`, unless `images` is False: then it is text; turns are ("human" | "gpt" | "system", text)."""
        return self.family.prompt(turns, self.loaded, answer=answer, images=images)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a prompt that is written out, IMAGE_TOKEN_INDEX for every `<image>`."""
        return self.family.tokens(text, self.loaded)

    def inputs(self, prompts: list[list[int]], pictures: list[list]) -> dict:
        """Keyword arguments of `model.generate` for a batch, padded on the left.

        Args:
            prompts: token ids of each row, as `prompt` and `tokens` give them.
            pictures: PIL pictures of each row, or clips as lists of frames, one per `<image>`.
        """
        return self.family.inputs(prompts, pictures, self.loaded)

    def generate(self, prompts: list[list[int]], pictures: list[list], until=(), **options) -> list[str]:
        """The answers to a batch of prompts.

        Args:
            prompts, pictures: as `inputs` takes them.
            until: texts that end an answer, besides `stop_texts`.
            **options: of transformers' `generate`; greedy without any.
        """
        return self.answer(self.inputs(prompts, pictures), until, **options)

    def answer(self, inputs: dict, until=(), **options) -> list[str]:
        """The answers to prepared inputs: as `generate`, for one who looks at the inputs first."""
        import torch

        from llava.inference.stopping import KeywordsStoppingCriteria

        options = {"do_sample": False, **options}
        if ends := [*self.stop_texts, *until]:
            criterion = KeywordsStoppingCriteria(ends, self.tokenizer, inputs["input_ids"])
            options["stopping_criteria"] = [*options.get("stopping_criteria", ()), criterion]
        with torch.no_grad():  # tensors of inference_mode, cached somewhere, could not be trained with afterwards
            ids = self.model.generate(
                **inputs, eos_token_id=self.stop_ids, pad_token_id=self.tokenizer.pad_token_id, **options
            )
        new = ids[:, inputs["input_ids"].shape[1] :] if self.family.returns_prompt else ids
        return [self.cut(text, until) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def cut(self, text: str, until=()) -> str:
        """Generated text up to the first of `stop_texts` or `until`, without blanks at its ends."""
        for stop in (*self.stop_texts, *until):
            text = text.split(stop, 1)[0]
        return text.strip()
