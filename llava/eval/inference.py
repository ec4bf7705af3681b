"""A checkpoint ready to answer: prompts and pictures in, texts out. Evaluation, prediction and chat share it."""

from llava.conversation import Conversation, stop_strings
from llava.errors import LlavaError
from llava.eval.questions import Question, build_prompt


class Inference:
    """One model with what belongs to it.

    Args:
        tokenizer, model, image_processor: as `load_pretrained_model` returns them.
        template: the conversation template to ask with.
    """

    def __init__(self, tokenizer, model, image_processor, template: Conversation):
        self.tokenizer, self.model, self.image_processor, self.template = tokenizer, model, image_processor, template

    @classmethod
    def load(cls, model_path, model_base=None, *, version=None, device=None, dtype=None, **kwargs):
        """From a checkpoint.

        Args:
            model_path, model_base: as `load_pretrained_model`.
            version: name of a conversation template; None takes the checkpoint's.
            device: None takes cuda where there is one.
            dtype: None takes float32 on a CPU, else bfloat16.
            **kwargs: passed on to `load_pretrained_model`.

        Raises:
            LlavaError: no such template, or the checkpoint cannot be loaded.
        """
        import torch

        from llava.conversation import conv_templates
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
        name = get_model_name_from_path(model_path)
        tokenizer, model, processor, _ = load_pretrained_model(
            model_path, model_base, name, device_map=device, torch_dtype=dtype, **kwargs
        )
        version = version or model.config.conversation_template
        if version not in conv_templates:
            raise LlavaError(f"template {version!r}: found no such one, expected one of {', '.join(conv_templates)}")
        return cls(tokenizer, model, processor, conv_templates[version])

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the template's."""
        special = self._added_tokens()
        ids = {self.tokenizer.eos_token_id, *(self.template.stop_token_ids or ())}
        ids |= {special[text] for text in stop_strings(self.template) if text in special}
        return sorted(i for i in ids if i is not None)

    @property
    def stop_texts(self) -> list[str]:
        """Texts that end an answer: the template's separators that are no token of their own, such as v0's `###`."""
        special = self._added_tokens()
        return [text for text in stop_strings(self.template) if text not in special]

    def _added_tokens(self) -> dict[str, int]:
        return getattr(self.tokenizer, "added_tokens_encoder", {})

    def prompt(self, question: Question) -> list[int]:
        """Token ids of a question, up to where its answer begins."""
        return self.tokens(build_prompt(question, self.template))

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt, IMAGE_TOKEN_INDEX for every `<image>`."""
        from llava.mm_utils import tokenizer_image_token

        return tokenizer_image_token(prompt, self.tokenizer)

    def pixels(self, pictures: list) -> list:
        """The crops of one prompt's pictures, [K, C, H, W] or [C, H, W], in the dtype the model takes, on its device.

        A picture is a PIL image, or a clip: the list of its frames, which give [T, C, H, W].
        """
        import torch

        from llava.images.processing import process_pictures
        from llava.model.visual_merge import pixel_options

        if pictures and self.image_processor is None:
            raise LlavaError("the model has no vision tower, expected a prompt without pictures")
        config = self.model.config
        made = process_pictures(pictures, self.image_processor, pixel_options(config))
        # patches are chosen by grey levels, of which bfloat16 cannot tell neighbours apart
        adaptive = getattr(config, "adaptive_patches", None) is not None
        dtype = torch.float32 if adaptive else self.model.dtype
        return [values.to(self.model.device, dtype) for values in made]

    def inputs(self, prompts: list[list[int]], pictures: list[list]) -> dict:
        """Keyword arguments of `model.generate` for a batch, padded on the left.

        Args:
            prompts: token ids of each row, as `tokens` gives them.
            pictures: PIL pictures of each row, or clips as lists of frames, one per `<image>`.
        """
        import torch

        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        images = [pixels for row in pictures for pixels in self.pixels(row)]
        flat = [picture for row in pictures for picture in row]
        sizes = [picture[0].size if isinstance(picture, list) else picture.size for picture in flat]
        kinds = ["video" if isinstance(picture, list) else "image" for picture in flat]
        media = {"images": images, "image_sizes": sizes, "modalities": kinds} if images else {}
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device), **media}

    def generate(self, prompts: list[list[int]], pictures: list[list], **options) -> list[str]:
        """The answers to a batch of prompts.

        Args:
            prompts, pictures: as `inputs` takes them.
            **options: of transformers' `generate`; greedy without any.
        """
        return self.answer(self.inputs(prompts, pictures), **options)

    def answer(self, inputs: dict, **options) -> list[str]:
        """The answers to prepared inputs: as `generate`, for one who looks at the inputs first."""
        import torch

        from llava.mm_utils import KeywordsStoppingCriteria

        options = {"do_sample": False, **options}
        if self.stop_texts:
            criterion = KeywordsStoppingCriteria(self.stop_texts, self.tokenizer, inputs["input_ids"])
            options["stopping_criteria"] = [*options.get("stopping_criteria", ()), criterion]
        with torch.inference_mode():
            new = self.model.generate(
                **inputs, eos_token_id=self.stop_ids, pad_token_id=self.tokenizer.pad_token_id, **options
            )
        return [self.cut(text) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def cut(self, text: str) -> str:
        """Generated text up to the first of `stop_texts`, without blanks at its ends."""
        for stop in self.stop_texts:
            text = text.split(stop, 1)[0]
        return text.strip()
