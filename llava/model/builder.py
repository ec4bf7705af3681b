"""`load_pretrained_model`: a LLaVA checkpoint from a folder or the hub, ready for inference."""

import os
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from llava.errors import LlavaError
from llava.model.checkpoint import check_whole, find_projector, load_projector, read_weights
from llava.model.families import LANGUAGE_MODELS, model_classes, resolve_architecture
from llava.model.foreign import refuse_foreign
from llava.model.loading import check_loaded, check_shapes, without_report
from llava.model.lora import is_lora, load_lora, recorded_base
from llava.model.multimodal_encoder.token_compressor import load_token_compressor
from llava.model.multimodal_encoder.trial import check_dtype
from llava.model.multimodal_encoder.trust import check_own_class, naming, trusting_checkpoints
from llava.model.other_tower import fit_other_tower
from llava.model.places import not_there, read_config
from llava.utils import rank0_print


def make_config(path: str, config_class, values: dict, overwrite: dict | None = None):
    """Config object from config.json values, whatever `model_type` they carry.

    `path` is remembered, since a tower's folder may lie inside the checkpoint.
    """
    values = {k: v for k, v in values.items() if k not in ("model_type", "transformers_version", "_name_or_path")}
    config = config_class.from_dict({**values, **(overwrite or {})})
    config._name_or_path = path
    return config


def load_tokenizer(path: str, **kwargs):
    """The tokenizer of a checkpoint, with a pad token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    except Exception as error:  # OSError, ValueError, or what its libraries make of a file that is none
        lacking = os.path.isdir(path) and not any("token" in name or name == "vocab.json" for name in os.listdir(path))
        files = "a folder or hub id with tokenizer.json or tokenizer.model"
        raise not_there(path, f"{path}: no tokenizer", files, None if lacking else error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if getattr(tokenizer, "legacy", None) is not None:
        # transformers 5 does not save it, and then reads a Llama tokenizer as one of the newer kind, with other ids
        tokenizer.init_kwargs.setdefault("legacy", tokenizer.legacy)
    return tokenizer


def pick_dtype(torch_dtype, device_is_cpu: bool) -> torch.dtype:
    """A dtype from its name; half precision on a CPU becomes float32, with a notice."""
    dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else getattr(torch, str(torch_dtype), None)
    if not isinstance(dtype, torch.dtype):
        raise LlavaError(f"torch_dtype: found {torch_dtype!r}, expected float16, bfloat16 or float32")
    if dtype == torch.float16 and device_is_cpu:
        rank0_print("float16 on CPU: loading in float32 instead")
        return torch.float32
    return dtype


def load_pretrained_model(
    model_path,
    model_base,
    model_name,
    load_8bit=False,
    load_4bit=False,
    device_map="auto",
    torch_dtype="float16",
    attn_implementation=None,
    customized_config=None,
    overwrite_config=None,
    trust_remote_code=False,
    vision_tower=None,
    device=None,
    dtype=None,
    use_flash_attn=False,
    **kwargs,
):
    """Load a checkpoint for inference.

    Args:
        model_path: folder or hub id; with `model_base`, a folder whose config.json and mm_projector file, or LoRA
            adapter, extend it.
        model_base: folder or hub id of the model under a projector-only checkpoint or an adapter, else None; an adapter
            without it is put over the base that it was trained on. Adapters are merged into unquantised weights.
        model_name: helps to tell the language model where config.json does not.
        load_8bit, load_4bit: quantise with bitsandbytes.
        device_map: as transformers'; "auto" uses CUDA where there is one.
        torch_dtype: "float16", "bfloat16", "float32" or a torch.dtype.
        attn_implementation: as transformers'; None takes the best available.
        customized_config: config object to use instead of the checkpoint's, or the path of a config.json.
        overwrite_config: dict of config values to change.
        trust_remote_code: run the class of a vision tower that the checkpoint alone names, from its folder too.
        vision_tower: the class of your own that the checkpoint's vision tower is of (FILE.py:Class, pkg.module:Class or
            an entry point): its code is run because you name it.
        device: where to put all of it, in place of `device_map`; "cuda" leaves that to `device_map`, as in LLaVA.
        dtype: as `torch_dtype`, and above it.
        use_flash_attn: flash_attention_2 where no `attn_implementation` is given.
        **kwargs: passed on to `from_pretrained`.

    Returns:
        (tokenizer, model, image_processor, context_len); image_processor is None without a vision tower.

    Raises:
        LlavaError: no config, unknown architecture, missing weights, a vision tower of a class that nobody but the
            checkpoint names.
    """
    model_base = model_base or None  # a script's empty variable is none
    kwargs.pop("multimodal", None)  # LLaVA-NeXT's evaluation passes it; every model here is
    if kwargs.pop("use_flash_attention_2", False) or use_flash_attn:
        attn_implementation = attn_implementation or _flash_attention()
    device_map = device_map if device is None else _device_map(device, device_map)
    torch_dtype = torch_dtype if dtype is None else dtype
    on_cpu = not torch.cuda.is_available() or (isinstance(device_map, str) and device_map == "cpu")
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = quantisation("load_8bit/load_4bit", 4 if load_4bit else 8)
    if is_lora(model_path):
        model_base = base_of_adapter(model_path, model_base)
    if model_base is None:
        check_whole(
            model_path, "name its language model as model_base, or to train on, this folder in pretrain_mm_mlp_adapter"
        )
    architecture, config = _checkpoint_config(model_path, model_base, model_name, customized_config, overwrite_config)
    dtype = pick_dtype(torch_dtype, on_cpu)
    changed = overwrite_config or {}
    named = (vision_tower, changed.get("mm_vision_tower"), changed.get("mm_vision_tower_type"))
    check_own_class(vision_tower, config, model_path)
    with trusting_checkpoints(trust_remote_code), naming(*named):
        model, missing = load_weights(
            model_classes(architecture)[0],
            model_base or model_path,
            with_projector=model_base is None,
            config=config,
            dtype=dtype,
            device_map=None if on_cpu and device_map == "auto" else device_map,
            attn_implementation=best_attention(dtype, on_cpu, config, attn_implementation),
            **kwargs,
        )
    if is_lora(model_path):
        adapted = load_lora(model, model_path, missing)
        model = adapted if load_8bit or load_4bit else adapted.merge_and_unload()
    elif model_base is not None:
        _load_projector(model, model_path)
    elif any(".token_compressor." in key for key in missing):
        _start_compressor(model, model_path)
    tokenizer = load_tokenizer(model_base or model_path)
    model.eval()
    if getattr(model.config, "conversation_template", None) is None:
        model.config.conversation_template = LANGUAGE_MODELS[architecture].template
    if not hasattr(model.config, "mm_use_im_start_end"):
        model.config.mm_use_im_start_end = False  # LLaVA's scripts read it off every model

    tower = model.get_vision_tower()
    if getattr(tower, "own_class", None) and dtype != torch.float32:
        check_dtype(tower, f"vision tower {tower.own_class}", dtype)
    if tower is not None:
        model.initialize_vision_tokenizer(model.config, tokenizer)
    return tokenizer, model, tower and tower.image_processor, context_length(model.config)


def _checkpoint_config(path, base, name, config, overwrite):
    """(architecture, config) of a checkpoint; arguments as `load_pretrained_model`'s."""
    values = read_config(path)
    if is_lora(path):
        values.pop("quantization_config", None)  # of the training run; the base's weights are not stored that way
    if base is not None:
        refuse_foreign(read_config(base), base)
    architecture = resolve_architecture(values, name, path, base, path=path)
    if config is None:
        config = make_config(path, model_classes(architecture)[1], values, overwrite)
    else:
        config = _given_config(config, path, model_classes(architecture)[1])
        for key, value in (overwrite or {}).items():
            setattr(config, key, value)
    if (overwrite or {}).get("mm_vision_tower"):
        fit_other_tower(config, values, path)
    if base is not None and os.path.isdir(os.path.join(path, getattr(config, "mm_vision_tower", None) or "")):
        # transformers is about to write the base's name over the checkpoint's, in which this folder lies
        config.mm_vision_tower = os.path.join(path, config.mm_vision_tower)
    return architecture, config


def _flash_attention() -> str:
    if not flash_attention_runs():
        raise LlavaError("use_flash_attn: needs a flash-attn package that can be imported, expected False without one")
    return "flash_attention_2"


def _device_map(device, otherwise):
    """transformers' device map for a model on one device; "cuda" leaves it at `otherwise`."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise LlavaError(f"device: found {device!r}, expected cpu, cuda or cuda:N") from None
    if str(device) == "cuda":
        return otherwise
    if kind == "cuda" and not torch.cuda.is_available():
        raise LlavaError(f"device: found {device!r}, but PyTorch sees no GPU here; expected cpu")
    return "cpu" if kind == "cpu" else {"": device}


def _given_config(config, path: str, config_class):
    """A config object as it is; one for the checkpoint at `path`, of a config.json that is named."""
    if not isinstance(config, (str, os.PathLike)):
        return config
    try:
        values, _ = config_class.get_config_dict(config)
    except (OSError, ValueError) as error:
        raise LlavaError(f"customized_config {config}: cannot be read ({str(error).splitlines()[0][:160]})") from None
    return make_config(path, config_class, values)


CAPPING_ATTENTION = ("eager", "varlen", "flash_attention_2", "flex_attention")  # sdpa would leave a soft cap out


def best_attention(dtype: torch.dtype, on_cpu: bool, config=None, asked: str | None = None) -> str:
    """`asked`, else flash_attention_2 where it is installed and can run, else sdpa (eager for scores with a soft cap).

    Args:
        config: of the model, or of its language model.

    Raises:
        LlavaError: what was asked for would compute without the soft cap that the model has (Gemma 2).
    """
    cap = getattr(config and config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and asked is not None and asked not in CAPPING_ATTENTION:
        raise LlavaError(
            f"attn_implementation: found {asked!r}, which leaves out attn_logit_softcapping {cap} of this "
            f"{config.model_type}; expected one of {', '.join(CAPPING_ATTENTION)}"
        )
    if asked:
        return asked
    if not on_cpu and dtype in (torch.float16, torch.bfloat16) and flash_attention_runs():
        return "flash_attention_2"
    return "sdpa" if cap is None else "eager"


def flash_attention_runs() -> bool:
    """Whether transformers can use flash-attn: it goes by the package's metadata, here it must be importable too."""
    from transformers.utils import is_flash_attn_2_available

    from llavavit.varlen_attention import flash_attn_loads

    return is_flash_attn_2_available() and flash_attn_loads()


def context_length(config) -> int:
    """Tokens a model was made for, in LLaVA's order of preference; 2048 where nothing is said."""
    for key in ("max_sequence_length", "max_position_embeddings", "tokenizer_model_max_length"):
        if getattr(config, key, None):
            return getattr(config, key)
    return 2048


def context_limit(config) -> int:
    """The longest sequence: what the language model was made for, and what merged sequences are cut to."""
    cut = getattr(config, "tokenizer_model_max_length", None)
    return min(context_length(config), cut or context_length(config))


def load_weights(model_class, source: str, with_projector: bool, **kwargs):
    """`from_pretrained` that refuses what it would fill with random numbers.

    Returns:
        The model, and the names of weights that its folder must hold beside it: projector, newline, token compressor.
    """
    try:
        with without_report():
            model, info = model_class.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except BrokenPipeError:  # of what is printed meanwhile
        raise
    except (OSError, UnpicklingError, SafetensorError) as error:
        raise not_there(source, f"{source}: no usable weights", "a checkpoint's", error) from None
    except RuntimeError as error:  # under ZeRO-3 transformers says it so
        if "size mismatch" not in str(error):
            raise
        line = next(line for line in str(error).splitlines() if "size mismatch" in line)
        raise LlavaError(f"{source}: {line.strip()}, expected weights of the config") from None
    check_shapes(info["mismatched_keys"], source)
    return model, check_loaded(model, info, source, with_projector)


def _start_compressor(model, folder: str):
    """A compressor that is added to a model trained without one: from its own file, or else untrained."""
    path = getattr(model.config, "pretrain_token_compressor", None)
    if path:
        load_token_compressor(model.get_vision_tower().token_compressor, path)
        rank0_print(f"{folder}: was trained without token compression; the compressor comes from {path}")
    else:
        rank0_print(
            f"warning: {folder}: holds no token compressor, so an untrained one is used, whose tokens mean nothing to "
            "the language model; set pretrain_token_compressor or train it"
        )


def _load_projector(model, folder: str):
    path = find_projector(folder)
    if path is None:
        raise LlavaError(f"{folder}: no mm_projector.safetensors or mm_projector.bin, which model_base calls for")
    weights = read_weights(path)
    if hasattr(model.get_model(), "image_newline") and not any(key.endswith("image_newline") for key in weights):
        raise LlavaError(f"{path}: no image_newline in it, which mm_patch_merge_type of {folder} calls for")
    if model.get_vision_tower().token_compressor is not None and not any("token_compressor." in key for key in weights):
        raise LlavaError(f"{path}: no token_compressor in it, which use_token_compression of {folder} calls for")
    load_projector(model.get_model(), path)


def base_of_adapter(folder: str, given: str | None) -> str:
    recorded = recorded_base(folder)
    if given is None:
        rank0_print(f"{folder}: a LoRA adapter, loaded over its base {recorded}")
    elif recorded and os.path.basename(os.path.normpath(given)) != os.path.basename(os.path.normpath(recorded)):
        rank0_print(f"note: {folder}: the adapter was trained on {recorded}, loaded over {given}")
    if not (given or recorded):
        raise LlavaError(f"{folder}: a LoRA adapter that does not name its base, expected model_base")
    return given or recorded


def quantisation(asked: str, bits: int, compute_dtype=torch.float16, quant_type="nf4", double_quant=True):
    """bitsandbytes' configuration for a language model in 4 or 8 bits; `asked` says in an error what called for it."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise LlavaError(f"{asked}: needs the bitsandbytes package and a device it supports")
    # the vision side stays as it is: it is small, and its layers are called in ways quantised ones do not allow
    skip = ["model.vision_tower", "model.mm_projector", "model.visual", "lm_head"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=skip,
    )


for _row in LANGUAGE_MODELS.values():  # from here on AutoConfig and AutoModelForCausalLM know LLaVA's model types
    _row.load()
