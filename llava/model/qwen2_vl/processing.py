"""Qwen2-VL's and Qwen2.5-VL's processors with as many image tokens in the prompt as an image really keeps."""

from transformers import AutoTokenizer, AutoVideoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from llava.model.qwen2_vl.image_processing import AdaptiveQwen2VLImageProcessor
from llava.model.qwen2_vl.layout import token_counts
from llava.model.stock import RefusesVideos


class PillowProcessor(RefusesVideos):
    """In front of a processor class of transformers: images are read by Pillow, whatever is installed.

    Without torchvision, which transformers' video processors need, videos are refused.

    Attributes:
        stock_class: transformers' class, which saved folders name.
        image_class: the image processor that it has, whatever a folder names.
    """

    stock_class = image_class = None

    @classmethod
    def get_attributes(cls):
        names = super().get_attributes()
        return names if is_torchvision_available() else [name for name in names if name != "video_processor"]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # transformers would build the image processor that the folder names
        image_processor = cls.image_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        ours = cls.image_class.valid_kwargs.__annotations__
        rest = {key: value for key, value in kwargs.items() if key not in ours}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **rest)
        if "video_processor" not in cls.get_attributes():
            return [image_processor, tokenizer]
        return [image_processor, tokenizer, AutoVideoProcessor.from_pretrained(pretrained_model_name_or_path, **rest)]

    def to_dict(self, *args, **kwargs) -> dict:
        """What is saved; it names transformers' class, so that a folder of ours is a stock one too."""
        return super().to_dict(*args, **kwargs) | {"processor_class": self.stock_class.__name__}

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers', under its class's name, with `preprocessor_config.json`, where it looks for a video
        processor that is not here."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer._set_processor_class(self.stock_class.__name__)  # in place of this class's
        self.tokenizer.save_pretrained(save_directory)
        return saved


class _AdaptiveProcessor(PillowProcessor):
    """What both processors have in common."""

    image_class = AdaptiveQwen2VLImageProcessor

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The image tokens that stand for one image in the prompt."""
        levels, grids = image_inputs.get("image_patch_levels"), image_inputs["image_grid_thw"]
        if levels is None:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        start = sum(int(t * h * w) for t, h, w in grids[:image_idx])
        grid = grids[image_idx : image_idx + 1]
        end = start + sum(int(t * h * w) for t, h, w in grid)
        return self.image_token * token_counts(levels[start:end], grid)[0][1]


class AdaptiveQwen2VLProcessor(_AdaptiveProcessor, Qwen2VLProcessor):
    """As transformers' processor of Qwen2-VL; its image processor is `AdaptiveQwen2VLImageProcessor`.

    `from_pretrained` takes a stock Qwen2-VL folder too, and settings of the image processor beside it. Of a call they
    are set in `images_kwargs`.
    """

    stock_class = Qwen2VLProcessor


class AdaptiveQwen2_5_VLProcessor(_AdaptiveProcessor, Qwen2_5_VLProcessor):
    """`AdaptiveQwen2VLProcessor` for Qwen2.5-VL, whose images are processed alike."""

    stock_class = Qwen2_5_VLProcessor
