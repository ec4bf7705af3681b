"""Tokens of labelled pictures by frozen towers, as the projector would get them, computed once and kept on disk.

Shapes: N pictures, n tokens of a picture, T of the longest in a batch, D channels.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from llava.compare.probe_folder import THREADS, Pictures, fingerprint, write_json
from llava.errors import LlavaError

IN_FILE, AT_ONCE = 256, 16  # pictures of a file; that go through the tower together
_HALF_RANGE = torch.finfo(torch.float16).max
_SCHEMA = 1


class Features:
    """Tokens of pictures, read from memory-mapped files as they are asked for.

    Args:
        files: the content of each file, in the pictures' order: `tokens` [M, D] one picture after the other, `lengths`,
            and of each picture's channels the `means` and `squares` (means of squares) [pictures, D].
        device: where batches go.

    Attributes:
        means: [N, D] float64, on the CPU.
    """

    def __init__(self, files: list[dict], device="cpu"):
        self._device = device
        self.means = torch.cat([content["means"] for content in files])
        self._squares = torch.cat([content["squares"] for content in files])
        self._tokens = [part for f in files for part in f["tokens"].split(f["lengths"].tolist())]

    @property
    def tokens_per_picture(self) -> float:
        return sum(map(len, self._tokens)) / len(self._tokens)

    def batch(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T, D] in float32 and mask [B, T], true where there is a token."""
        parts = [self._tokens[row] for row in rows]
        lengths = torch.tensor([len(part) for part in parts])
        padded = pad_sequence(parts, batch_first=True).to(self._device, torch.float32)
        return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(self._device)

    def moments(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the channels over these pictures' tokens, [D] each; a picture counts once."""
        mean = self.means[rows].mean(0)
        deviation = (self._squares[rows].mean(0) - mean.square()).clamp(min=0).sqrt()
        deviation = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0)
        return mean.float(), deviation.float()


def tower_features(
    settings, pictures: Pictures, folder: Path, device, quiet: bool = False
) -> tuple[Features, str, Path]:
    """The features of all pictures by one tower, out of the folder or computed and put there.

    The folder's subfolder is named by a hash of the tower's settings, class, image processor and weights and of the
    pictures. A file of 256 pictures is written whole, so that what a killed run has computed is kept. Tokens are kept
    as float16 (float32 where they exceed its range), a picture's mean over them as it was.

    Args:
        settings: as `llava.model.multimodal_encoder.builder.build_vision_tower` takes them, with the keys that say how
            a picture becomes pixels (`image_aspect_ratio`, ...).

    Returns:
        The features, a note on what is in them, or "", and the subfolder.

    Raises:
        LlavaError: a tower that cannot be built, a picture it cannot take, or features that are not finite.
    """
    tower, pixels, note = load_tower(settings, device)
    key = _key(tower, settings, pictures)
    folder = folder / key
    about = {"vision_tower": tower.vision_tower_name, "settings": _plain(settings), "pictures": len(pictures.paths)}
    write_json(folder / "about.json", about)
    batches = [pictures.paths[at : at + IN_FILE] for at in range(0, len(pictures.paths), IN_FILE)]
    files = [folder / f"{number:05d}.safetensors" for number in range(len(batches))]
    there = [_read(file) for file in files]
    missing = [number for number, content in enumerate(there) if content is None]
    encoder = _Encoder(tower, pixels, pictures.folder)
    for number, content in zip(missing, encoder.files([batches[i] for i in missing], quiet), strict=True):
        half = files[number].with_suffix(".tmp")
        save_file(content, half)
        os.replace(half, files[number])
        there[number] = _read(files[number])
    return Features(there, device), note, folder


def load_tower(settings, device) -> tuple[object, object, str]:
    """(the frozen tower with its weights in float32, `PixelOptions`, a note or "").

    Raises:
        LlavaError: as `llava.families.llava_layout.vision_layout`, `check_layout` and the tower's own loading do.
    """
    from llava.families.llava_layout import check_layout, vision_layout
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.token_compressor import load_token_compressor

    layout = vision_layout(copy(settings))  # it fills in what it finds
    check_layout(layout, "image")  # before any weight is read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = build_vision_tower(settings)
    note, compressor = "", tower.token_compressor
    if compressor is not None and getattr(settings, "pretrain_token_compressor", None):
        load_token_compressor(compressor, settings.pretrain_token_compressor)
    elif compressor is not None:
        note = "the token compressor is untrained (no pretrain_token_compressor)"
    return tower.requires_grad_(False).to(device, torch.float32).eval(), layout.pixels, note


def _plain(settings) -> dict:
    """The settings that say what a tower gives: keys of a tower's own."""
    from llava.config.schema import own_keys

    names = [name for name, key in own_keys().items() if key.tower]
    return {name: getattr(settings, name, None) for name in sorted([*names, "mm_vision_tower"])}


def _key(tower, settings, pictures: Pictures) -> str:
    """Changes with whatever the features depend on."""
    encoder, processor = type(tower.vision_tower), tower.image_processor
    said = {
        "schema": [_SCHEMA, IN_FILE],
        "settings": _plain(settings),
        "classes": [f"{kind.__module__}.{kind.__qualname__}" for kind in (type(tower), encoder)],
        "processor": processor.to_dict() if hasattr(processor, "to_dict") else vars(processor),
        "weights": _weights(tower),
        "pictures": fingerprint(pictures.folder, pictures.paths),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _weights(tower) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(file: Path) -> dict | None:
    """The content of a file of pictures; None where it is to be written (anew)."""
    try:
        return load_file(file) if file.is_file() else None
    except SafetensorError:
        return None


class _Encoder:
    """Pictures through a tower, read ahead by threads."""

    def __init__(self, tower, pixels, folder: str):
        self.tower, self.pixels, self.folder = tower, pixels, folder

    def files(self, lists: list[list[str]], quiet: bool):
        """For each list of pictures what is written of them."""
        from tqdm import tqdm

        batches = [paths[at : at + AT_ONCE] for paths in lists for at in range(0, len(paths), AT_ONCE)]
        total, name = sum(map(len, lists)), os.path.basename(self.tower.vision_tower_name.rstrip("/"))
        with (
            ThreadPoolExecutor(THREADS) as pool,
            tqdm(total=total, desc=f"features of {name}", unit="picture", disable=quiet or not total) as bar,
        ):
            encoded = self._encoded(pool, batches, bar)
            for paths in lists:
                parts = [part for _ in range(0, len(paths), AT_ONCE) for part in next(encoded)]
                yield self._content(parts)

    def _encoded(self, pool, batches, bar):
        """The tokens [n, D] of each batch's pictures; while it is encoded the next one is read."""
        ahead = None
        for paths in [*batches, []]:
            waiting = [pool.submit(self._pixels_of, path) for path in paths]
            if ahead is not None:
                found = self._tokens([future.result() for future in ahead])
                bar.update(len(found))
                yield found
            ahead = waiting

    def _pixels_of(self, path: str):
        """[crops, 3, H, W], one crop where nothing else is said."""
        from llava.images.processing import process_pictures
        from llava.images.reading import load_image

        path = os.path.join(self.folder, path)
        (made,) = process_pictures([load_image(path)], self.tower.image_processor, self.pixels, [path])
        return made if made.ndim == 4 else made[None]

    @torch.no_grad()
    def _tokens(self, pixels: list) -> list[torch.Tensor]:
        """A picture's crops' tokens, one crop after the other."""
        counts = [len(crops) for crops in pixels]
        # each crop by itself: a tower that sees time would take several at once for a clip
        features = iter(self.tower([crop.to(self.tower.device) for crops in pixels for crop in crops]))
        return [torch.cat([next(features) for _ in range(count)]) for count in counts]

    def _content(self, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(part) for part in parts])
        means = torch.stack([part.double().mean(0) for part in parts]).cpu()
        squares = torch.stack([part.double().square().mean(0) for part in parts]).cpu()
        if not squares.isfinite().all():
            raise LlavaError(f"vision tower {self.tower.vision_tower_name}: its features are not finite numbers")
        tokens = torch.cat(parts).cpu()
        dtype = torch.float32 if tokens.abs().max() > _HALF_RANGE else torch.float16
        return {"tokens": tokens.to(dtype), "lengths": lengths, "means": means, "squares": squares}


def laid_over(settings, images: dict | None) -> SimpleNamespace:
    """A tower's settings with a recipe's keys for pictures in place of its own."""
    return SimpleNamespace(**{**vars(settings), **(images or {})})
