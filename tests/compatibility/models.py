"""llava, llava.model and what is below it."""

from types import SimpleNamespace

import pytest
import torch

from llava.errors import LlavaError
from tests.compatibility.faces import PREDICT
from tests.compatibility.table import found, name

ARCH = "LLaVA-NeXT: llava/model/language_model/llava_mpt.py; LLaVA: llava/model/language_model/llava_mpt.py"


def refused(value, message: str, *args):
    """A stand-in refuses in one line, however it is used."""
    for use in (value, getattr(value, "from_pretrained", value)):
        with pytest.raises(LlavaError, match=message) as fault:
            use(*args)
        assert "\n" not in str(fault.value)


@name(
    "llava.model.builder.load_pretrained_model",
    PREDICT,
    "differs",
    "takes both projects' arguments; attention is the best there is unless named, half precision on a CPU is float32, "
    "and what would be random numbers is an error",
)
def _(function, world):
    tokenizer, model, processor, length = function(
        model_path=world.checkpoint, model_base=None, model_name="llava_qwen", device="cpu", dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu" and processor is not None and length == 4096
    assert len(tokenizer) and model.config.mm_use_im_start_end is False
    config = {"overwrite_config": {"mm_spatial_pool_stride": 2}, "multimodal": True, "attn_implementation": "eager"}
    model.tie_weights()
    half = function(world.checkpoint, None, "x", False, False, "cpu", "bfloat16", **config)[1]
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"
    assert half.config.mm_spatial_pool_stride == 2
    given = function(world.checkpoint, None, "x", customized_config=f"{world.checkpoint}/config.json", device="cpu")[1]
    assert given.config.image_aspect_ratio == model.config.image_aspect_ratio
    for wrong, message in (
        ({"device": "xyz"}, "device: found 'xyz', expected cpu, cuda or cuda:N"),
        ({"device": "cuda:0"}, "device: found 'cuda:0', but PyTorch sees no GPU"),
        ({"use_flash_attn": True}, "use_flash_attn: needs a flash-attn package"),
    ):
        if not torch.cuda.is_available() or wrong == {"device": "xyz"}:
            with pytest.raises(LlavaError, match=message):
                function(world.checkpoint, None, "x", **wrong)
    with pytest.raises(LlavaError, match=r"customized_config no\.json: cannot be read"):
        function(world.checkpoint, None, "x", customized_config="no.json")


@name("llava.model.builder", "lmms-eval: lmms_eval/models/simple/llava_onevision.py", note="AutoConfig knows llava_*")
def _(module, world):
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("llava_qwen", found("llava.model.language_model.llava_qwen.LlavaQwenConfig"))  # llava_vid does
    config = AutoConfig.from_pretrained(world.checkpoint)
    assert type(config).__name__ == "LlavaQwenConfig" and config.mm_vision_tower
    model = AutoModelForCausalLM.from_pretrained(world.checkpoint)
    assert type(model).__name__ == "LlavaQwenForCausalLM"


def _model_classes(language_model: str, config_name: str, model_type: str):
    def check(value, world):
        if value.__name__.endswith("Config"):
            assert value.model_type == model_type and value(hidden_size=32).hidden_size == 32
            assert value.from_pretrained(world.checkpoint).hidden_size == world.loaded[1].config.hidden_size
        else:
            assert value.config_class.__name__ == config_name and value.config_class.model_type == model_type
            assert hasattr(value, "generate") == value.__name__.endswith("ForCausalLM")

    return check


NEXT, FIRST = "LLaVA-NeXT: llava/model/{}", "LLaVA: llava/model/{}"
HERE = {
    "Llama": ("LlavaConfig", f"{NEXT}; {FIRST}"),
    "Qwen": ("LlavaQwenConfig", NEXT),
    "Mistral": ("LlavaMistralConfig", f"{NEXT}; {FIRST}"),
    "Qwen3": ("LlavaQwen3Config", "OneVision-Encoder: llava_next/llava/model/{}"),
}
for _language_model, (_config, _used) in HERE.items():
    _module = f"llava_{_language_model.lower()}"
    _check = _model_classes(_language_model, _config, _module)
    for _class in (_config, f"Llava{_language_model}Model", f"Llava{_language_model}ForCausalLM"):
        _file = f"language_model/{_module}.py"
        name(f"llava.model.language_model.{_module}.{_class}", _used.replace("{}", _file))(_check)
        if not _class.endswith("Model"):
            name(f"llava.model.{_class}", _used.replace("{}", "__init__.py"))(_check)

MISSING = {"Mixtral": "mixtral", "Gemma": "gemma", "QwenMoe": "qwen_moe", "Mpt": "mpt"}
for _language_model, _module in MISSING.items():
    _used = "LLaVA: llava/model/__init__.py" if _language_model == "Mpt" else "LLaVA-NeXT: llava/model/builder.py"
    for _end in ("Config", "ForCausalLM"):
        _class = f"Llava{_language_model}{_end}"
        for _place in (f"llava.model.language_model.llava_{_module}.{_class}", f"llava.model.{_class}"):
            name(_place, _used, "refused", "the language models are those of llava/model/families.py")(
                lambda value, world, _class=_class: refused(
                    value, f"{_class}: there is no such part here; the language"
                )
            )


@name("llava.LlavaLlamaForCausalLM", "LLaVA: llava/model/apply_delta.py; LLaVA-NeXT: llava/model/apply_delta.py")
def _(value, world):
    from llava.model import LlavaLlamaForCausalLM

    assert value is LlavaLlamaForCausalLM


@name("llava.model.llava_arch.LlavaMetaModel", ARCH)
def _(value, world):
    assert isinstance(world.loaded[1].get_model(), value)


@name("llava.model.llava_arch.LlavaMetaForCausalLM", ARCH, "differs", "a subclass names its `model_class`")
def _(value, world):
    assert isinstance(world.loaded[1], value)


@name(
    "llava.model.llava_arch.LlavaMetaForCausalLM.get_vision_tower",
    "LLaVA-NeXT: docs/LLaVA_OneVision_Tutorials.ipynb; LLaVA: llava/serve/model_worker.py",
)
def _(method, world):
    tower = method(world.loaded[1])
    assert tower.num_patches == 4 and tower.is_loaded and tower.image_processor is not None


@name("llava.model.llava_arch.LlavaMetaForCausalLM.get_model", "LLaVA: llava/train/train.py")
def _(method, world):
    assert method(world.loaded[1]).mm_projector is world.loaded[1].model.mm_projector


@name("llava.model.llava_arch.LlavaMetaForCausalLM.encode_images", "LLaVA: llava/model/llava_arch.py")
def _(method, world):
    model = world.loaded[1]
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(method(model, pixels), model.model.mm_projector(model.get_vision_tower()(pixels)))


@name(
    "llava.model.llava_arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal",
    "LLaVA-NeXT: llava/model/language_model/llava_qwen.py; LLaVA: llava/model/language_model/llava_llama.py",
)
def _(method, world):
    model, ids = world.loaded[1], torch.tensor([[5, -200, 6]])
    images, sizes = [torch.rand(3, 28, 28)], [(28, 28)]
    with torch.no_grad():
        first, _, _, _, embeds, labels = method(model, ids, None, None, None, ids, images, ["image"], sizes)
    assert first is None and embeds.shape == (1, 2 + 4 + 1, model.config.hidden_size)  # and the newline
    assert labels.tolist() == [[5, *[-100] * 5, 6]]


@name("llava.model.llava_arch.LlavaMetaForCausalLM.initialize_vision_tokenizer", "LLaVA-NeXT: llava/train/train.py")
def _(method, world):
    args = SimpleNamespace(mm_use_im_patch_token=False, mm_use_im_start_end=False)
    assert method(world.loaded[1], args, world.loaded[0]) == 0


@name("llava.model.llava_arch.unpad_image", "LLaVA-NeXT: llava/model/llava_arch.py; LLaVA: llava/model/llava_arch.py")
def _(function, world):
    grid = torch.arange(2 * 6 * 6).view(2, 6, 6)
    assert torch.equal(function(grid, (60, 30)), grid[:, 1:5])
    assert torch.equal(function(grid, (20, 60)), grid[:, :, 2:4])


@name(
    "llava.model.multimodal_encoder.builder.build_vision_tower",
    "LLaVA-NeXT: llava/model/llava_arch.py; LLaVA: llava/model/llava_arch.py",
)
def _(function, world):
    config = SimpleNamespace(mm_vision_tower=world.tower, mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = function(config)
    with torch.no_grad():
        assert tower(torch.rand(1, 3, 28, 28)).shape == (1, tower.num_patches, tower.hidden_size)


@name(
    "llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower",
    "ToConv: test_clip_compression.py; ToConv: CLIP_TOCONV_INTEGRATION.md",
    note="the second argument is LLaVA's `args`",
)
def _(tower_class, world):
    args = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = tower_class(world.tower, args, delay_load=True)
    assert not tower.is_loaded
    tower.load_model()
    assert tower.is_loaded and tower.num_patches_per_side == 2


@name(
    "llava.model.multimodal_projector.builder.build_vision_projector",
    "LLaVA-NeXT: llava/model/llava_arch.py; LLaVA: llava/model/llava_arch.py",
)
def _(function, world):
    config = SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=8, hidden_size=6)
    assert list(function(config).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@name(
    "llava.model.multimodal_projector.builder.SpatialMergeProjector",
    "OneVision-Encoder: llava_next/llava/model/multimodal_projector/USAGE_SPATIAL_MERGE.md",
    "differs",
    "merges 2x2 alone; without sides the grid is a square, where OneVision-Encoder looks for any that fits",
)
def _(projector_class, world):
    projector, x = projector_class(llm_dim=6, vit_dim=4, spatial_merge_size=2), torch.rand(1, 8, 4)
    block = x[0, [0, 1, 4, 5]]  # the first 2x2 of two rows of four
    expected = projector.mlp(torch.nn.functional.layer_norm(block, (4,), eps=1e-6).flatten())
    made = projector(x, height=2, width=4)
    assert made.shape == (1, 2, 6) and torch.allclose(made[0, 0], expected, atol=1e-6)
    with pytest.raises(LlavaError, match="spatial_merge_size: found 3"):
        projector_class(6, 4, 3)


DELTA = "weights are published and saved whole"
for _name, _used, _note in (
    ("apply_delta.apply_delta", "LLaVA: docs/MODEL_ZOO.md", DELTA),
    ("make_delta.make_delta", "LLaVA: llava/model/make_delta.py; LLaVA-NeXT: llava/model/make_delta.py", DELTA),
    (
        "consolidate.consolidate_ckpt",
        "LLaVA: llava/model/consolidate.py; LLaVA-NeXT: llava/model/consolidate.py",
        "every folder that is saved is whole; adapters: python -m llava.tools.merge_lora",
    ),
    (
        "utils.auto_upgrade",
        "LLaVA: llava/model/make_delta.py; LLaVA-NeXT: llava/model/consolidate.py",
        "no checkpoint is rewritten",
    ),
):
    name(f"llava.model.{_name}", _used, "refused", _note)(
        lambda value, world, _name=_name: refused(value, f"llava.model.{_name}: there is no such part here", "a", "b")
    )
