"""`python -m llava.tools.explain_image`: its numbers are the model's, the reference's and transformers'."""

import random
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.dataset import SampleArgs
from llava.errors import LlavaError
from llava.families import get_family
from llava.families import llava_geometry as geometry_of
from llava.inference.engine import Inference
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.adaptive_patches import PatchChoice
from llava.model.visual_merge import VisualTokenCounter
from llava.tools.explain_image import main
from llava.tools.walk.steps import tokens, walk
from llava.tools.walk.stock import stock_count
from llava.tools.walk.text import kept_sizes
from tests import tiny
from tests.model import golden, small

GRID = geometry_of.GRID
SIZES = [(1100, 808), (700, 2400), (90, 90), (23, 17), (328, 205), (300, 30)]


def photo(width, height):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain(**options):
    return geometry_of.plain_geometry(GRID, 336, 14, **options)


# --- the numbers ---


def test_the_worked_example():
    found = walk(photo(1100, 808), plain())
    assert found.best == (672, 672) and found.resized == (672, 494) and found.box == (0, 89, 672, 583)
    assert found.crops == (2, 2) and found.pixels.shape == (5, 3, 336, 336)
    assert (found.full, found.unpadded, found.final) == ((48, 48), (36, 48), (36, 48))
    assert (found.base_tokens, found.map_tokens, found.newline_tokens) == (576, 1728, 36)
    assert found.total == 2340
    best = found.candidates[0]
    # 808 * 672 / 1100 = 493.6
    assert best == (672, 672, 672 * 493, 672 * 672 - 672 * 493)
    assert [each[:2] for each in found.candidates][-1] == (336, 1008)


CASES = {
    "unpad": {},
    "spatial": {"mm_patch_merge_type": "spatial"},
    "nobase": {"mm_patch_merge_type": "spatial_unpad_nobase"},
    "maxpool": {"mm_patch_merge_type": "spatial_maxpool2x2"},
    "flat": {"mm_patch_merge_type": "flat"},
    "cls": {"mm_patch_merge_type": "flat", "mm_vision_select_feature": "cls_patch"},
    "max": {"image_aspect_ratio": "anyres_max_1"},
    "pad": {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
    "square": {"image_aspect_ratio": "square"},
    "patch_merger": {"mm_projector_type": "patch_merger"},
    "toconv": {
        "mm_vision_tower_type": "clip+toconv",
        "use_token_compression": True,
        "compression_input_size": 4,
        "compression_output_size": 2,
    },
    "siglip": {"kind": "siglip", "image_aspect_ratio": "anyres_max_2"},
    "native": {
        "kind": "hevc_vit",
        "mm_vision_tower_type": "hevc_vit_packing",
        "image_aspect_ratio": "native",
        "mm_projector_type": "spatial_merge",
        "min_pixels": 3136,
        "max_pixels": 20000,
    },
    "adaptive": {
        "kind": "hevc_vit",
        "mm_vision_tower_type": "hevc_vit_packing",
        "adaptive_patches": {"method": "budget", "alpha": 0.5},
        "image_aspect_ratio": "native",
        "mm_projector_type": "spatial_merge",
        "min_pixels": 3136,
        "max_pixels": 20000,
    },
    "adaptive_pad": {
        "kind": "hevc_vit",
        "mm_vision_tower_type": "hevc_vit_packing",
        "adaptive_patches": {"method": "budget", "alpha": [0.3, 0.7]},
        "image_aspect_ratio": "pad",
    },
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    kinds = ("clip", "siglip", "hevc_vit")
    return {kind: small.tower(tmp_path_factory.mktemp(kind), side=56, kind=kind) for kind in kinds}


@pytest.mark.parametrize("case", list(CASES))
def test_the_counts_are_those_of_the_model(case, towers):
    """Against the embeddings that a model with the same config makes of the same photo."""
    changes = dict(CASES[case])
    model = small.model(towers[changes.pop("kind", "clip")], **changes)
    found_in = geometry_of.config_geometry(SimpleNamespace(**model.config.to_dict()), case)
    for size in SIZES:
        found = walk(photo(*size), found_in)
        images = [found.pixels if found.pixels.shape[0] > 1 else found.pixels[0]]
        with torch.no_grad():
            embeds = model.prepare_inputs_labels_for_multimodal(
                torch.tensor([[5, -200, 6]]), None, None, None, None, images, ["image"], [size]
            )[4]
        assert found.total == embeds.shape[1] - 2, size
        assert found.total == found.base_tokens + found.map_tokens + found.newline_tokens
        if found.final is not None:
            assert found.map_tokens == found.final[0] * found.final[1]


def test_a_tower_is_described_without_its_weights(towers):
    """What comes from the empty tower is what a loaded one says."""
    model = small.model(towers["clip"])
    cfg = SimpleNamespace(**model.config.to_dict())
    cfg.mm_vision_config = cfg.mm_image_processor_config = None
    found = geometry_of.config_geometry(cfg, "here")
    assert found.processor.to_dict() == model.get_vision_tower().image_processor.to_dict()
    count = VisualTokenCounter(found.rules, found.token_grid, found.patch)
    assert count((3, 56, 56), (9, 9)) == model.visual_token_counter()((3, 56, 56), (9, 9)) == 17


# --- transformers ---


def sizes(count):
    rng = random.Random(3)
    return [(rng.randint(16, 2500), rng.randint(16, 2500)) for _ in range(count)]


def fast_count(geometry, size):
    """As `walk`, without making the pixels."""
    rules = geometry.rules
    crops = get_anyres_image_grid_shape(size, rules.image_grid_pinpoints, geometry.processor.crop_size["height"])[::-1]
    side = geometry.processor.crop_size["height"]
    return tokens((1 + crops[0] * crops[1], 3, side, side), crops, size, geometry)


def differs_by_rounding(unpadded, size, full):
    """Whether the unpadded side is a whole number but for a rounding error."""
    (width, height), (rows, columns) = size, full
    exact = height * columns / width if width / height > columns / rows else width * rows / height
    return abs(exact - round(exact)) < 1e-6 and unpadded != full


@pytest.mark.parametrize(
    ("geometry", "count", "name"),
    [
        (plain(), 6000, "LlavaNextProcessor"),
        (geometry_of.plain_geometry("(1x1),...,(6x6)", 384, 14, "anyres_max_9"), 600, "LlavaOnevisionProcessor"),
    ],
    ids=["next", "onevision"],
)
def test_thousands_of_sizes_count_as_transformers(geometry, count, name):
    different = 0
    for size in [*sizes(count), (328, 205), (24, 16)]:
        found = fast_count(geometry, size)
        assert stock_count(geometry, size)[0] == name
        if found["total"] != stock_count(geometry, size)[1]:
            different += 1
            assert differs_by_rounding(found["unpadded"], size, found["full"]), size
    assert different <= 2 + count // 1000


def test_where_rounding_differs_the_tool_says_so(tmp_path, capsys):
    """205 * (24 / 328) falls short of 15."""
    assert fast_count(plain(), (328, 205))["total"] == 576 + 14 * 25
    assert stock_count(plain(), (328, 205)) == ("LlavaNextProcessor", 576 + 16 * 25)
    photo(328, 205).save(tmp_path / "p.png")
    main([str(tmp_path / "p.png")])
    out = capsys.readouterr().out
    assert "LlavaNextProcessor counts 976 here" in out and "926 visual tokens = 576 + 336 + 14" in out
    photo(1100, 808).save(tmp_path / "p.png")
    main([str(tmp_path / "p.png")])
    assert "LlavaNextProcessor counts 2,340 too" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["next", "onevision"])
def test_the_whole_processors_of_transformers_agree(stage, monkeypatch):
    """Text and image through the real processor: its placeholders and its crops are the walk's."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        LlavaNextProcessor,
        LlavaOnevisionProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(tiny.TOKENIZER)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    grid = [[h, w] for w, h in geometry_of.plain_geometry(GRID, 336, 14).rules.image_grid_pinpoints]
    square = {"height": 336, "width": 336}
    colours = {name: getattr(CLIPImageProcessorPil(), name) for name in ("image_mean", "image_std")}
    if stage == "next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, crop_size=square, image_grid_pinpoints=grid, **colours
        )
        processor = LlavaNextProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        geometry = plain()
    else:
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=grid, **colours)
        # it wants a video processor, which needs torchvision; no video is given here
        monkeypatch.setattr(LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *args: None)
        processor = LlavaOnevisionProcessor(
            images,
            tokenizer,
            num_image_tokens=576,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
        )
        geometry = plain(image_aspect_ratio="anyres_max_2")
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    for size in ((1100, 808), (300, 900), (700, 701)):
        found = walk(photo(*size), geometry)
        made = processor(images=photo(*size), text="<image>\nWhat is shown?", return_tensors="pt")
        assert int((made["input_ids"] == image_id).sum()) == found.total
        assert made["pixel_values"].shape[1:] == found.pixels.shape


# --- the command ---


@pytest.fixture
def shot(tmp_path):
    photo(1100, 808).save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def test_the_printed_walk(shot, capsys):
    main([shot])
    out = capsys.readouterr().out
    for text in (
        "672 x 672  2 x 2    331,296     37.3%  120,288      26.6%  <- chosen",
        "1,100 x 808 -> 672 x 494",
        "to 672 x 672 with black: 89 above, 89 below",
        "pixel_values [5, 3, 336, 336]",
        "48 x 48 (rows x columns of all crops) -> 36 x 48 (padding cut off) = 1,728",
        "2,340 visual tokens = 576 + 1,728 + 36",
    ):
        assert text in out, text
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 100


def test_the_sequence_with_a_prompt(shot, capsys):
    folder = golden.GOLDEN / "mistral_clip_anyres_unpad"
    main([shot, "--model-path", str(folder), "--prompt", "What is shown in this image?"])
    out = capsys.readouterr().out
    tokenizer, model, processor, _ = golden.load(folder)
    from llava.mm_utils import process_images, tokenizer_image_token

    with Image.open(shot) as picture:
        pixels = process_images([picture], processor, model.config)
    ids = tokenizer_image_token("[INST] <image>\nWhat is shown in this image? [/INST]", tokenizer, return_tensors="pt")
    with torch.no_grad():
        embeds = model.prepare_inputs_labels_for_multimodal(
            ids[None], None, None, None, None, list(pixels), ["image"], [(1100, 808)]
        )[4]
    assert f"= {embeds.shape[1]} tokens" in out
    assert f"of 4,096 (the checkpoint's context), {4096 - embeds.shape[1]:,} are left" in out


def test_the_marks_of_a_run_are_in_its_prompt(shot, capsys):
    """A run with <im_start> and <im_end> around its images has two tokens more."""
    given = ["--config", "configs/train/finetune_next.yaml", "--prompt", "What?"]
    given += ["--model-path", str(golden.GOLDEN / "qwen_clip_anyres_unpad")]
    counts = []
    for wrapped in ("false", "true"):
        main([shot, *given, "--mm_use_im_start_end", wrapped])
        out = capsys.readouterr().out
        assert ("<im_start><image><im_end>" in "".join(out.split())) == (wrapped == "true")
        counts.append(int(out.split("text tokens  ")[1].split()[0]))
    assert counts[1] == counts[0] + 2


def test_a_training_config(shot, capsys):
    main([shot, "--config", "configs/train/finetune_next.yaml"])
    assert "2,340 visual tokens" in capsys.readouterr().out
    main([shot, "--config", "configs/train/finetune_next.yaml", "--mm_patch_merge_type", "spatial"])
    assert "2,880 visual tokens" in capsys.readouterr().out
    toconv = "configs/towers/clip_l336_toconv_24to12.yaml"
    main([shot, "--config", "configs/train/finetune_next.yaml", "--tower", toconv])
    out = capsys.readouterr().out
    assert "compressed 24x24 -> 12x12" in out and "612 visual tokens = 144 + 450 + 18" not in out
    assert "594 visual tokens = 144 + 432 + 18" in out
    main([shot, "--config", "configs/train/finetune_onevision.yaml"])
    assert "google/siglip-so400m-patch14-384" in capsys.readouterr().out
    main([shot, "--config", "configs/train/finetune_native.yaml"])
    # 1100 and 808 to multiples of 28: 39 and 29
    assert "1,160 visual tokens = 1,131 + 29" in capsys.readouterr().out


@pytest.mark.parametrize(("width", "height"), [(1100, 808), (200, 900), (64, 64), (7, 5)])
def test_the_picture(tmp_path, width, height):
    """What is drawn shows the photo's colour, the padding's, and an orange cell for every newline."""
    Image.new("RGB", (width, height), (10, 200, 30)).save(tmp_path / "p.png")
    main([str(tmp_path / "p.png"), "--output", str(tmp_path / "walk.png")])
    page = np.asarray(Image.open(tmp_path / "walk.png").convert("RGB")).astype(int)
    assert page.shape[1] == 1360 and 1000 < page.shape[0] < 2400

    def pixels_of(colour):
        return int((np.abs(page - colour).max(axis=2) <= 2).sum())

    assert pixels_of((10, 200, 30)) > 50_000 and pixels_of((232, 119, 34)) > 200
    assert pixels_of((0, 0, 0)) > 2_000


@pytest.mark.parametrize("case", ["flat", "cls", "pad", "square", "native", "siglip", "maxpool"])
def test_every_handling_is_drawn(case, towers, tmp_path, capsys):
    changes = dict(CASES[case])
    tower = towers[changes.pop("kind", "clip")]
    small.model(tower, **changes).save_pretrained(tmp_path)
    photo(120, 80).save(tmp_path / "p.png")
    main([str(tmp_path / "p.png"), "--model-path", str(tmp_path), "--output", str(tmp_path / "walk.png")])
    assert Image.open(tmp_path / "walk.png").width == 1360
    assert "visual tokens" in capsys.readouterr().out


# --- Qwen2-VL ---

QWEN_CONFIG = ["--config", "configs/train/finetune_qwen2_vl.yaml"]
SELECTIONS = [None, "v1", "v2:0.8", "budget:0.5"]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def qwen(request, tmp_path_factory):
    """(folder, family, loaded)."""
    folder = tiny.qwen2_vl(tmp_path_factory.mktemp(request.param), request.param)
    family = get_family(request.param)
    return folder, family, family.load(folder, device="cpu")


@pytest.fixture
def mixed(tmp_path):
    """A photo with something in its upper half and nothing in the lower one."""
    made = photo(1100, 808)
    made.paste((90, 140, 60), (0, 404, 1100, 808))
    made.save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def choose(folder, loaded, selection):
    """Let the folder's image processor, and the loaded one, have a selection."""
    choice = PatchChoice.parse(selection or "none")
    loaded.image_processor.adaptive_patches = choice
    loaded.image_processor.save_pretrained(folder)
    return choice


@pytest.mark.parametrize("selection", SELECTIONS)
def test_qwen2_vl_counts_as_its_samples_and_prompts(qwen, selection, mixed, tmp_path, capsys):
    folder, family, loaded = qwen
    choose(folder, loaded, selection)
    geometry = family.geometry(folder)
    record = {"image": "p.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    record["conversations"].append({"from": "gpt", "value": "A temple."})
    pad = loaded.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    engine = Inference(family, loaded)
    for size in ((1100, 808), *SIZES[2:]):
        if size != (1100, 808):
            photo(*size).save(tmp_path / "p.png")
        picture = Image.open(mixed).convert("RGB")
        found = walk(picture, geometry)
        inputs = engine.inputs([engine.prompt([("human", "<image>\nWhat?")])], [[picture]])
        patches = 4 * found.total if selection is None else sum(kept_sizes(found, geometry).values())
        assert family.picture_tokens(inputs, loaded) == [(patches, found.total)]
        assert f"pixel_values {list(inputs['pixel_values'].shape)}, " in found.made
        sample = family.sample(record, loaded, SampleArgs(image_folder=str(tmp_path), model_max_length=4096))
        assert int((sample["input_ids"] == pad).sum()) == found.total == found.base_tokens
        if selection is not None:
            assert torch.equal(found.levels.flatten(), inputs["image_patch_levels"])
        main([mixed, "--model-path", folder, "--prompt", "What?"])
        out = capsys.readouterr().out
        text, visual = family.sequence_length(inputs, loaded)
        assert f"sequence     {visual} + 2 + {text - 2} = {inputs['input_ids'].shape[1]} tokens" in out
        assert f"{visual} visual tokens" in out and max(map(len, out.splitlines())) < 100


def test_qwen2_vl_photos_are_seen_as_they_are_resized(qwen, mixed):
    """Chosen patches or not, what is drawn is the whole photo in the size of the encoder."""
    folder, family, loaded = qwen
    for selection in (None, "budget:0.5"):
        choose(folder, loaded, selection)
        found = walk(Image.open(mixed), family.geometry(folder))
        assert found.resized == (252, 168) and found.pixels.shape == (1, 3, 168, 252)
        small = np.asarray(Image.open(mixed).resize((252, 168), Image.Resampling.BICUBIC)) / 255
        images = loaded.image_processor
        expected = (small - np.array(images.image_mean)) / np.array(images.image_std)
        assert np.abs(found.pixels[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_qwen2_vl_is_printed_and_drawn(qwen, mixed, tmp_path, capsys):
    folder, _, loaded = qwen
    pages = []
    for selection, texts in (
        (None, ("12 x 18 (rows x columns) of 14 px = 216", "6 x 9 = 54: 2x2 patches make one")),
        ("budget:0.5", ("adaptive patches (budget, alpha 0.5)", "108: ", "image_patch_levels [216]")),
    ):
        choose(folder, loaded, selection)
        main([mixed, "--model-path", folder, "--output", str(tmp_path / "walk.png")])
        out = capsys.readouterr().out
        for text in (
            *("1,100 x 808 -> 252 x 168", "multiples of 28, 12,544 to 50,176", "image_grid_thw [[1, 12, 18]]"),
            *("<|vision_start|> in front", "<|vision_end|> behind", *texts),
        ):
            assert text in " ".join(out.split()), (text, out)
        page = np.asarray(Image.open(tmp_path / "walk.png").convert("RGB")).astype(int)
        assert page.shape[1] == 1360 and (np.abs(page - (232, 119, 34)).max(axis=2) <= 2).sum() > 200  # the marks
        pages.append(page)
    assert pages[0].shape != pages[1].shape or (pages[0] != pages[1]).any()


def test_qwen2_vl_of_a_training_config_needs_no_network(shot, capsys, monkeypatch):
    """The sizes are the released models', with the run's keys above them; 1100 and 808 are 39 and 29 times 28."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    all_patches = [*QWEN_CONFIG, "--adaptive_patches", "{method: all}"]
    main([shot, *all_patches])
    out = " ".join(capsys.readouterr().out.split())
    assert "1,131 visual tokens" in out and "58 x 78 (rows x columns) of 14 px = 4,524" in out
    assert "as published for Qwen/Qwen2-VL-7B-Instruct" in out and "3,136 to 1,003,520 pixels" in out
    main([shot, *all_patches, "--max_pixels", "401408", "--model_name_or_path", "Qwen/Qwen2.5-VL-3B-Instruct"])
    out = " ".join(capsys.readouterr().out.split())
    # 401,408 = 512 * 28 * 28; 26 * 19 = 494
    assert "Qwen2.5-VL's own encoder" in out and "494 visual tokens" in out
    main([shot, *QWEN_CONFIG])
    assert "at alpha 0.6, the middle of its range" in " ".join(capsys.readouterr().out.split())
    family = get_family("qwen2_vl")
    assert family.geometry("Qwen/Qwen2-VL-7B-Instruct").native == (28, 3136, 12845056)
    main([shot, "--config", "configs/train/finetune_next.yaml"])  # nor does a run that names a tower
    assert asked == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image_aspect_ratio", "pad"], "image_aspect_ratio is 'pad', but Qwen2-VL has"),
        (["--tower", "configs/towers/clip_l336.yaml"], "expected no tower config"),
        (["--crop", "336"], "--crop: Qwen2-VL has image sizes of its own"),
        (["--min_pixels", "99999999"], "min_pixels is 99999999 with max_pixels 1003520"),
        (["--adaptive_patches", "{method: nope}"], "method: found 'nope'"),
        (["--prompt", "What?"], "Qwen/Qwen2-VL-7B-Instruct: no "),
        (["--model_name_or_path", "acme/Qwen2-VL-mine"], "acme/Qwen2-VL-mine: no image processor"),
    ],
)
def test_faults_with_qwen2_vl_are_one_line(shot, flags, said, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        main([shot, *QWEN_CONFIG, *flags])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and said in err and err.count("\n") == 1, err


def test_photos_and_options_that_qwen2_vl_does_not_take(qwen, shot, capsys):
    folder, family, _ = qwen
    with pytest.raises(LlavaError, match="found 2000x5 pixels that cannot be processed"):
        walk(photo(2000, 5), family.geometry(folder))
    for flags, said in (
        (["--grid", "(1x1),...,(2x2)"], "--grid: "),
        (["--prompt", "What?", "--conv-mode", "qwen_1_5"], "has a chat template of its own"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([shot, "--model-path", folder, *flags])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and said in err and err.count("\n") == 1, err


# --- faults ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "What?"], "--prompt: counting its tokens needs a tokenizer"),
        (["--grid", "nonsense"], "image_grid_pinpoints"),
        (["--crop", "384"], "--crop 384: expected a --grid"),
        (["--learning_rate", "1"], "needs --config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--image_aspect_ratio", "wide"], "image_aspect_ratio: found 'wide'"),
        (["--image_aspect_ratio", "native"], "native"),
        (["--mm_patch_merge_type", "odd"], "mm_patch_merge_type: found 'odd'"),
        (["--output", "walk.nothing"], "--output walk.nothing: cannot be written"),
        (["--config", "configs/train/finetune_next.yaml", "--vision_tower", "acme/clip-unknown"], "--crop and --patch"),
        (["--config", "configs/train/finetune_next.yaml", "--prompt", "What?"], "no tokenizer"),
    ],
)
def test_faults_are_one_line(shot, flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main([shot, *flags])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and said in err and err.count("\n") == 1, err


def test_a_tower_out_of_reach_by_its_sizes(shot, capsys):
    config = ["--config", "configs/train/finetune_next.yaml", "--vision_tower", "acme/clip-unknown"]
    main([shot, *config, "--grid", "(1x1),...,(2x2)", "--crop", "224", "--patch", "16"])
    out = " ".join(capsys.readouterr().out.split())
    assert "a crop of 224 x 224 px gives 196 tokens (14 x 14)" in out


def test_no_image(tmp_path, capsys):
    (tmp_path / "p.png").write_text("not a picture")
    for path in (tmp_path / "p.png", tmp_path / "gone.png", tmp_path):
        with pytest.raises(SystemExit) as caught:
            main([str(path)])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.startswith(f"error: image {path}: ") and err.count("\n") == 1


@pytest.mark.parametrize(("size", "final", "total"), [((100, 1), (0, 24), 576), ((1, 100), (48, 0), 576 + 48)])
def test_a_photo_so_long_that_no_map_is_left(size, final, total, tmp_path):
    found = walk(photo(*size), plain())
    assert (found.final, found.map_tokens, found.total) == (final, 0, total)
    photo(*size).save(tmp_path / "p.png")
    main([str(tmp_path / "p.png"), "--output", str(tmp_path / "walk.png")])
    assert Image.open(tmp_path / "walk.png").width == 1360


def test_help_needs_no_torch():
    code = "import sys, llava.tools.explain_image as m; m.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
