"""The tower around a plain `nn.Module` of a user's: [B, C, H, W] -> [B, N, D], or a feature map [B, D, h, w].

Sizes are found by one image through the module. What no checkpoint holds (buffers that are not persistent, tensors that
are no buffers at all) comes from the module's constructor again.

Shapes: B images, N = h * w tokens on a square grid, D channels.
"""

import inspect
import math

import torch
import torch.nn as nn

from llava.config.own_tower import IMAGE_EXAMPLE, INTERPOLATIONS, check_image
from llava.errors import LlavaError
from llava.model.checkpoint import read_weights
from llava.utils import rank0_print

from .base import VisionTower
from .plain_config import PlainConfig
from .trial import check_features, evaluating, own_code, sample_images

OWED = "[B, N, D] of N = h * w tokens on a square grid (no class token), or [B, D, h, w]"


class ModuleTower(VisionTower):
    """Args as `VisionTower`'s, whose `args` also have `vision_tower_image` and `vision_tower_weights`.

    Args:
        module_class: the user's class, called with `tower_args`.
        what: its path, in messages.
    """

    def __init__(self, vision_tower, args, delay_load=False, *, module_class, what, **tower_args):
        self.module_class, self.what = module_class, what
        self._made = []  # the module whose sizes were found, until it becomes `vision_tower`
        super().__init__(vision_tower, args, delay_load, **tower_args)

    def read_config(self, args):
        from transformers import SiglipImageProcessorPil

        if self.select_feature != "patch":
            raise LlavaError(
                f"mm_vision_select_feature: found {self.select_feature!r}, expected patch: {self.what} is a plain "
                "nn.Module, which chooses its own features"
            )
        self.weights_file = getattr(args, "vision_tower_weights", None)
        stored = getattr(args, "mm_vision_config", None)
        stored_processor = getattr(args, "mm_image_processor_config", None)
        image = getattr(args, "vision_tower_image", None)
        if stored_processor is None:
            if image is None:
                raise LlavaError(
                    f"vision_tower_image: missing; {self.what} is a plain nn.Module, beside which it says what pixels "
                    f"it takes: {IMAGE_EXAMPLE}"
                )
            check_image(image, "vision_tower_image")
            self.image_processor = SiglipImageProcessorPil(
                size={"height": image["size"], "width": image["size"]},
                resample=INTERPOLATIONS[image["interpolation"]],
                image_mean=list(image["mean"]),
                image_std=list(image["std"]),
            )
        else:
            self.image_processor = SiglipImageProcessorPil.from_dict(stored_processor)
        self.config = PlainConfig(stored or self._measure(self.image_processor.size["height"]))

    def _measure(self, side: int) -> dict:
        """The module's sizes, from one image of `side` pixels."""
        self._made = [self.make()]
        module = self._made[0]
        first = next(module.parameters(), None)
        if first is None:
            raise LlavaError(f"{self.what}: has no parameters, expected an encoder with weights")
        images = sample_images((side, side), first.device, first.dtype)
        with evaluating(module), torch.no_grad():
            found = module(images)
        ndim = found.ndim if isinstance(found, torch.Tensor) else 0
        check_features(found, images, (1, None, None, None) if ndim == 4 else (1, None, None), self.what, OWED)
        tokens, channels = (found[0, 0].numel(), found.shape[1]) if ndim == 4 else found.shape[1:]
        grid = math.isqrt(tokens)
        if grid**2 != tokens or not 0 < grid <= side or (ndim == 4 and found.shape[2] != grid):
            raise LlavaError(
                f"{self.what}: for images {list(images.shape)} it returned {list(found.shape)}, expected {OWED}"
            )
        return {
            "image_size": side,
            "patch_size": side // grid,
            "tokens_per_side": grid,
            "hidden_size": channels,
        }

    def make(self) -> nn.Module:
        """The module as its constructor makes it, with the weights of `vision_tower_weights`, if there are any.

        Raises:
            LlavaError: arguments that it does not take, or weights that are not its own.
        """
        try:
            inspect.signature(self.module_class).bind(**self.tower_args)
        except TypeError as error:
            known = ", ".join(inspect.signature(self.module_class).parameters) or "none"
            raise LlavaError(f"tower_args: {self.what}: {error}; it takes {known}") from None
        # From the run's seed alone: how much randomness the rest took differs between ZeRO stages.
        with torch.random.fork_rng(devices=[]), own_code(f"{self.what}: its constructor"):
            torch.manual_seed(torch.initial_seed())
            module = self.module_class(**self.tower_args)
        if self.weights_file:
            self._load(module, self.weights_file)
        return module

    def _load(self, module: nn.Module, file: str) -> None:
        if not file.endswith(".safetensors"):
            raise LlavaError(f"vision_tower_weights: found {file}, expected a .safetensors file")
        weights = read_weights(file)
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if odd:
            listed = ", ".join(
                f"{n} is {found.get(n, 'missing')}, expected {expected.get(n, 'absent')}" for n in odd[:3]
            )
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise LlavaError(f"vision_tower_weights {file}: does not fit {self.what}: {listed}{more}")
        if not any(parameter.is_meta for parameter in module.parameters()):
            module.load_state_dict(weights)

    def build_empty(self):
        if not self._made:
            weights, self.weights_file = self.weights_file, None  # the checkpoint brings them
            self._made = [self.make()]
            self.weights_file = weights
        self.vision_tower = self._made.pop()

    def load_model(self, device_map=None):
        if self.is_loaded:
            return
        rank0_print(f"vision tower {self.what}: {self.weights_file or 'with the weights that it is made with'}")
        self.vision_tower = self._made.pop() if self._made else self.make()
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    @property
    def any_size(self):
        """Whether the module takes pictures of any size, in multiples of its patch: its class says so."""
        return getattr(self.module_class, "any_size", False) is True

    def encode(self, images):
        side, patch, size = self.config.image_size, self.config.patch_size, tuple(images.shape[-2:])
        if self.any_size and any(pixels % patch for pixels in size):
            raise LlavaError(f"the vision tower takes images in multiples of {patch} pixels, got {size}")
        if not self.any_size and size != (side, side):
            raise LlavaError(
                f"the vision tower takes images of {side}x{side} pixels, got {size}; check the image processor's size"
            )
        found = self.vision_tower(images)
        if isinstance(found, torch.Tensor) and found.ndim == 4:  # a feature map, row by row
            found = found.flatten(2).transpose(1, 2)
        tokens = size[0] // patch * (size[1] // patch) if self.any_size else self.config.tokens_per_side**2
        expected = (len(images), tokens, self.config.hidden_size)
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected:
            shape = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            why = "one a patch, since its class says any_size" if self.any_size else "as when it was first tried"
            raise LlavaError(
                f"{self.what}: for images {list(images.shape)} it returned {shape}, expected tokens {list(expected)}, "
                f"{why}"
            )
        return found

    def reset_buffers(self):
        super().reset_buffers()
        if not any(True for _ in _unsaved(self.vision_tower)):
            return
        with torch.device("cpu"):
            weights, self.weights_file = self.weights_file, None
            fresh = self.make()
            self.weights_file = weights
        again = {(path, name): value for path, _, name, value in _unsaved(fresh)}
        device = self.device
        for path, module, name, value in list(_unsaved(self.vision_tower)):
            if (path, name) in again:
                new = again[path, name]
                setattr(module, name, new.to(device, value.dtype if new.is_floating_point() else new.dtype))

    @property
    def num_patches_per_side(self):
        return self.config.tokens_per_side if self.token_compressor is None else self.token_compressor.output_grid_size


def _unsaved(module: nn.Module):
    """(path, submodule, attribute, tensor) of what a module computes with and no checkpoint holds."""
    for path, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            if getattr(part, name) is not None:
                yield path, part, name, getattr(part, name)
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield path, part, name, value
