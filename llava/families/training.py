"""What the families share where they prepare a model to train; `training_args` is a run's `TrainingArguments`."""

import contextlib

from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.families.precision import Precision
from llava.model.builder import best_attention, quantisation
from llava.model.checkpoint import check_whole
from llava.model.host import keeps_samples_apart
from llava.model.lora import is_lora
from llava.model.multimodal_encoder.builder import uses_compression


def check_attention(asked: str | None) -> None:
    """Refuse an `attn_implementation` that transformers does not know."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if asked is not None and asked not in known and "/" not in asked:  # with a slash: a kernel on the hub
        raise LlavaError(f"attn_implementation: found {asked!r}, expected one of {', '.join(known)}")


def attention_for(training_args, config=None, packed: bool = False) -> str:
    """The attention that the run asks for, else the best available.

    Args:
        config: the model's.
        packed: whether samples are packed into rows; then one that keeps them apart, "varlen" where there is no
            flash-attn.

    Raises:
        LlavaError: an attention that is not known, leaves out a soft cap of the model, or would let packed samples see
            each other.
    """
    asked = training_args.attn_implementation
    check_attention(asked)
    dtype, on_cpu = Precision.of(training_args).frozen, training_args.device.type == "cpu"
    best = best_attention(dtype, on_cpu, config, asked)
    if not packed or keeps_samples_apart(best):
        return best
    check_segments(asked)
    return best_attention(dtype, on_cpu, config, "varlen")


def check_segments(asked: str | None) -> None:
    """Refuse an `attn_implementation` that a run asks for and that has no segments, as packed rows need."""
    if asked is not None and not keeps_samples_apart(asked):
        raise LlavaError(
            f"attn_implementation: found {asked!r}, which lets the samples of a packed row see each other; expected "
            "varlen or flash_attention_2, or pack_sequences false"
        )


@contextlib.contextmanager
def readable_weights(source: str):
    """Weights that are missing or cut short are a fault of `source`, told in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except BrokenPipeError:  # of what is printed meanwhile
        raise
    except (OSError, SafetensorError) as error:
        raise LlavaError(f"{source}: its weights cannot be read ({str(error).splitlines()[0][:160]})") from None


def check_no_adapter(path: str) -> None:
    """Refuse an adapter, or a projector alone, as the model to start from."""
    if is_lora(path):
        raise LlavaError(
            f"model_name_or_path: {path} is a LoRA adapter, expected a model: merge it (python -m "
            "llava.tools.merge_lora), or name its base here and the adapter in lora_weight_path"
        )
    check_whole(path, "name the language model in model_name_or_path, and this folder in pretrain_mm_mlp_adapter")


def quantisation_for(training_args):
    """How the frozen language model is held under QLoRA (arXiv 2305.14314); None with `bits` 16."""
    if training_args.bits == 16:
        return None
    return quantisation(
        f"bits {training_args.bits}",
        training_args.bits,
        compute_dtype=Precision.of(training_args).frozen,
        quant_type=training_args.quant_type,
        double_quant=training_args.double_quant,
    )


def tunable_parts(model_args, training_args) -> set[str]:
    """Parts to train: `mm_tunable_parts`, else LLaVA's older flags.

    Without `mm_tunable_parts` everything but the vision tower is trained; `tune_mm_mlp_adapter` leaves only the
    projector; `freeze_mm_mlp_adapter`, `freeze_backbone`, `unfreeze_language_model` and `unfreeze_mm_vision_tower` say
    what their names say. A token compressor is trained wherever the projector is, unless `freeze_mm_token_compressor`.
    """
    parts = _tunable_parts(model_args, training_args)
    if "mm_mlp_adapter" in parts and uses_compression(model_args):
        parts.add("mm_token_compressor")
    if model_args.freeze_mm_token_compressor:
        parts.discard("mm_token_compressor")
    return parts


def _tunable_parts(model_args, training_args) -> set[str]:
    if model_args.mm_tunable_parts is not None:
        parts = {part.strip() for part in model_args.mm_tunable_parts.split(",") if part.strip()}
        unknown = parts - set(TUNABLE_PARTS)
        if unknown or not parts:
            raise LlavaError(
                f"mm_tunable_parts: found {model_args.mm_tunable_parts!r}, expected some of {', '.join(TUNABLE_PARTS)}"
            )
        return parts
    parts = {"mm_mlp_adapter"}
    frozen = model_args.tune_mm_mlp_adapter or model_args.freeze_backbone
    if model_args.unfreeze_language_model or not frozen:
        parts.add("mm_language_model")
    if model_args.unfreeze_mm_vision_tower:
        parts.add("mm_vision_tower")
    if training_args.freeze_mm_mlp_adapter:
        parts.discard("mm_mlp_adapter")
    return parts


def trains_projector_alone(parts: set[str]) -> bool:
    """True for LLaVA's stage 1, which trains and keeps the projector alone, and a token compressor with it."""
    return bool(parts) and parts <= {"mm_mlp_adapter", "mm_token_compressor"}
