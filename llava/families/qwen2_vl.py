"""Qwen2-VL and Qwen2.5-VL, with adaptive patches: a vision encoder of their own, one token for each 2x2 patches.

Their prompts have `<|vision_start|>`, a `<|image_pad|>` for each token of the image and `<|vision_end|>` where LLaVA
has `<image>`; here too that is IMAGE_TOKEN_INDEX until the images are known.
"""

from types import SimpleNamespace

from llava.config.keys import PATCH_KEYS
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.families.base import Family, Length, Loaded, device_and_dtype, left_padded
from llava.families.qwen_batches import QwenBatches
from llava.families.qwen_chat import IMAGE_TOKENS, PAD, QwenChat
from llava.utils import rank0_print

_KEYS = {
    *("model_name_or_path", "mm_tunable_parts", "freeze_backbone", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
    *("unfreeze_language_model", "delay_load", "data_path", "image_folder", "allow_absolute_paths", "lazy_preprocess"),
    *("is_multimodal", "early_mix_text", "min_pixels", "max_pixels", "supervise", "system_turn"),
    *("pack_sequences", "pack_length", "pack_scope", "pack_buffer", "pack_seed"),
}
_SIZES = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))  # pixels, whatever the names say


class Qwen2VL(QwenChat, QwenBatches, Family):
    name, title = "qwen2_vl", "Qwen2-VL"
    model_types = ("qwen2_vl",)
    parts = {  # noqa: RUF012
        "mm_mlp_adapter": ("model.visual.merger.",),
        "mm_vision_tower": ("model.visual.",),
        "mm_language_model": ("",),
    }
    keys = frozenset({*_KEYS, *PATCH_KEYS, "adaptive_patches"})
    refused = {"mm_token_compressor_lr": "there is no token compressor"}  # noqa: RUF012
    order_by_seed = True
    system: str | None = "You are a helpful assistant."  # where a conversation has none of its own

    @property
    def no_such_key(self) -> str:
        return f"{self.title} has a vision encoder, projector, chat template and image sizes of its own"

    def classes(self) -> tuple:
        """(model class, processor class)."""
        from llava.model import qwen2_vl as models

        return models.AdaptiveQwen2VLForConditionalGeneration, models.AdaptiveQwen2VLProcessor

    # --- settings ---

    def check(self, run) -> None:
        if run.tower is not None:
            raise LlavaError(f"tower {run.tower}: {self.title} has its own vision encoder, expected no tower config")
        super().check(run)
        if run["supervise"] == "llava_next":
            raise LlavaError(f"supervise: found llava_next, expected answers_only ({self.title} has no other)")
        if "mm_token_compressor" in (run["mm_tunable_parts"] or ""):
            raise LlavaError(f"mm_tunable_parts: names mm_token_compressor, which {self.title} does not have")

    def check_fit(self, run):
        from llava.families.settings import check_packs, check_parts, check_tower_part, trained_parts
        from llava.model.builder import read_config

        origins = super().check_fit(run)
        self._check_type(run["model_name_or_path"])
        config = read_config(run["model_name_or_path"])
        check_packs(run, config)
        check_tower_part(run, (config.get("vision_config") or {}).get("depth"))
        check_parts(trained_parts(run), set(self.parts))
        processor = self.load_processor(run["model_name_or_path"], cache_dir=run["cache_dir"])
        self.set_run_images(processor.image_processor, run, run["model_name_or_path"])
        self.check_chat_template(processor, run["model_name_or_path"])
        return origins

    # --- models ---

    def load(
        self,
        path,
        *,
        base=None,
        dtype=None,
        device=None,
        load_8bit=False,
        load_4bit=False,
        vision_tower=None,
        trust_remote_code=False,  # there is none that it would run
        **overrides,
    ):
        """As the contract; `overrides` are `from_pretrained`'s."""
        from llava.model.builder import (
            base_of_adapter,
            best_attention,
            load_weights,
            pick_dtype,
            quantisation,
            read_config,
        )
        from llava.model.lora import is_lora, load_lora

        if vision_tower is not None:
            raise LlavaError(f"vision_tower: found {vision_tower}, but {path} is a {self.title} with its own encoder")
        adapted = is_lora(path)
        if not adapted and base is not None:
            raise LlavaError(f"model-base: {path} is no LoRA adapter, expected no base")
        source = base_of_adapter(path, base) if adapted else path
        self._check_type(source)
        device, dtype = device_and_dtype(device, dtype)
        on_cpu = device.type == "cpu"
        dtype = pick_dtype(dtype, on_cpu)
        if load_8bit or load_4bit:
            overrides["quantization_config"] = quantisation("load_8bit/load_4bit", 4 if load_4bit else 8)
            overrides["device_map"] = device
        attention = overrides.pop("attn_implementation", None) or best_attention(dtype, on_cpu)
        model = load_weights(
            self.classes()[0], source, with_projector=True, dtype=dtype, attn_implementation=attention, **overrides
        )[0]
        if adapted:
            model = load_lora(model, path)
            model = model if load_8bit or load_4bit else model.merge_and_unload()
            model.config.system_turn = read_config(path).get("system_turn")
        if "device_map" not in overrides:
            model = model.to(device)
        return self._loaded(model.eval(), self.load_processor(path))

    def load_processor(self, path: str, **kwargs):
        """The processor of a folder or hub id; `kwargs` as its `from_pretrained`.

        Raises:
            LlavaError: a file is missing, or the tokenizer lacks the image tokens.
        """
        self._check_type(path)
        try:
            processor = self.classes()[1].from_pretrained(path, **kwargs)
        except (OSError, ValueError) as error:
            raise LlavaError(f"{path}: no processor ({str(error).splitlines()[0][:160]})") from None
        tokenizer = processor.tokenizer
        lacking = [token for token in IMAGE_TOKENS if token not in tokenizer.get_vocab()]
        if lacking:
            raise LlavaError(f"{path}: its tokenizer lacks {', '.join(lacking)}, expected {self.title}'s")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    def _check_type(self, path: str) -> None:
        from llava.model.builder import read_config

        found = read_config(path).get("model_type")
        if found not in self.model_types:
            raise LlavaError(f"{path}: found model_type {found!r}, expected {' or '.join(map(repr, self.model_types))}")

    def _loaded(self, model, processor, limit: int | None = None, system_turn: str | None = None) -> Loaded:
        from llava.model.builder import context_length

        limit = limit or context_length(model.config.get_text_config())
        images, system_turn = processor.image_processor, system_turn or getattr(model.config, "system_turn", None)
        return Loaded(model, processor, processor.tokenizer, images, limit, "qwen_1_5", system_turn=system_turn)

    def prepare(self, model_args, data_args, training_args):
        from llava.data.dataset import SampleArgs
        from llava.families.precision import Precision
        from llava.families.training import attention_for, check_no_adapter, quantisation_for, tunable_parts
        from llava.model.builder import load_weights
        from llava.model.generation import generation_settings

        path, limit = model_args.model_name_or_path, training_args.model_max_length
        check_no_adapter(path)
        processor, choice = self.make_processor(path, training_args)
        self.check_chat_template(processor, path)
        args = SampleArgs.from_args(data_args, model_max_length=limit, patch_choice=choice, seed=training_args.seed)
        model = load_weights(
            self.classes()[0],
            path,
            with_projector=True,
            dtype=Precision.of(training_args).to_load(training_args, tunable_parts(model_args, training_args)),
            attn_implementation=attention_for(training_args, packed=args.pack_sequences),
            cache_dir=training_args.cache_dir,
            quantization_config=quantisation_for(training_args),
            generation_config=generation_settings(path, training_args.cache_dir),
        )[0]
        model.config.get_text_config().use_cache = False
        model.config.system_turn = data_args.system_turn
        return self._loaded(model, processor, limit), args

    def make_processor(self, path: str, training_args):
        """The model's processor with the run's sizes and selection, and what alpha is drawn from, or None.

        The image processor, which is saved with the model, has the middle of such a range.
        """
        processor = self.load_processor(path, cache_dir=training_args.cache_dir)
        processor.tokenizer.model_max_length = training_args.model_max_length
        processor.tokenizer.padding_side = "right"
        images, settings = processor.image_processor, training_args.run_config
        choice = self.set_run_images(images, settings, path)
        saved = f" (saved: {choice.middle})" if choice and choice.draws else ""
        rank0_print(f"patches: {choice.description + saved if choice else 'all'}")
        return processor, choice if choice and choice.draws else None

    def set_run_images(self, images, settings, path: str):
        """Give the image processor of `path` the run's sizes and the run's choice of patches, which is returned."""
        given = {side: settings[key] for side, key in _SIZES if settings.source(key) != "default"}
        images.size = {**dict(images.size), **given}
        if images.size["shortest_edge"] > images.size["longest_edge"]:
            raise LlavaError(
                f"min_pixels and max_pixels: found {images.size['shortest_edge']} and {images.size['longest_edge']} "
                f"(keys, or the image processor of {path}), expected the first not above the second"
            )
        return self.set_run_choice(images, settings)

    def set_run_choice(self, images, settings):
        """Let the image processor choose patches as the run says; returns the choice, None for all patches."""
        from llava.config.checks import patch_names

        if settings.source("adaptive_patches") == "default":
            choice = images.adaptive_patches
        else:
            choice = images.completed(settings["adaptive_patches"] or {"method": "all"}, patch_names(settings))
        images.adaptive_patches = choice
        return choice

    def answer_states(self, inputs, counts, loaded):
        import torch

        if inputs["input_ids"].shape[1] > loaded.context:
            raise LlavaError(f"found an answer that ends beyond the model's context of {loaded.context} tokens")
        hidden = loaded.model.model(**inputs, use_cache=False)[0]
        length = hidden.shape[1]  # rows are padded on the left
        return torch.cat([row[length - 1 - count : length - 1] for row, count in zip(hidden, counts, strict=True)])

    # --- samples ---

    def refused_media(self, model_args):
        return {"video": f"found a video, expected images or text ({self.title}'s training)"}

    def sample(self, record, loaded, args, at=(0, 0)):
        """As the contract; where the record has images, also what the image processor makes of them: `pixel_values`,
        `image_grid_thw` and, if patches are chosen, `image_patch_levels`."""
        import torch

        from llava.data.dataset import fit, read_media

        media = read_media(record, args)
        encoded = self.encode(media.conversation, loaded, media.kind is not None)
        images = []
        for number, (picture, path) in enumerate(zip(media.pictures, media.paths, strict=True)):
            drawn = {} if args.patch_choice is None else {"alpha": args.patch_choice.draw(args.seed, *at, number)}
            images.append(self._process(picture, loaded, f" {path}", **drawn))
        counts = [self.picture_tokens(image, loaded)[0][1] for image in images]
        sizes = [count + 2 for count in counts]  # an image stands between two marks
        ids, labels, kept, cut = fit(encoded, sizes, args.model_max_length, whole_images=True)
        ids, labels = _expand(ids, labels, counts, loaded.tokenizer)
        sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "truncated": cut}
        return sample | _joined(images[:kept])

    def _process(self, picture, loaded: Loaded, which: str = "", **settings) -> dict:
        """What the image processor makes of one picture."""
        try:
            return dict(loaded.image_processor(images=[picture], return_tensors="pt", **settings))
        except ValueError as error:  # sizes such as 2000 x 5 that no processor takes
            reason = f"image{which}: found {picture.width}x{picture.height} pixels that cannot be processed"
            raise LlavaError(f"{reason} ({error})") from None

    def visual_token(self, loaded):
        return loaded.tokenizer.convert_tokens_to_ids(PAD)

    def length(self, record, sizes, loaded, args, frames=None) -> Length:
        from llava.data.paths import shown_media

        kind, names = shown_media(record)
        images, sizes = loaded.image_processor, sizes if names else []
        try:
            grids = [images.get_number_of_image_patches(height, width, {}) for width, height in sizes]
        except ValueError as error:  # as `sample` would say
            raise LlavaError(f"image: found sizes {sizes} that cannot be processed ({error})") from None
        ids = self.encode(record["conversations"], loaded, kind is not None).ids
        merge = images.merge_size**2
        tokens = len(ids) - len(sizes) + sum(patches // merge + 2 for patches in grids)
        chosen = self.patch_choice(loaded) is not None or args.patch_choice is not None
        return Length(tokens, sum(grids), not sizes or not chosen)

    # --- what a model's files say, without its weights ---

    def geometry(self, path, run=None, **options):
        from llava.families.geometry import RowGeometry
        from llava.model.qwen2_vl.image_processing import load_image_processor

        for name in options:
            raise LlavaError(f"--{name}: {self.title} has image sizes of its own, expected no --{name}")
        if run is not None:
            self.check(run)
        images, published = load_image_processor(path)
        choice = images.adaptive_patches if run is None else self.set_run_images(images, run, path)
        source = path if run is None else run.config or "the command line"
        layout = f"{self.title}'s own encoder, patch {images.patch_size} px"
        return RowGeometry.of(
            images,
            source=source + (f"; image processor as published for {path}" if published else ""),
            layout=layout + (f"; adaptive patches ({choice.description})" if choice else ""),
            choice=choice,
            marks=IMAGE_TOKENS[::2],
        )

    def load_text(self, path, run=None):
        from transformers import AutoConfig

        processor = self.load_processor(path)
        model = None if run else SimpleNamespace(config=AutoConfig.from_pretrained(path))
        limit, system_turn = (run["model_max_length"], run["system_turn"]) if run else (None, None)
        return self._loaded(model, processor, limit, system_turn)

    # --- prompts and answers ---

    def inputs(self, prompts, pictures, loaded):
        flat = [picture for row in pictures for picture in row]
        if any(isinstance(picture, list) for picture in flat):
            raise LlavaError(f"video: found a clip, expected images or text ({self.title})")
        images = [self._process(picture, loaded) for picture in flat]
        left = iter([self.picture_tokens(image, loaded)[0][1] for image in images])
        counts = [[next(left) for _ in range(prompt.count(IMAGE_TOKEN_INDEX))] for prompt in prompts]
        rows = [_expand(row, row, sizes, loaded.tokenizer)[0] for row, sizes in zip(prompts, counts, strict=True)]
        inputs = left_padded(rows, loaded)
        kinds = (inputs["input_ids"] == self.visual_token(loaded)).long()
        shown = {key: value.to(loaded.model.device) for key, value in _joined(images).items()}
        return {**inputs, "mm_token_type_ids": kinds, **shown}

    def sequence_length(self, inputs, loaded):
        visual = int(inputs["mm_token_type_ids"].sum())
        return int(inputs["attention_mask"].sum()) - visual, visual

    def picture_tokens(self, inputs, loaded):
        if "image_patch_levels" in inputs:
            from llava.model.qwen2_vl.layout import token_counts

            return token_counts(inputs["image_patch_levels"], inputs["image_grid_thw"])
        sizes = [] if "image_grid_thw" not in inputs else inputs["image_grid_thw"].prod(1).tolist()
        return [(size, size // loaded.image_processor.merge_size**2) for size in sizes]

    def choose_patches(self, loaded, choice):
        loaded.image_processor.adaptive_patches = choice

    def patch_choice(self, loaded):
        return loaded.image_processor.adaptive_patches

    # --- hooks of the trainer ---

    def vision_blocks(self, model):
        from llava.model.vision_blocks import find_blocks

        encoder = next(module for name, module in model.named_modules() if name.endswith("model.visual"))
        return encoder, find_blocks(encoder)

    def restore(self, model, checkpoint):
        """Its files have older names, which transformers' `Trainer` does not translate: it would go on with the weights
        that the run began with."""
        model.load_state_dict(self._saved(model, checkpoint).state_dict())
        return True

    def saved_weights(self, model, checkpoint):
        for name, value in self._saved(model, checkpoint).named_parameters():
            yield name, value.detach

    def _saved(self, model, checkpoint):
        import torch

        from llava.model.builder import load_weights

        # of its dtypes, trained and frozen weights', float32 holds every value
        return load_weights(type(model), checkpoint, with_projector=True, dtype=torch.float32)[0]


class Qwen2_5_VL(Qwen2VL):
    """As Qwen2-VL, with windows in its vision encoder."""

    name, title = "qwen2_5_vl", "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)

    def classes(self):
        from llava.model import qwen2_vl as models

        return models.AdaptiveQwen2_5_VLForConditionalGeneration, models.AdaptiveQwen2_5_VLProcessor


def _expand(ids: list[int], labels: list[int], counts: list[int], tokenizer) -> tuple[list[int], list[int]]:
    """Every -200 as the tokens of its image, between the two marks."""
    start, pad, end = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    left = iter(counts)
    new_ids: list[int] = []
    new_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        image = [start, *[pad] * next(left), end] if token == IMAGE_TOKEN_INDEX else None
        new_ids += image or [token]
        new_labels += [IGNORE_INDEX] * len(image) if image else [label]
    return new_ids, new_labels


def _joined(images: list[dict]) -> dict:
    """Several processed images in one; nothing of none."""
    import torch

    return {key: torch.cat([image[key] for image in images]) for key in images[0]} if images else {}
