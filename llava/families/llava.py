"""LLaVA: a vision tower and a projector in front of a language model, images merged into the text by the model."""

from types import SimpleNamespace

from llava.errors import LlavaError
from llava.families.base import Family, Length, Loaded, Turns, device_and_dtype, left_padded


class Llava(Family):
    name = "llava"
    parts = {  # noqa: RUF012
        "mm_token_compressor": ("model.vision_tower.token_compressor.",),
        "mm_vision_tower": ("model.vision_tower.",),
        "mm_mlp_adapter": ("model.mm_projector.",),
        "mm_language_model": ("",),  # and the newline token, as in LLaVA-NeXT
    }
    keeps_projector_alone = chooses_template = True
    returns_prompt = False  # it generates from embeddings

    @property
    def model_types(self) -> tuple[str, ...]:
        from llava.model.families import LLAVA_TYPES, PLAIN_TYPES

        return (*PLAIN_TYPES, *LLAVA_TYPES)

    # --- settings ---

    def check(self, run) -> None:
        from llava.conversation import get_template
        from llava.data.turns import check_system_turn
        from llava.model.vision_settings import check_combination, check_merge_options

        super().check(run)
        get_template(run["version"])
        check_system_turn(run["version"], run["system_turn"])
        if run["neftune_noise_alpha"] and run["vision_tower"]:
            raise LlavaError(
                f"{run.source('neftune_noise_alpha')}: neftune_noise_alpha is {run['neftune_noise_alpha']}, expected "
                "none or 0: the texts of a batch are embedded in one row, whose length the noise would be scaled by"
            )
        check_merge_options(run["mm_patch_merge_type"], run["image_aspect_ratio"])
        check_combination(SimpleNamespace(**{name: run[name] for name in run.settings}))

    def check_fit(self, run):
        from llava.families.llava_settings import check_fit

        return check_fit(run)

    def check_media(self, run, kinds) -> None:
        from llava.families.llava_settings import check_media

        check_media(run, kinds)

    # --- models ---

    def load(self, path, *, base=None, dtype=None, device=None, **overrides) -> Loaded:
        """As the contract; `overrides` are `load_pretrained_model`'s."""
        from llava.data.preprocess import Preprocessor
        from llava.model.builder import context_limit, load_pretrained_model
        from llava.utils import get_model_name_from_path

        name, (device, dtype) = get_model_name_from_path(path), device_and_dtype(device, dtype)
        tokenizer, model, image_processor, _ = load_pretrained_model(
            path, base, name, device_map=str(device), torch_dtype=dtype, **overrides
        )
        limit, template = context_limit(model.config), model.config.conversation_template
        count = image_processor and model.visual_token_counter()
        system_turn = getattr(model.config, "system_turn", None)
        preprocessor = Preprocessor(tokenizer, template, system_turn=system_turn or "template")
        return Loaded(model, tokenizer, tokenizer, image_processor, limit, template, count, preprocessor, system_turn)

    def prepare(self, model_args, data_args, training_args):
        from llava.data.dataset import SampleArgs
        from llava.data.preprocess import Preprocessor, resolve_supervise
        from llava.families.llava_training import load_model
        from llava.model.adaptive_patches import PatchChoice
        from llava.model.visual_merge import native_resolution

        version = model_args.version
        supervise = resolve_supervise(version, data_args.supervise)
        model, tokenizer = load_model(model_args, data_args, training_args)
        tower, limit = model.get_vision_tower(), training_args.model_max_length
        choice = PatchChoice.from_mapping(model_args.adaptive_patches)
        args = SampleArgs.from_args(
            data_args,
            native_resolution=None if tower is None else native_resolution(model.config),
            model_max_length=limit,
            patch_choice=choice if choice and choice.draws else None,
            seed=training_args.seed,
        )
        image_processor, count = (tower.image_processor, model.visual_token_counter()) if tower else (None, None)
        wrapped, system_turn = model_args.mm_use_im_start_end, args.system_turn
        preprocessor = Preprocessor(tokenizer, version, supervise, wrapped, system_turn)
        loaded = Loaded(model, tokenizer, tokenizer, image_processor, limit, version, count, preprocessor, system_turn)
        return loaded, args

    def answer_states(self, inputs, counts, loaded):
        import torch

        from llava.constants import IGNORE_INDEX

        ids, mask, model = inputs["input_ids"], inputs["attention_mask"], loaded.model
        labels = torch.full_like(ids, IGNORE_INDEX)
        for label, row, count in zip(labels, ids, counts, strict=True):  # the padding is on the left
            label[len(label) - count :] = row[len(row) - count :]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        media = inputs.get("images", []), inputs.get("modalities", ()), inputs.get("image_sizes")
        _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids, positions, mask, None, labels, *media
        )
        text = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        hidden = model.get_model()(**text, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        scored = labels[:, 1:] != IGNORE_INDEX
        if scored.sum(dim=1).tolist() != counts:
            raise LlavaError(f"found an answer that ends beyond the model's context of {loaded.context} tokens")
        return hidden[:, :-1][scored.to(hidden.device)]

    # --- samples ---

    def record_template(self, model_args):
        return model_args.version

    def refused_media(self, model_args):
        blind = model_args.vision_tower is None
        return {kind: f"found {kind}, but vision_tower is not set" for kind in ("image", "video") if blind}

    def sample(self, record, loaded, args, at=(0, 0)):
        """As the contract, with -200 for an image in `input_ids`; where the record has some, also `images` (list of
        [3, H, W], or [n, 3, H, W] for crops and frames), `image_sizes` (list of (width, height)), `modalities` (list of
        "image" or "video"), where it is drawn `patch_alphas`, and where patches are chosen `patch_levels`, so that the
        model need not choose again."""
        import torch

        from llava.data.dataset import fit, read_media
        from llava.images.processing import process_pictures

        media, limit = read_media(record, args), args.model_max_length
        images = process_pictures(media.pictures, loaded.image_processor, args.pixels, media.paths)
        encoded = loaded.preprocessor.encode(media.conversation, has_image=media.kind is not None)
        count, pairs = loaded.count_visual_tokens, list(zip(images, media.sizes, strict=True))
        sizes = [count(image.shape, size, media.kind) for image, size in pairs]
        # where they depend on what an image shows, that is the most that they can be
        if limit is not None and count and count.chooser and len(encoded.ids) - len(sizes) + sum(sizes) > limit:
            sizes = [count.of_pixels(image, size, media.kind) for image, size in pairs]
        ids, labels, kept, cut = fit(encoded, sizes, limit, whole_images=False)
        sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "truncated": cut}
        if kept:
            sample.update(images=images[:kept], image_sizes=media.sizes[:kept], modalities=[media.kind] * kept)
            if args.patch_choice is not None:
                sample["patch_alphas"] = [args.patch_choice.draw(args.seed, *at, number) for number in range(kept)]
            if count and count.chooser:
                alphas = sample.get("patch_alphas", [None] * kept)
                sample["patch_levels"] = [
                    None if media.kind == "video" else count.chooser.levels_of(image, alpha)
                    for image, alpha in zip(images, alphas, strict=False)
                ]
        return sample

    def collate(self, samples, loaded, args):
        from llava.data.collator import DataCollatorForSupervisedDataset

        return DataCollatorForSupervisedDataset(loaded.tokenizer.pad_token_id or 0, args.pack_sequences)(samples)

    def batch_sizes(self, batch, model):
        from llava.families.batch_sizes import merged_sizes

        return merged_sizes(batch, model)

    def length(self, record, sizes, loaded, args, frames=None) -> Length:
        from llava.data.paths import shown_media
        from llava.images.processing import pixel_shape

        kind, names = shown_media(record, args.add_time_instruction)
        sizes = sizes if names else []
        ids, _ = loaded.preprocessor(record["conversations"], has_image=kind is not None)
        count = loaded.count_visual_tokens
        shapes = [pixel_shape(size, loaded.image_processor, args.pixels, len(sizes)) for size in sizes]
        if kind == "video":
            taken = max(args.frames_upbound, 1) if frames is None else frames
            # a clip has no crops: each frame is as a whole picture that is resized
            shapes = [(taken, *shape[-3:]) for shape in shapes]
        visual = [count(shape, size, kind) for shape, size in zip(shapes, sizes, strict=True)]
        patches = sum(count.patches(shape) for shape in shapes)
        # what is kept of a picture's patches depends on what it shows; a clip keeps all of them
        exact = not sizes or (frames is not None if kind == "video" else count.chooser is None)
        return Length(len(ids) - len(sizes) + sum(visual), patches, exact)

    def text_encoder(self, loaded):
        return loaded.preprocessor.encoder

    # --- what a model's files say, without its weights ---

    def geometry(self, path, run=None, **options):
        from llava.families.llava_geometry import geometry

        return geometry(path, run, **options)

    def load_text(self, path, run=None):
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN
        from llava.model.builder import context_limit, load_tokenizer, read_config
        from llava.model.families import LANGUAGE_MODELS, resolve_architecture

        config = {} if run else read_config(path)
        limit = run["model_max_length"] if run else context_limit(SimpleNamespace(**config))
        template = run["version"] if run else config.get("conversation_template")
        system_turn = run["system_turn"] if run else config.get("system_turn")
        template = template or LANGUAGE_MODELS[resolve_architecture(config, path)].template
        wrapped = run["mm_use_im_start_end"] if run else config.get("mm_use_im_start_end", False)
        tokenizer = load_tokenizer(path)
        if wrapped:
            tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        model = SimpleNamespace(config=SimpleNamespace(mm_use_im_start_end=wrapped))
        return Loaded(model, tokenizer, tokenizer, None, limit, template, system_turn=system_turn)

    # --- prompts and answers ---

    def prompt_text(self, turns: Turns, loaded: Loaded, *, answer=None, images=True) -> str:
        from llava.conversation import get_template
        from llava.data.turns import place_image

        conversation = get_template(loaded.template)
        if turns and turns[0][0] == "system" and loaded.system_turn == "record" and conversation.takes_system:
            conversation = conversation.with_system(turns[0][1])
        human, gpt = conversation.roles
        wrapped = bool(getattr(loaded.model.config, "mm_use_im_start_end", False))
        for speaker, text in turns:
            if speaker == "human" and images:
                text = place_image(text, "mmtag" in conversation.version, wrapped)
            if speaker != "system":  # the templates have system texts of their own
                conversation.append_message(human if speaker == "human" else gpt, text)
        conversation.append_message(gpt, answer)
        if answer is None:
            return conversation.get_prompt()
        *before, last = conversation.turns()
        end = last.text.index(answer, last.answer_start) + len(answer)
        return "".join(piece.text for piece in before) + last.text[:end]

    def tokens(self, text, loaded, *, images=True):
        from llava.text_encoding import text_ids, tokenizer_image_token

        return tokenizer_image_token(text, loaded.tokenizer) if images else list(text_ids(loaded.tokenizer, text))

    def stops(self, loaded):
        """The tokenizer's token and the template's; separators that are no token, such as v0's `###`, as text."""
        from llava.conversation import get_template, stop_strings

        template = get_template(loaded.template)
        special = getattr(loaded.tokenizer, "added_tokens_encoder", {})
        ids = {loaded.tokenizer.eos_token_id, *(template.stop_token_ids or ())}
        ids |= {special[text] for text in stop_strings(template) if text in special}
        return sorted(ids - {None}), [text for text in stop_strings(template) if text not in special]

    def inputs(self, prompts, pictures, loaded):
        from llava.images.processing import picture_size

        inputs = left_padded(prompts, loaded)
        if flat := [picture for row in pictures for picture in row]:
            inputs["images"] = [pixels for row in pictures for pixels in self._pixels(row, loaded)]
            inputs["image_sizes"] = [picture_size(picture) for picture in flat]
            inputs["modalities"] = ["video" if isinstance(picture, list) else "image" for picture in flat]
        return inputs

    def _pixels(self, pictures: list, loaded: Loaded) -> list:
        """Of one prompt, in the dtype the model takes, on its device."""
        import torch

        from llava.images.processing import process_pictures
        from llava.model.visual_merge import pixel_options

        if pictures and loaded.image_processor is None:
            raise LlavaError("the model has no vision tower, expected a prompt without pictures")
        model = loaded.model
        made = process_pictures(pictures, loaded.image_processor, pixel_options(model.config))
        dtype = torch.float32 if self.float32_inputs(model) else model.dtype
        return [values.to(model.device, dtype) for values in made]

    def squares_several(self, loaded):
        return getattr(loaded.model.config, "image_aspect_ratio", None) != "native"

    def sequence_length(self, inputs, loaded):
        from llava.constants import IMAGE_TOKEN_INDEX

        text = int((inputs["input_ids"] != IMAGE_TOKEN_INDEX).sum())
        return text, sum(tokens for _, tokens in self.picture_tokens(inputs, loaded))

    def picture_tokens(self, inputs, loaded):
        if not inputs.get("images"):
            return []
        count = loaded.model.visual_token_counter()
        media = zip(inputs["images"], inputs["image_sizes"], inputs["modalities"], strict=True)
        return [
            (count.patches(pixels.shape, None if kind == "video" else pixels), count.of_pixels(pixels, size, kind))
            for pixels, size, kind in media
        ]

    def image_flops(self, loaded):
        from llava.families.llava_layout import empty_tower
        from llava.model.multimodal_encoder.flops import image_flops
        from llava.model.multimodal_encoder.trust import naming

        tower = loaded.model.get_vision_tower()
        if tower is None:
            return 0.0
        with naming(getattr(tower, "own_class", None)):  # built anew on the meta device; it runs here already
            return float(image_flops(empty_tower(SimpleNamespace(**loaded.model.config.to_dict()))))

    def choose_patches(self, loaded, choice):
        config, tower = loaded.model.config, loaded.model.get_vision_tower()
        if tower is None:
            return super().choose_patches(loaded, choice)
        config.adaptive_patches = None if choice is None else choice.to_mapping()
        tower.set_patch_choice(config)

    def patch_choice(self, loaded):
        from llava.model.adaptive_patches import PatchChoice

        return PatchChoice.from_mapping(getattr(loaded.model.config, "adaptive_patches", None))

    # --- hooks of the trainer ---

    def unused_modules(self, model):
        tower = model.get_vision_tower()
        return () if tower is None else tower.unused_modules()

    def vision_blocks(self, model):
        tower = model.get_vision_tower()
        return (None, []) if tower is None else (tower.vision_tower, tower.blocks())

    def float32_inputs(self, model):
        """Patches are chosen by grey levels, of which bfloat16 cannot tell neighbours apart."""
        tower = model.get_vision_tower()
        return () if tower is None or tower.patch_chooser is None else ("images",)

    def check_precision(self, model, precision):
        import torch

        from llava.model.multimodal_encoder.trial import check_dtype
        from llava.utils import rank0_print

        tower = model.get_vision_tower()
        own = getattr(tower, "own_class", None)
        if own is None or precision.frozen == torch.float32:
            return
        try:
            check_dtype(tower, f"vision tower {own}", precision.frozen)
        except LlavaError as error:
            if tower.dtype == precision.frozen:
                raise
            rank0_print(f"warning: {error}; autocast covers that in this run, not where the model is used")

    def on_prepared(self, model):
        model.announce_newline()

    def on_save(self, model, processor, folder):
        super().on_save(model, processor, folder)
        if model.get_vision_tower() is not None:
            model.get_vision_tower().image_processor.save_pretrained(folder)
