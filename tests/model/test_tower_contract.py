"""What every tower of the registry owes the model, and every type of transformers' backbones; a new entry of `TOWERS`
is covered by itself, a new type by its row in tests/support/encoders.py."""

import pickle
import shutil

import pytest
import torch

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import TOWERS, build_vision_tower
from tests import tiny
from tests.model import small
from tests.support import encoders

SETTINGS = {"clip_s2": {"s2_scales": f"{tiny.SIDE},{2 * tiny.SIDE}"}}  # what a tower cannot do without


@pytest.fixture(scope="module", params=[*TOWERS, *encoders.KINDS])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "tower"
    return tiny.tower(path, kind) if kind in TOWERS else encoders.folder(path, kind)


def settings_of(kind) -> dict:
    """Keys of a tower; a type of transformers' backbones is told by its own config."""
    return {"mm_vision_tower_type": kind, **SETTINGS.get(kind, {})} if kind in TOWERS else {}


@pytest.fixture
def tower(kind, folder):
    return build_vision_tower({"mm_vision_tower": folder, **settings_of(kind)}).eval()


def images_for(tower, count=3):
    return small.pixels(count, 3, tower.image_size, tower.image_size)


def close(a, b):
    """Equal to 1e-5 of the largest value, where that is above 1."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_batch(tower):
    images = images_for(tower)
    features = tower(images)
    assert features.shape == (3, tower.num_patches, tower.hidden_size) and features.isfinite().all()
    assert (features[0] - features[1]).abs().max() > 1e-3  # it looks at the pixels
    tokens, (height, width) = tower.token_grid(tower.image_size, tower.image_size)
    assert tokens == height * width == tower.num_patches == tower.num_patches_per_side**2
    assert pickle.loads(pickle.dumps(tower.token_grid))(tower.image_size, tower.image_size) == (tokens, (height, width))
    again, grids = tower(images, return_spatial_dims=True)
    assert again.equal(features) and grids == [(height, width)] * 3
    assert close(tower(images, packed=True), features.flatten(0, 1))
    assert tower.dummy_feature.shape == (1, tower.hidden_size)
    assert tower(images.bfloat16()).dtype == torch.bfloat16 and features.dtype == tower.dtype == torch.float32


def test_list_of_sizes(tower):
    images = list(images_for(tower))
    assert all(close(a, b) for a, b in zip(tower(images), tower(torch.stack(images)), strict=True))
    patch, side = tower.patch_size, tower.image_size
    images[1:1] = [small.pixels(3, side + patch, side), small.pixels(3, side, side + 2 * patch, seed=5)]
    if not tower.any_size:  # one is refused that is not square
        for image in (images.pop(1), images.pop(1)):
            with pytest.raises(LlavaError, match=f"takes images of {side}x{side} pixels, got .{image.shape[1]}, "):
                tower([image])
    features, grids = tower(images, return_spatial_dims=True)
    assert isinstance(features, list) and len(features) == len(images) >= 3
    for image, feature, grid in zip(images, features, grids, strict=True):
        assert tower.token_grid(*image.shape[1:]) == (len(feature), grid) and grid[0] * grid[1] == len(feature)
        assert close(feature, tower(image[None])[0])
    assert close(tower(images, packed=True), torch.cat(features))
    if tower.sees_time:
        clip = small.pixels(2, 3, side, side + patch, seed=7)
        found = tower([images[0], clip, images[1]])
        assert [len(feature) for feature in found][1] == 2 * tower.token_grid(side, side + patch)[0]
        assert close(found[0], features[0]) and close(found[2], features[1])


def test_one_image(tower):
    images = images_for(tower)
    (alone,) = tower([images[1]])
    assert alone.shape == (tower.num_patches, tower.hidden_size)
    assert close(alone, tower(images[1:2])[0]) and close(alone, tower(images)[1])


@pytest.mark.parametrize("as_list", [False, True])
def test_gradient(tower, as_list):
    images = images_for(tower, 2).requires_grad_()
    images = list(images) if as_list else images

    def total():
        return sum(feature.square().sum() for feature in tower(images))

    assert tower.is_loaded and not tower.trainable and not total().requires_grad  # frozen: it keeps no activations
    tower.requires_grad_(True)
    unused = {id(parameter) for module in tower.unused_modules() for parameter in module.parameters()}
    total().backward()
    used = [(name, parameter) for name, parameter in tower.named_parameters() if id(parameter) not in unused]
    assert tower.trainable and len(used) > 20
    assert not [name for name, parameter in used if parameter.grad is None or not parameter.grad.any()]
    assert all(parameter.grad is None for parameter in tower.parameters() if id(parameter) in unused)


def test_save_and_load(kind, folder, tmp_path):
    """The checkpoint is complete: the encoder's own folder is gone when it is read."""
    source = shutil.copytree(folder, tmp_path / "encoder")
    model = small.model(source, image_aspect_ratio="pad", mm_patch_merge_type="flat", **settings_of(kind))
    model.get_model().describe_vision()
    with torch.no_grad():  # other weights than the folder's, as after training
        for parameter in model.get_vision_tower().parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    before, after = model.get_vision_tower(), again.get_vision_tower()
    assert type(after) is type(before) and after.is_loaded
    assert again.config.mm_vision_config == model.config.mm_vision_config and model.config.mm_vision_config
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    images = images_for(before)
    with torch.no_grad():
        weights = after.state_dict()
        assert all(weights[name].equal(value) for name, value in before.state_dict().items())
        assert close(after(images), before(images))  # where a tensor lies may change a convolution's last digit
        assert close(again.encode_images(images), model.encode_images(images))
        listed = [model.encode_images(list(images)) for model in (model, again)]
    assert all(close(a, b) for a, b in zip(*listed, strict=True))
