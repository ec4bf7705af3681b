"""Images at native resolution, and clips as one sample, through a whole model."""

import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.images.geometry import NativeResolution
from llava.mm_utils import process_images
from llava.model.visual_merge import MergeRules, native_resolution, pool_frames
from tests import tiny
from tests.model import small

NATIVE = {"image_aspect_ratio": "native", "min_pixels": 28 * 28, "max_pixels": 20 * 28 * 28}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("native") / "vit", kind="hevc_vit", side=56)


def make(encoder, **changes):
    return small.model(encoder, **{"mm_vision_tower_type": "hevc_vit_packing", **NATIVE, **changes})


# --- sizes ---


def test_every_size_fits():
    rule = NativeResolution(28, 56 * 56, 40 * 28 * 28)
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(1, 3000, (4000, 2), generator=generator).tolist()
    for width, height in [*sides, (28, 28), (5000, 30), (30, 5000), (1, 200), (1120, 28)]:
        w, h = rule(width, height)
        assert w % 28 == 0 and h % 28 == 0 and w > 0 and h > 0
        assert w * h <= rule.max_pixels
        assert w * h >= rule.min_pixels or max(width, height) > 10 * min(width, height)
        if w > 28 and h > 28:  # as near to the aspect as whole units allow
            assert (w - 28) / (h + 28) <= width / height <= (w + 28) / (h - 28)


def test_sizes_within_the_bounds_are_rounded_alone():
    rule = NativeResolution(28, 28 * 28, 1280 * 28 * 28)
    assert rule(640, 480) == (644, 476)  # 22.86 and 17.14 units
    assert rule(28, 28) == (28, 28) and rule(10, 280) == (28, 280)
    assert rule(4000, 3000) == (1148, 840)  # 41.31 x 30.98 units: rounded down, so that 1,280 hold
    assert rule(20, 20) == (28, 28)


@pytest.mark.parametrize("bounds", [(0, 100_000), (2000, 1000), (100, 783)])
def test_bounds_that_cannot_be(bounds):
    with pytest.raises(LlavaError, match="min_pixels, max_pixels: found"):
        NativeResolution(28, *bounds)


def test_units_follow_tower_and_projector(encoder):
    for projector, unit in (("mlp2x_gelu", 14), ("spatial_merge", 28), ("patch_merger", 28), ("pooler", 28)):
        model = make(encoder, mm_projector_type=projector)
        model.get_model().describe_vision()
        assert native_resolution(model.config).multiple == unit
    model.config.image_aspect_ratio = "pad"
    assert native_resolution(model.config) is None


# --- tokens ---


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "spatial_merge", "patch_merger", "pooler"])
@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat"])
def test_visual_tokens_are_the_slow_formula(encoder, projector, merge):
    """Each image alone: tower, projector, a newline after each of its rows where the kind is an unpad one."""
    model = make(encoder, mm_projector_type=projector, mm_patch_merge_type=merge)
    model.get_model().describe_vision()
    pictures = [Image.new("RGB", size, (40 * i, 90, 200)) for i, size in enumerate([(84, 56), (30, 140), (56, 56)])]
    images = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    assert isinstance(images, list)
    sizes = [picture.size for picture in pictures]
    row = [5, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 7]
    with torch.no_grad():
        found = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([row]), None, None, None, None, images, ["image"] * 3, sizes
        )[4][0]
        embed, tower, inner = model.get_input_embeddings(), model.get_vision_tower(), model.get_model()
        expected, used = [], iter(images)
        counts = []
        for token in row:
            if token != IMAGE_TOKEN_INDEX:
                expected.append(embed(torch.tensor([token])))
                continue
            image = next(used)
            h, w = image.shape[1] // 14, image.shape[2] // 14
            features = tower(image[None])
            if projector == "mlp2x_gelu":
                tokens = inner.mm_projector(features)[0]
            else:
                tokens, h, w = inner.mm_projector(features, grid=(h, w))[0], h // 2, w // 2
            rows = list(tokens.split(w))
            if merge == "spatial_unpad":
                rows = [torch.cat([line, inner.image_newline[None]]) for line in rows]
            expected += rows
            counts.append(h * (w + (merge == "spatial_unpad")))
        expected = torch.cat(expected)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    counter = model.visual_token_counter()
    assert [counter(tuple(i.shape), size) for i, size in zip(images, sizes, strict=True)] == counts


def test_same_sizes_are_merged_too(encoder):
    """A batch that could be stacked is not taken for LLaVA-NeXT's plain one, which skips merging."""
    model = make(encoder)
    model.get_model().describe_vision()
    pictures = [Image.new("RGB", (56, 28)), Image.new("RGB", (56, 28))]
    images = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    tokens = model._visual_tokens(images, ["image"] * 2, [(56, 28)] * 2)
    assert [len(t) for t in tokens] == [2 * (4 + 1)] * 2


def test_answers_do_not_depend_on_the_batch(encoder):
    model = make(encoder, mm_projector_type="spatial_merge")
    images = [small.pixels(3, 28, 84), small.pixels(3, 56, 56, seed=1)]
    sizes = [(84, 28), (56, 56)]
    row = [3, IMAGE_TOKEN_INDEX, 4]
    options = dict(do_sample=False, max_new_tokens=6, pad_token_id=0)
    both = model.generate(torch.tensor([row, row]), images=images, image_sizes=sizes, **options)
    for i in range(2):
        alone = model.generate(torch.tensor([row]), images=images[i : i + 1], image_sizes=sizes[i : i + 1], **options)
        assert torch.equal(both[i : i + 1, : alone.shape[1]], alone)


# --- clips ---


@pytest.mark.parametrize("kind", ["hevc_vit", "hevc_vit_packing"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "spatial_merge"])
def test_clip_is_one_sample(encoder, kind, projector):
    """Encoded as a whole, projected and pooled frame by frame; crops of an image beside it stay separate images."""
    model = small.model(
        encoder,
        mm_vision_tower_type=kind,
        mm_projector_type=projector,
        mm_newline_position="no_token",
        image_grid_pinpoints=[[112, 112]],
    )
    clip, crops = small.pixels(3, 3, 56, 56), small.pixels(5, 3, 56, 56, seed=1)
    with torch.no_grad():
        video, image = model._visual_tokens([clip, crops], ["video", "image"], [(56, 56), (112, 112)])
        tower, project = model.get_vision_tower(), model.get_model().mm_projector
        frames = tower([clip])[0].unflatten(0, (3, 16))
        side = 4
        if projector == "spatial_merge":
            side, projected = 2, torch.cat([project(frame[None], grid=(4, 4)) for frame in frames])
        else:
            projected = project(frames)
        expected = pool_frames(projected, (side, side), "bilinear").flatten(0, 2)
        assert torch.allclose(video, expected, atol=1e-5)
        # frame by frame is something else
        apart = model._visual_tokens([clip[i : i + 1] for i in range(3)], ["video"] * 3, [(56, 56)] * 3)
        assert not torch.allclose(torch.cat(apart), video, atol=1e-3)
        alone = model._visual_tokens([crops], ["image"], [(112, 112)])[0]
        assert torch.allclose(image, alone, atol=1e-5)
    counter = model.visual_token_counter()
    assert counter(tuple(clip.shape), (56, 56), "video") == len(video)
    assert counter(tuple(crops.shape), (112, 112), "image") == len(image)


def test_rules_read_native():
    assert MergeRules.from_config(small.config("x", **NATIVE)).native
    assert not MergeRules.from_config(small.config("x")).native
