"""transformers' processors for a LLaVA model's images and prompts."""

import json
import os

from llava.errors import LlavaError
from llava.tools.hf.layouts import FORMATS, Format


def image_processor(path: str, config, tower, form: Format):
    """transformers' Pillow image processor that gives the pixels of `llava.mm_utils.process_images`.

    Args:
        path: of the checkpoint, for the message.
        config, tower: of the LLaVA model.
        form: which model of transformers.

    Raises:
        LlavaError: the tower's own processor does something that transformers' cannot.
    """
    from llava.images.processing import processor_sides
    from llava.tools.hf.configs import grid_hw

    own = tower.image_processor
    sides, side = processor_sides(own), tower.config.image_size
    if sides[0] != side or (form.model_type != "llava" and sides[1] != side):
        raise LlavaError(
            f"{path}: the image processor makes crops of {sides[0]} from images of {sides[1]} pixels, expected "
            f"{side} for both, the encoder's image_size"
        )
    kept = ("image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb", "do_resize")
    values = {key: getattr(own, key) for key in kept if getattr(own, key, None) is not None}
    values["size"] = dict(own.size)
    crop = getattr(own, "crop_size", None)
    values["do_center_crop"] = bool(getattr(own, "do_center_crop", False)) and crop is not None
    if form.model_type == "llava_onevision" or crop is None:
        values["size"], values["do_center_crop"] = {"height": side, "width": side}, False
    if values["do_center_crop"]:
        values["crop_size"] = dict(crop)
    if form.model_type == "llava":
        values.update(resample=own.resample, do_pad=getattr(config, "image_aspect_ratio", None) == "pad")
    else:
        # LLaVA resizes with Pillow's default, bicubic; its processor then finds every crop at its size
        values.update(resample=3, do_pad=True, image_grid_pinpoints=grid_hw(config.image_grid_pinpoints, side))
    made = form.load("ImageProcessorPil")(**{k: v for k, v in values.items() if v is not None})
    if not values["do_center_crop"]:
        made.crop_size = None
    return made


def build_processor(path: str, config, tower, form: Format, tokenizer, template: str | None):
    """transformers' processor: image processor, tokenizer and chat template."""
    from llava.tools.hf.configs import feature_choice

    strategy = feature_choice(tower)[1]
    class_tokens = int(tower.config.model_type == "clip_vision_model")
    side = tower.config.image_size // tower.config.patch_size
    values = {"vision_feature_select_strategy": strategy, "image_token": "<image>"}
    if form.model_type == "llava_onevision":
        from llava.model.visual_merge import MergeRules

        values.update(
            num_image_tokens=side**2 + class_tokens,
            vision_aspect_ratio=f"anyres_max_{MergeRules.from_config(config).max_crops}",
            video_token="<video>",
            video_processor=None,
        )
    else:
        values.update(patch_size=tower.config.patch_size, num_additional_image_tokens=class_tokens)
    images = image_processor(path, config, tower, form)
    return processor_class(form)(image_processor=images, tokenizer=tokenizer, chat_template=template, **values)


def processor_class(form: Format):
    """transformers' processor class of a model; OneVision's here does without its video half.

    That half exists with torchvision only, and without it the class refuses to be made at all.
    """
    base = form.load("Processor")
    if form.model_type != "llava_onevision":
        return base

    from llava.model.stock import RefusesVideos

    class Processor(RefusesVideos, base):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    Processor.__name__ = base.__name__  # it is saved under this name
    return Processor


def save_processor(processor, form: Format, folder: str) -> None:
    """Write processor_config.json, preprocessor_config.json and chat_template.jinja.

    Older versions of transformers, and the servers, read the image processor from preprocessor_config.json.
    """
    from llava.tools.hf import tokens

    tokenizer = processor.tokenizer
    values = processor.to_dict()
    values.pop("tokenizer", None)
    values.pop("chat_template", None)
    values["image_processor"] = images = processor.image_processor.to_dict()
    if form.model_type == "llava_onevision":
        keys = ("size", "image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")
        values["video_processor"] = {
            **{key: images[key] for key in (*keys, "do_resize", "do_convert_rgb") if key in images},
            "do_sample_frames": False,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        }
        _write(folder, "video_preprocessor_config.json", values["video_processor"])
    values["processor_class"] = form.stem + "Processor"
    _write(folder, "processor_config.json", values)
    _write(folder, "preprocessor_config.json", {**images, "processor_class": values["processor_class"]})
    if processor.chat_template:
        with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as file:
            file.write(processor.chat_template)
    tokens.save(tokenizer, folder)


def _write(folder: str, name: str, values: dict) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, sort_keys=True, default=_plain)
        file.write("\n")


def _plain(value):
    """What JSON takes, of sizes and enumerations."""
    return dict(value) if hasattr(value, "items") else getattr(value, "value", str(value))


def load_processor(path: str):
    """The processor of a transformers folder, with Pillow for the images, whatever is installed.

    Where torchvision is missing AutoProcessor cannot load OneVision's, whose video half needs it; the image half is
    loaded alone then.

    Raises:
        LlavaError: no processor there, or one of another model.
    """
    from transformers import AutoProcessor, AutoTokenizer

    form = _form_of(path)
    try:
        images = form.load("ImageProcessorPil").from_pretrained(path)
        if form.model_type == "llava_onevision":
            found = processor_class(form)
            values = found.get_processor_dict(path)[0]
            known = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio")
            return found(
                image_processor=images,
                tokenizer=AutoTokenizer.from_pretrained(path),
                video_processor=None,
                chat_template=_chat_template(path),
                **{key: values[key] for key in known if key in values},
            )
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise LlavaError(f"{path}: no processor that transformers loads ({str(error).splitlines()[0][:160]})") from None
    processor.image_processor = images
    return processor


def _form_of(path: str) -> Format:
    from llava.model.builder import read_config

    model_type = read_config(path).get("model_type")
    if model_type not in FORMATS:
        raise LlavaError(f"{path}: found model_type {model_type!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[model_type]


def _chat_template(path: str) -> str | None:
    """From chat_template.jinja, or from the older chat_template.json."""
    jinja, older = (os.path.join(path, f"chat_template.{ending}") for ending in ("jinja", "json"))
    if os.path.isfile(jinja):
        with open(jinja, encoding="utf-8") as file:
            return file.read()
    if os.path.isfile(older):
        with open(older, encoding="utf-8") as file:
            return json.load(file)["chat_template"]
    return None
