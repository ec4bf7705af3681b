"""Lengths told from sizes alone against samples that are made and merged: every tower, merge kind and family."""

from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data import lengths
from llava.data.dataset import SampleArgs
from llava.data.lengths import Layout, fingerprint, lengths_of, merged_length
from llava.data.preprocess import Preprocessor
from llava.families import get_family
from llava.families.base import Loaded
from llava.model.adaptive_patches import PatchChoice
from llava.model.multimodal_encoder.builder import TOWERS
from llava.model.visual_merge import native_resolution
from tests import tiny
from tests.data.common import talk, tokenizer
from tests.model import small
from tests.model.test_tower_contract import SETTINGS

SIDE = 42
GRID = "(1x1),...,(3x3)"
NATIVE = {"image_aspect_ratio": "native", "min_pixels": 28 * 28, "max_pixels": 12 * 28 * 28}
MERGES = {
    "square": {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat"},
    "pad": {"image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial_unpad"},
    "flat": {"mm_patch_merge_type": "flat"},
    "spatial": {"mm_patch_merge_type": "spatial", "mm_newline_position": "one_token"},
    "unpad": {"mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "grid"},
    "max": {"image_aspect_ratio": "anyres_max_2", "mm_patch_merge_type": "spatial_unpad"},
    "maxpool": {"mm_patch_merge_type": "spatial_maxpool2x2", "mm_newline_position": "no_token"},
    "nobase": {"mm_patch_merge_type": "spatial_unpad_nobase", "mm_newline_position": "frame"},
}
KINDS = [*TOWERS, "clip+toconv", "hevc_vit_packing, native", "hevc_vit_packing, native and merged"]

few = settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
sides = st.tuples(st.integers(8, 260), st.integers(8, 260))
# pictures of random sizes, or a clip: frames in its folder, the most that are taken, whether always so many
shown = st.one_of(
    st.lists(sides, min_size=1, max_size=1),
    st.lists(sides, min_size=0, max_size=3),
    st.tuples(sides, st.integers(1, 14), st.integers(0, 6), st.booleans()),
)


class Case:
    """A model on one tower, and records of pictures that are made for it."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.numbers, (tower, *more) = folder, count(), kind.replace("+", ",").split(",")
        source = tiny.tower(folder / "tower", tower, side=SIDE)
        changes = {"mm_vision_tower_type": tower, "vocab_size": 703, "image_grid_pinpoints": GRID}
        changes |= {"s2_scales": f"{SIDE},{2 * SIDE}"} if tower in SETTINGS else {}
        if "toconv" in more:
            changes |= {"use_token_compression": True, "compression_input_size": 3, "compression_output_size": 2}
        self.native = bool(more) and "native" in more[0]
        changes |= NATIVE if self.native else {}
        changes |= {"mm_projector_type": "spatial_merge"} if "merged" in kind else {}
        self.model = small.model(source, **changes)
        self.model.get_model().describe_vision()
        self.family = get_family("llava")

    def parts(self, merge: dict, **args):
        """(loaded, args) with a merge kind."""
        vars(self.model.config).update({"mm_newline_position": "grid", "image_aspect_ratio": "anyres"} | merge)
        if self.native:
            self.model.config.image_aspect_ratio = "native"
        self.model.get_vision_tower().set_patch_choice(self.model.config)
        config, words = self.model.config, tokenizer("qwen")
        folders = {"image_folder": str(self.folder), "video_folder": str(self.folder)}
        images = {name: getattr(config, name) for name in ("image_aspect_ratio", "image_grid_pinpoints")}
        args = SampleArgs(**folders, **images, native_resolution=native_resolution(config), **args)
        processor, counter = self.model.get_vision_tower().image_processor, self.model.visual_token_counter()
        prepare = Preprocessor(words, "qwen_1_5")
        return Loaded(self.model, words, words, processor, 4096, "qwen_1_5", counter, prepare), args

    def record(self, what) -> tuple[dict, list, dict]:
        """(record, sizes, what it changes of the args)."""
        if isinstance(what, list):
            names = [f"{next(self.numbers)}.bmp" for _ in what]
            for name, size in zip(names, what, strict=True):
                picture(size).save(self.folder / name)
            said = talk("<image>\n" * len(what) + "What is it?", "A temple in China.", "Sure?", "Yes.")
            return {"conversations": said} | ({"image": names} if names else {}), what, {}
        size, frames, bound, force = what
        clip = self.folder / f"clip{next(self.numbers)}"
        clip.mkdir()
        for at in range(frames):
            picture(size).save(clip / f"{at}.bmp")
        record = {"video": clip.name, "conversations": talk("<image>\nWhat happens?", "It gets dark.")}
        args = {"frames_upbound": bound, "force_sample": force, "add_time_instruction": bound % 2 == 1}
        return record, [size], args

    def real(self, record, loaded, args) -> tuple[int, int]:
        """(tokens that the language model is given, patches that the encoder embeds) of the record's sample."""
        sample, patches = self.family.sample(record, loaded, args), []
        if "images" not in sample:
            return len(sample["input_ids"]), 0
        batch = self.family.collate([sample], loaded, args)
        encoder = self.model.get_vision_tower().vision_tower
        convolution = next(module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d))
        hook = convolution.register_forward_hook(lambda module, given, made: patches.append(made[:, 0].numel()))
        with torch.no_grad():
            media = batch["images"], batch["modalities"], batch["image_sizes"]
            levels = {"patch_levels": batch["patch_levels"]} if "patch_levels" in batch else {}
            prepared = self.model.prepare_inputs_labels_for_multimodal(
                batch["input_ids"], None, None, None, None, *media, **levels
            )
        hook.remove()
        return prepared[4].shape[1], sum(patches)


def picture(size) -> Image.Image:
    """Not of one colour, so that a choice of patches finds something in it."""
    return Image.effect_noise(size, 90).convert("RGB")


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("tower"), request.param)


@pytest.mark.parametrize("merge", MERGES)
def test_lengths_are_those_of_the_real_merge(case, merge):
    @few
    @given(shown)
    def check(what):
        record, sizes, changes = case.record(what)
        loaded, args = case.parts(MERGES[merge], **changes)
        tokens, patches, exact = (values.item() for values in lengths_of([record], case.family, loaded, args))
        assert exact and (tokens, patches) == case.real(record, loaded, args)
        if isinstance(what, list):
            assert merged_length(record, sizes, Layout(case.family, loaded), args) == tokens

    check()


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "spatial_merge"])
def test_with_adaptive_patches_it_is_the_most(tmp_path, projector):
    case = Case(tmp_path, "hevc_vit_packing, native" + (" and merged" if projector == "spatial_merge" else ""))
    merge = {"mm_patch_merge_type": "spatial_unpad", "adaptive_patches": {"method": "budget", "alpha": 0.3}}
    fewer = 0
    for what in ([(120, 90)], [(80, 200), (60, 60)], ((60, 40), 5, 3, False)):
        record, _, changes = case.record(what)
        loaded, args = case.parts(merge, **changes)
        found = lengths_of([record], case.family, loaded, args)
        tokens = case.real(record, loaded, args)[0]
        assert found.exact.item() == isinstance(what, tuple)  # a clip keeps all of its patches
        assert found.tokens.item() == tokens if isinstance(what, tuple) else found.tokens.item() >= tokens
        fewer += found.tokens.item() > tokens
    assert fewer == 2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen(name, tmp_path):
    """An `<image>` of a sample is as many tokens as the language model will have."""
    family = get_family(name)
    loaded, args = family.load(tiny.qwen2_vl(tmp_path / "model", name), device="cpu"), SampleArgs(str(tmp_path))

    @few
    @given(st.lists(sides, max_size=3))
    def check(sizes):
        record = {"conversations": talk("<image>\n" * len(sizes) + "What is shown?", "A temple in China.")}
        for at, size in enumerate(sizes):
            picture(size).save(tmp_path / f"{at}.png")
        record |= {"image": [f"{at}.png" for at in range(len(sizes))]} if sizes else {}
        lengths._image_size.cache_clear()  # the names are used again
        sample = family.sample(record, loaded, args)
        found = [values.item() for values in lengths_of([record], family, loaded, args)]
        assert found == [len(sample["input_ids"]), len(sample.get("pixel_values", [])), True]
        assert merged_length(record, sizes, Layout(family, loaded), args) == len(sample["input_ids"])

    check()


# --- fingerprints ---


def test_a_fingerprint_follows_what_lengths_follow(tmp_path):
    case = Case(tmp_path, "hevc_vit_packing")
    seen = {}
    for name, merge in MERGES.items():
        seen[name] = fingerprint(case.family, *case.parts(merge))
    loaded, args = case.parts(MERGES["max"])
    assert fingerprint(case.family, loaded.without_model(), args) == seen["max"]
    assert fingerprint(case.family, *case.parts(MERGES["max"], seed=3, model_max_length=99)) == seen["max"]
    changes = [{"frames_upbound": 8}, {"video_fps": 2}, {"force_sample": True}, {"add_time_instruction": True}]
    for change in changes:
        seen[str(change)] = fingerprint(case.family, *case.parts(MERGES["max"], **change))
    chosen = MERGES["square"] | {"adaptive_patches": {"method": "budget", "alpha": 0.3}}
    seen["chosen"] = fingerprint(case.family, *case.parts(chosen))
    case.model.config.adaptive_patches = None
    for template in ("qwen_2_5", "v1"):
        loaded, args = case.parts(MERGES["max"])
        loaded.preprocessor = Preprocessor(loaded.tokenizer, template)
        seen[template] = fingerprint(case.family, loaded, args)
    loaded.preprocessor = Preprocessor(tokenizer("llama"), "qwen_1_5")
    seen["tokenizer"] = fingerprint(case.family, loaded, args)
    assert None not in seen.values() and len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_has_a_fingerprint(kind, tmp_path):
    case = Case(tmp_path, kind)
    loaded, args = case.parts(MERGES["max"])
    again = Case(tmp_path / "again", kind)
    changed = again.parts(MERGES["max"])[0]
    found = fingerprint(case.family, loaded, args)
    assert found is not None and fingerprint(case.family, changed, args) == found


def test_the_fingerprint_of_qwen(tmp_path):
    family, args = get_family("qwen2_vl"), SampleArgs()
    loaded = family.load(tiny.qwen2_vl(tmp_path / "model", "qwen2_vl"), device="cpu")
    seen = [fingerprint(family, loaded, args)]
    family.choose_patches(loaded, PatchChoice("budget", 0.3))
    seen.append(fingerprint(family, loaded, args))
    loaded.image_processor.size = {**dict(loaded.image_processor.size), "longest_edge": 28 * 28 * 9}
    seen.append(fingerprint(family, loaded, args))
    assert None not in seen and len(set(seen)) == 3
