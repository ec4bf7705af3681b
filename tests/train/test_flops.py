"""The operations of a step, against counts written out by hand and against PyTorch's own counter on tiny models."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.train.flops import peak_tflops, step_flops
from tests.model import small
from tests.model.qwen2_vl import parts

ALL = set(TUNABLE_PARTS)
PROJECTOR, TOWER, LANGUAGE = {"mm_mlp_adapter"}, {"mm_vision_tower"}, {"mm_language_model"}
# of small.config: hidden 32, two heads of 16 and one of keys, MLP 48, two layers
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
HEAD = small.VOCAB * 32
# of small.tower with 3 layers, of which the first two are used: hidden 32, MLP 64
CLIP_LAYER = 4 * 32 * 32 + 2 * 32 * 64
PATCH = 3 * 14 * 14 * 32
CROPS, PATCHES = 3, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def clip(folder):
    return small.tower(folder / "clip")


def clip_forward():
    """Of 3 crops of 9 patches and a class token, 2 layers: patches, matrices, attention."""
    return (
        2 * PATCH * CROPS * PATCHES,
        2 * 2 * CLIP_LAYER * CROPS * (PATCHES + 1),
        2 * 4 * 32 * CROPS * (PATCHES + 1) ** 2,
    )


def language_forward(tokens=(20, 30), supervised=12):
    """Layers, attention (2 products, 2 operations, half of the square), output layer."""
    return (
        2 * 2 * LAYER * sum(tokens),
        2 * 2 * 2 * 32 * sum(n * n for n in tokens) / 2,
        2 * HEAD * supervised,
    )


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize(
    ("trained", "tower", "first", "rest", "language"),
    [
        # of (patches, matrices, attention); of each projector matrix; of (layers, attention, output layer)
        (ALL, (2, 3, 3), 3, 3, (3, 3, 3)),
        (TOWER, (2, 3, 3), 2, 2, (2, 3, 2)),
        (PROJECTOR, (1, 1, 1), 2, 3, (2, 3, 2)),
        (PROJECTOR | LANGUAGE, (1, 1, 1), 2, 3, (3, 3, 3)),
        (LANGUAGE, (1, 1, 1), 1, 1, (3, 3, 3)),
        (set(), (1, 1, 1), 1, 1, (1, 1, 1)),
    ],
)
def test_llava_by_hand(clip, family, trained, tower, first, rest, language):
    """Each product is one forward; what learns adds one, what learns before it another. Pixels learn nothing."""
    config = described(small.config(clip, family))
    expected = sum(part * times for part, times in zip(clip_forward(), tower, strict=True))
    expected += 2 * 32 * 32 * CROPS * PATCHES * (first + rest)
    expected += sum(part * times for part, times in zip(language_forward(), language, strict=True))
    assert step_flops(config, [20, 30], [PATCHES] * CROPS, trained, supervised=12) == expected


def described(config):
    """The config as a model of it leaves it."""
    model_class = small.FAMILIES[config.model_type.removeprefix("llava_")].load()[0]
    model = model_class(config)
    model.get_model().describe_vision()
    return model.config


def test_gemma2_by_hand(clip):
    """Heads wider than the hidden size says; the first of two layers sees 8 tokens back."""
    config = described(small.config(clip, "gemma2", head_dim=24))
    layer = 2 * 32 * 48 + 2 * 32 * 24 + 3 * 32 * 48
    pairs = (20 * 8 - 32) + (30 * 8 - 32) + (400 + 900) / 2
    expected = 3 * (2 * 2 * layer * 50 + 4 * 48 * pairs + 2 * HEAD * 50)
    assert step_flops(config, [20, 30], [], ALL) == expected


def test_mistral_window(clip):
    plain = small.config(clip, "mistral", sliding_window=None)
    window = small.config(clip, "mistral", sliding_window=8)
    config, wide = described(window), described(plain)
    lost = 3 * 2 * 4 * 32 * (30**2 / 2 - (30 * 8 - 32))
    assert step_flops(wide, [30], [], ALL) - step_flops(config, [30], [], ALL) == lost
    assert step_flops(wide, [7], [], ALL) == step_flops(config, [7], [], ALL)


def test_samples_are_counted_one_by_one(clip):
    config = described(small.config(clip))
    apart, together = (step_flops(config, tokens, [], ALL) for tokens in ([20, 30], [50]))
    assert together - apart == 3 * 2 * 4 * 32 * (50**2 - 20**2 - 30**2) / 2


@pytest.mark.parametrize(
    ("changes", "kind", "made", "first", "rest", "normed"),
    [
        ({"mm_projector_type": "linear"}, "clip", 3 * 16, 32 * 32, 0, False),
        ({"mm_projector_type": "identity"}, "clip", 3 * 16, 0, 0, False),
        ({"mm_projector_type": "mlp3x_gelu"}, "clip", 3 * 16, 32 * 32, 2 * 32 * 32, False),
        ({"mm_projector_type": "mlp2x_res2x_gelu"}, "clip", 3 * 16, 32 * 32, 5 * 32 * 32, False),
        ({"mm_projector_type": "pooler"}, "clip", 3 * 4, 128 * 32, 32 * 32, False),
        ({"mm_projector_type": "spatial_merge"}, "clip", 3 * 4, 128 * 128, 128 * 32, True),
        ({"mm_vision_select_feature": "cls_patch", "mm_patch_merge_type": "flat"}, "clip", 3 * 17, 1024, 1024, False),
    ],
)
def test_projectors(folder, changes, kind, made, first, rest, normed):
    """What learns and what does not; a norm in front of the first matrix learns too."""
    config = described(small.config(small.tower(folder / "56", side=56), **changes))
    tower = step_flops(config, [], [16] * 3, set()) - 2 * made * (first + rest)
    pixels, matrices = 2 * PATCH * 48, 4 * CLIP_LAYER * 51
    assert tower == pixels + matrices + 8 * 32 * 3 * 17**2
    expected = tower + 2 * made * (first * (2 + normed) + rest * 3)
    assert step_flops(config, [], [16] * 3, PROJECTOR) == expected


def test_s2_and_compression(folder):
    side = small.tower(folder / "56", side=56)
    plain = described(small.config(side))
    config = described(small.config(side, s2=True, s2_scales="56,112", image_aspect_ratio="pad"))
    crops = step_flops(plain, [], [16] * 5, set()) - 2 * 80 * 2 * 32 * 32
    assert step_flops(config, [], [16] * 5, set()) == crops + 2 * 16 * (64 * 32 + 32 * 32)

    grids = {"compression_input_size": 4, "compression_output_size": 2}
    config = described(small.config(side, use_token_compression=True, **grids))
    conv = 2 * 5 * 4 * (32 * 2) ** 2  # 4 -> 2 is a kernel of 2 with stride 2
    frozen = crops + conv + 2 * 5 * 4 * 2 * 32 * 32
    assert step_flops(config, [], [16] * 5, set()) == frozen
    learned = {"mm_token_compressor", "mm_mlp_adapter"}
    assert step_flops(config, [], [16] * 5, learned) == crops + 2 * conv + 3 * 2 * 5 * 4 * 2 * 32 * 32


def test_hevc_by_hand(folder):
    """No class token; a clip is one sequence. Hidden 64, 64 in the MLP, two of three layers are used."""
    config = described(small.config(small.tower(folder / "hevc", kind="hevc_vit_packing")))
    layer = 4 * 64 * 64 + 2 * 64 * 64
    lengths = [9, 12, 2 * 3 * 4]
    forward = 2 * 3 * 14 * 14 * 64 * 45 + 2 * 2 * layer * 45 + 2 * 4 * 64 * sum(n * n for n in lengths)
    expected = forward + 2 * 45 * (64 * 32 + 32 * 32)
    assert step_flops(config, [], lengths, set()) == expected
    assert step_flops(config, [], [(1, 3, 3), (1, 3, 4), (2, 3, 4)], set()) == expected
    fewer = expected - 2 * 5 * (64 * 32 + 32 * 32)
    assert step_flops(config, [], lengths, set(), projected=40) == fewer


# --- the Qwen-VL families ---

TEXT_LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96


def vl_config(folder, kind):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(parts.make_folder(folder / kind, kind))


def vl_language(config, tokens):
    """Forward of all positions, without attention."""
    layers = config.get_text_config().num_hidden_layers
    return 2 * tokens * (layers * TEXT_LAYER + config.get_text_config().vocab_size * 64)


@pytest.mark.parametrize("kind", parts.VISION)
def test_qwen_vl_by_hand(tmp_path, kind):
    config = vl_config(tmp_path, kind)
    grids = [(1, 4, 6), (1, 12, 10)]
    patches = 24 + 120
    layers, mlp = {"qwen2_vl": (2, 2 * 64), "qwen2_5_vl": (3, 3 * 48), "qwen3_vl": (3, 2 * 48)}[kind]
    values = 3 * 2 * (16 if kind == "qwen3_vl" else 14) ** 2
    whole = 24**2 + 120**2
    pairs = layers * whole
    if kind == "qwen2_5_vl":  # two of three layers see windows of 8 x 8: 12 x 10 is 8x8, 8x2, 4x8, 4x2
        pairs = whole + 2 * (24**2 + 64**2 + 16**2 + 32**2 + 8**2)
    vision = 2 * patches * (values * 32 + layers * (4 * 32 * 32 + 32 * mlp)) + 4 * 32 * pairs
    mergers = 3 if kind == "qwen3_vl" else 1
    merger = 2 * (patches // 4) * mergers * (128 * 128 + 128 * 64)
    language = vl_language(config, 50)
    attention = config.get_text_config().num_hidden_layers * 4 * 64 * (20**2 + 30**2) / 2
    expected = vision + merger + language + attention
    assert step_flops(config, [20, 30], grids, set()) == expected
    trained = 3 * expected - 2 * patches * values * 32  # pixels learn nothing
    assert step_flops(config, [20, 30], grids, ALL) == trained
    projector = vision + 3 * merger + 2 * language + 3 * attention
    assert step_flops(config, [20, 30], grids, PROJECTOR) == projector


def test_windows_of_a_length_are_whole(tmp_path):
    config = vl_config(tmp_path, "qwen2_5_vl")
    square, number = (step_flops(config, [], [size], set()) for size in ((1, 16, 8), 128))
    assert square == number
    assert step_flops(config, [], [(1, 8, 10)], set()) == step_flops(config, [], [80], set())
    odd = step_flops(config, [], [(1, 10, 10)], set()) - step_flops(config, [], [100], set())
    assert odd == 2 * 4 * 32 * ((64**2 + 2 * 16**2 + 4**2) - (64**2 + 36**2))


def test_frames_of_a_clip_do_not_see_each_other(tmp_path):
    config = vl_config(tmp_path, "qwen2_vl")
    assert step_flops(config, [], [(3, 4, 4)], ALL) == step_flops(config, [], [16] * 3, ALL)


def test_lora(clip):
    """Weights stay, adapters of every matrix but the output layer's learn."""
    config = described(small.config(clip))
    ends = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    layers, attention, head = language_forward()
    expected = 2 * layers + 3 * attention + 2 * head + 3 * 2 * 2 * 8 * ends * 50
    found = step_flops(config, [20, 30], [], PROJECTOR | LANGUAGE, supervised=12, lora_rank=8)
    assert found == expected


def test_a_plain_language_model_and_a_config_without_its_encoder(clip):
    from transformers import AutoConfig

    plain = AutoConfig.for_model("qwen2", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=120)
    plain.num_key_value_heads, plain.intermediate_size = 1, 48
    assert step_flops(plain, [20, 30], [], ALL, supervised=12) == 3 * sum(language_forward())
    with pytest.raises(LlavaError, match="no mm_vision_config"):
        step_flops(small.config(clip), [20], [9], ALL)


def test_peaks():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989 and peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312 and peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("Some other device") is None


# --- against torch.utils.flop_counter ---


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unseen_halves(config, tokens, times):
    """What PyTorch counts of attention beyond S^2 / 2 pairs: it takes whole squares."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return times * text.num_hidden_layers * 4 * text.num_attention_heads * head * sum(n * n for n in tokens) / 2


@pytest.mark.parametrize(
    ("family", "trained"), [("qwen", ALL), ("llama", TOWER), ("mistral", PROJECTOR), ("qwen", PROJECTOR | LANGUAGE)]
)
def test_llava_against_the_counter(clip, family, trained):
    from llava.train.parts import set_trainable

    # eager attention computes what a window shuts out: those are counted by hand
    model = small.model(clip, family, attn_implementation="eager", sliding_window=None).train()
    model.get_model().describe_vision()
    set_trainable(model, trained)
    ids = torch.tensor([[5, 6, -200, *range(7, 20)]])
    images, size = torch.randn(3, 3, 42, 42), (80, 42)
    length = 15 + model.visual_token_counter()((3, 3, 42, 42), size)

    def step():
        embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, ids, [images], ["image"], [size])[4]
        assert embeds.shape[1] == length
        hidden = model.get_model()(inputs_embeds=embeds)[0][0, -6:]
        F.cross_entropy(model.lm_head(hidden), torch.arange(6)).backward()

    expected = step_flops(model.config, [length], [9, 9, 9], trained, supervised=6)
    expected += unseen_halves(model.config, [length], 3)
    assert counted(step) == expected


@pytest.mark.parametrize("blocks", [None, 1, 2])
def test_hevc_against_the_counter(folder, blocks):
    from llava.train.parts import set_trainable

    tower = small.tower(folder / "hevc", kind="hevc_vit_packing")
    model = small.model(tower, mm_projector_type="spatial_merge", attn_implementation="eager").train()
    model.get_model().describe_vision()
    set_trainable(model, ALL, tower_blocks=blocks)
    images = [torch.randn(3, 28, 56), torch.randn(3, 56, 56)]

    def step():
        sum(features.sum() for features in model.encode_images(images)).backward()

    assert counted(step) == step_flops(model.config, [], [(1, 2, 4), (1, 4, 4)], ALL, tower_blocks=blocks)


@pytest.mark.parametrize("kind", parts.VISION)
@pytest.mark.parametrize("trained", [ALL, PROJECTOR])
def test_qwen_vl_against_the_counter(tmp_path, kind, trained):
    from llava.families import get_family
    from llava.train.parts import set_trainable

    family = get_family(kind)
    path = parts.make_folder(tmp_path, kind)
    model = family.classes()[0].from_pretrained(path, attn_implementation="eager").train()
    set_trainable(model, trained, family=family)
    config, grid = model.config, (1, 12, 10)
    vision = config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.tensor([[5, *[config.image_token_id] * 30, *range(7, 20)]])
    length = ids.shape[1]

    def step():
        hidden = model.model(
            input_ids=ids,
            pixel_values=torch.randn(120, values),
            image_grid_thw=torch.tensor([grid]),
            mm_token_type_ids=(ids == config.image_token_id).long(),
        )[0][0, -6:]
        F.cross_entropy(model.lm_head(hidden), torch.arange(6)).backward()

    expected = step_flops(config, [length], [grid], trained, supervised=6)
    expected += unseen_halves(config, [length], 3)
    assert counted(step) == expected
