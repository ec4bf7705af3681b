"""How a LLaVA model is read from a checkpoint and written to one: its weights and what belongs to its vision half."""

from llava.errors import LlavaError
from llava.model.foreign import refuse_foreign
from llava.model.loading import check_loaded, check_shapes, without_report
from llava.model.multimodal_encoder.trust import naming
from llava.model.places import HUB_OPTIONS, read_config
from llava.utils import rank0_print


class LlavaLoading:
    """Mixin of `LlavaMetaForCausalLM`: `from_pretrained` and `save_pretrained`."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, vision_tower=None, **kwargs):
        """As transformers'; a tower whose weights the checkpoint does not hold is loaded from its own source.

        vision_tower: the class of your own that the checkpoint's tower is of; see `load_pretrained_model`.
        output_loading_info: also return what transformers found, and leave it to the caller to judge; a projector's
            weights may be about to come from another file.

        Raises:
            LlavaError: no such checkpoint, one in another format, or weights that are missing or have other shapes.
        """
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        if kwargs.get("config") is None and kwargs.get("state_dict") is None:
            refuse_foreign(read_config(source, **{k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}), source)
        ignored = kwargs.pop("ignore_mismatched_sizes", output_loading_info)
        with naming(vision_tower), without_report():
            model, info = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
            if not ignored:
                check_shapes(info["mismatched_keys"], source)
            model._complete_vision(set(info["missing_keys"]))
        if output_loading_info:
            return model, info
        new = check_loaded(model, info, source)
        if new:
            rank0_print(f"note: {source}: holds no {', '.join(new[:3])}{', ...' if len(new) > 3 else ''}: new, random")
        return model

    def _complete_vision(self, missing: set[str]):
        model, tower = self.get_model(), self.get_vision_tower()
        if tower is None:
            return
        lacking = {key for key in missing if key.startswith("model.vision_tower.vision_tower.")}
        if lacking:
            total = sum(1 for _ in tower.vision_tower.parameters())
            if len(lacking) < total:  # the source's weights in place of trained ones would go unnoticed
                raise LlavaError(
                    f"{self.config._name_or_path}: the checkpoint lacks {len(lacking)} of its vision tower's {total} "
                    f"weights, {min(lacking)} for one"
                )
            tower.load_model()
            tower.to(device=self.device, dtype=self.dtype)
        tower.reset_buffers()
        tower.is_loaded = True
        if any(key.startswith("model.vision_tower.token_compressor.") for key in missing):
            tower.token_compressor.reset_parameters()  # what transformers leaves in missing weights is no start
        if "model.image_newline" in missing:
            model.reset_newline()
        model.describe_vision()

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As transformers'; the image processor is saved too, so that the folder is complete."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and self.get_vision_tower() is not None:
            self.get_vision_tower().image_processor.save_pretrained(save_directory)
