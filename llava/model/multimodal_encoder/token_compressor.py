"""ToConv: fewer visual tokens by one partial convolution over the grid of tokens.

Shapes: B images, N = in*in tokens of D channels on a square grid; k kernel, s stride, p padding, in tokens.
"""

import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from llava.errors import LlavaError
from llava.model.checkpoint import assign, named_or_beside, read_weights

NUM_GROUPS = 32
MAX_KERNEL_SIZE = 7
# (input_grid_size, output_grid_size) -> (kernel_size, stride, padding), as published
PUBLISHED_GEOMETRIES = {(24, 12): (3, 2, 1), (24, 8): (3, 3, 0), (16, 12): (5, 1, 0), (16, 8): (3, 2, 1)}
WEIGHT_FILES = ("token_compressor.safetensors", "model.safetensors")
ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def compression_geometry(input_grid_size: int, output_grid_size: int) -> tuple[int, int, int]:
    """(kernel_size, stride, padding) that turns a square grid of tokens into a smaller one.

    24->12, 24->8, 16->12 and 16->8 are as published. Any other pair gets the smallest kernel that gives the output size
    and leaves no token out (stride <= kernel, and the last window reaches the last token) with padding <= kernel // 2;
    of several, the least padding and then the largest stride. Equal sizes give a 1x1 kernel: the same layers
    without compression, the control of a comparison.

    Raises:
        LlavaError: a size that is no positive integer, an output above the input, or a kernel above 7.
    """
    sizes = {"input_grid_size": input_grid_size, "output_grid_size": output_grid_size}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise LlavaError(f"token compression: {name}: found {size!r}, expected the tokens per side")
    title = f"token compression {input_grid_size}x{input_grid_size} -> {output_grid_size}x{output_grid_size}"
    if output_grid_size > input_grid_size:
        raise LlavaError(f"{title}: the output grid is larger than the input grid; expected at most {input_grid_size}")
    if (input_grid_size, output_grid_size) in PUBLISHED_GEOMETRIES:
        return PUBLISHED_GEOMETRIES[input_grid_size, output_grid_size]
    geometry = _smallest_geometry(input_grid_size, output_grid_size)
    if geometry[0] > MAX_KERNEL_SIZE:
        raise LlavaError(
            f"{title}: needs a kernel of {geometry[0]}, expected at most {MAX_KERNEL_SIZE}: a wider one mixes tokens "
            "that are far apart; choose sizes whose ratio is nearer to a whole number, or less compression"
        )
    return geometry


def _smallest_geometry(n_in: int, n_out: int) -> tuple[int, int, int]:
    for kernel in range(1, n_in - n_out + 2):  # the last one always does, with stride 1 and no padding
        for padding in range(kernel // 2 + 1):
            for stride in range(kernel, 0, -1):
                right_size = (n_in + 2 * padding - kernel) // stride + 1 == n_out
                if right_size and (n_out - 1) * stride + kernel - padding >= n_in:
                    return kernel, stride, padding


class PartialConv2d(nn.Module):
    """Partial convolution (arXiv 1804.07723) of a square grid on which every input is valid, D -> D, no bias.

    The convolution of the zero-padded grid, times kernel area / taps inside the grid at each output position. Since
    only the padding is invalid, that factor is constant: the buffer `correction` [1, 1, out, out], which is not saved.
    """

    def __init__(self, channels: int, input_grid_size: int, kernel_size: int, stride: int, padding: int):
        super().__init__()
        self.input_grid_size = input_grid_size
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, padding, bias=False)
        self.register_buffer("correction", self._correction(), persistent=False)

    def _correction(self, device=None):
        (k, _), (s, _), (p, _) = self.conv.kernel_size, self.conv.stride, self.conv.padding
        starts = torch.arange(-p, self.input_grid_size + p - k + 1, s, device=device)
        taps = (starts + k).clamp(max=self.input_grid_size) - starts.clamp(min=0)  # along one axis
        return (k * k / (taps[:, None] * taps))[None, None]

    def reset_buffers(self):
        self.correction.copy_(self._correction(self.correction.device))

    def forward(self, x):
        """[B, D, in, in] -> [B, D, out, out]."""
        y = self.conv(x)
        return y * self.correction.to(y.dtype)


class TokenCompressor(nn.Module):
    """ToConv: partial convolution, GroupNorm of 32 groups, GELU, plus a learned position embedding [1, D, out, out].

    Args:
        input_grid_size: tokens per side of the encoder's grid.
        output_grid_size: tokens per side that are left; `compression_geometry` says which sizes are possible.
        hidden_dim: channels of a token, a multiple of 32.

    Raises:
        LlavaError: sizes or channels that cannot be.
    """

    def __init__(self, input_grid_size: int, output_grid_size: int, hidden_dim: int):
        super().__init__()
        geometry = compression_geometry(input_grid_size, output_grid_size)
        if type(hidden_dim) is not int or hidden_dim < 1 or hidden_dim % NUM_GROUPS:
            raise LlavaError(
                f"token compression: hidden_dim: found {hidden_dim!r}, expected a multiple of {NUM_GROUPS}, the number "
                "of groups of its GroupNorm"
            )
        self.input_grid_size, self.output_grid_size, self.hidden_dim = input_grid_size, output_grid_size, hidden_dim
        self.kernel_size, self.stride, self.padding = geometry
        self.compress_conv = PartialConv2d(hidden_dim, input_grid_size, *geometry)
        self.norm = nn.GroupNorm(NUM_GROUPS, hidden_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, hidden_dim, output_grid_size, output_grid_size))
        nn.init.normal_(self.pos_embed, std=0.02)

    def reset_buffers(self):
        """Compute the constant buffer again: transformers 5 leaves it uninitialised where it loads a checkpoint."""
        self.compress_conv.reset_buffers()

    def reset_parameters(self):
        """Fresh random weights, for a compressor that a checkpoint does not have."""
        self.compress_conv.conv.reset_parameters()
        self.norm.reset_parameters()
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, tokens):
        """[B, in*in, D] -> [B, out*out, D], both row-major.

        Raises:
            LlavaError: tokens of another grid or width.
        """
        side = self.input_grid_size
        if tokens.ndim != 3 or tokens.shape[1:] != (side**2, self.hidden_dim):
            raise LlavaError(
                f"token compression {self._grids()}: found {_describe(tokens)}, expected [images, {side**2}, "
                f"{self.hidden_dim}], a grid of {side}x{side}"
            )
        x = tokens.transpose(1, 2).unflatten(2, (side, side))
        x = F.gelu(self.norm(self.compress_conv(x))) + self.pos_embed
        return x.flatten(2).transpose(1, 2)

    def _grids(self) -> str:
        return f"{self.input_grid_size}x{self.input_grid_size} -> {self.output_grid_size}x{self.output_grid_size}"

    def extra_repr(self) -> str:
        field = f"{self.kernel_size}x{self.kernel_size}"
        return (
            f"{self._grids()} tokens of {self.hidden_dim}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, receptive field {field} tokens"
        )


def _describe(tokens) -> str:
    shape = list(tokens.shape)
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    return f"tokens {shape}, " + (f"a grid of {side}x{side}" if side and side**2 == shape[1] else "no square grid")


def load_token_compressor(compressor: TokenCompressor, path: str) -> None:
    """Load trained weights into a compressor.

    Args:
        compressor: one of the same geometry and width.
        path: a .safetensors file, a .pth, .pt or .bin file of tensors, or a folder that holds
            token_compressor.safetensors or model.safetensors. Names are the compressor's own, possibly nested under
            `compressor_state_dict` or wrapped by `torch.compile` or `DistributedDataParallel`; or those of a LLaVA
            checkpoint, of which only the compressor is taken. The published constant `mask_kernel` is ignored.

    Raises:
        LlavaError: no such file, no file of tensors, names and shapes that are not the compressor's, or grids that are
            not, where the file names them: 24 -> 8 and 16 -> 8 have weights of the same shapes.
    """
    path = _weight_file(path)
    _check_grids(compressor, path)
    found = _compressor_weights(path)
    parameters = dict(compressor.named_parameters())
    # under ZeRO-3 a parameter is empty and `ds_shape` is what it was
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        listed = ", ".join(
            f"{name}: found {shapes.get(name, 'none')}, expected {expected.get(name, 'none')}" for name in wrong[:4]
        )
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise LlavaError(f"{path}: does not fit the token compression {compressor._grids()}: {listed}{more}")
    for name, parameter in parameters.items():
        assign(parameter, found[name])
    compressor.reset_buffers()


def grid_metadata(compressor: TokenCompressor) -> dict[str, str]:
    """A compressor's grids, for the header of its .safetensors file."""
    return {key: str(getattr(compressor, key)) for key in ("input_grid_size", "output_grid_size")}


def _check_grids(compressor: TokenCompressor, path: str) -> None:
    if not path.endswith(".safetensors") or not os.path.isfile(path):
        return
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except SafetensorError:
        return  # said where the weights are read
    expected = grid_metadata(compressor)
    if found.keys() >= expected.keys() and any(found[key] != value for key, value in expected.items()):
        raise LlavaError(
            f"{path}: compresses {found['input_grid_size']} -> {found['output_grid_size']} tokens a side, expected "
            f"{expected['input_grid_size']} -> {expected['output_grid_size']}"
        )


def _weight_file(path: str) -> str:
    if os.path.isdir(path):
        files = (os.path.join(path, name) for name in WEIGHT_FILES)
        path_inside = next((file for file in files if os.path.isfile(file)), None)
        if path_inside is None:
            raise LlavaError(f"{path}: found no weights of a token compressor, expected {' or '.join(WEIGHT_FILES)}")
        return path_inside
    if not path.endswith(ENDINGS):
        raise LlavaError(f"{path}: found no known ending, expected {', '.join(ENDINGS)} or a folder")
    return named_or_beside(path)


def _compressor_weights(path: str) -> dict[str, torch.Tensor]:
    """The compressor's tensors under its own names."""
    state = read_weights(path)
    if isinstance(state, dict):
        state = state.get("compressor_state_dict", state)
    if not isinstance(state, dict):
        raise LlavaError(f"{path}: found {type(state).__name__}, expected names and tensors of a token compressor")
    state = {_plain_name(name): value for name, value in state.items()}
    prefix = "token_compressor."  # with model.vision_tower. before it in the checkpoints of whole models
    state = {name.split(prefix, 1)[1]: value for name, value in state.items() if prefix in name} or state
    state.pop("compress_conv.mask_kernel", None)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise LlavaError(f"{path}: {name}: found {type(value).__name__}, expected a token compressor's tensors")
    return state


def _plain_name(name) -> str:
    name = str(name).replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
