"""Vision-language models of transformers as they are used here: names and folders are stock ones."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from llava.errors import LlavaError


class SavesStockNames:
    """In front of a class of transformers: weights are saved under their published names, however they were loaded.

    Left to itself, transformers undoes on saving all renamings that it knows, also those that a model loaded under
    ZeRO-3 had no use for.
    """

    def save_pretrained(self, save_directory, *args, **kwargs):
        self._weight_conversions = get_checkpoint_conversion_mapping(type(self).__name__)
        super().save_pretrained(save_directory, *args, **kwargs)


class FrozenForgets:
    """In front of a vision encoder of transformers: a frozen one keeps no activations under gradient checkpointing.

    transformers makes the output of each encoder's input embeddings require gradients then; through a frozen encoder
    they lead nowhere, and all its blocks would be run a second time to compute them.
    """

    def get_input_embeddings(self):
        """As transformers'; None, which it passes over, where no block learns."""
        learns = any(parameter.requires_grad for parameter in self.blocks.parameters())
        return super().get_input_embeddings() if learns else None


class RefusesVideos:
    """In front of a processor class of transformers, which passes over videos where it has nothing to read them."""

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """As transformers'; no pictures at all, an empty list for one, are none.

        Raises:
            LlavaError: videos, where there is no video processor.
        """
        images, videos = (None if _is_empty(media) else media for media in (images, videos))
        if videos is not None and getattr(self, "video_processor", None) is None:
            raise LlavaError(
                "videos: found some, and no video processor, which transformers has with torchvision alone: install "
                "that, or give their frames as images"
            )
        return super().__call__(images=images, text=text, videos=videos, **kwargs)


def _is_empty(media) -> bool:
    return isinstance(media, (list, tuple)) and all(_is_empty(part) for part in media)


def named_as(stock):
    """Class decorator for a subclass of a class of transformers: it goes by that one's name, by which transformers
    finds the names of its weights and its layers, and which saved folders carry."""

    def rename(own):
        own.__name__, own.__qualname__, own.__module__ = stock.__name__, stock.__qualname__, stock.__module__
        return own

    return rename
