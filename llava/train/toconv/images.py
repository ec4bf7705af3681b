"""A folder of images, as tokens of the frozen encoder: computed when they are needed, or once and kept on disk."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.errors import LlavaError
from llava.images import PICTURE_SUFFIXES
from llava.images.reading import load_image

UNKNOWN, GOOD, BAD = 0, 1, 2  # of an image in the cache


def find_images(folder: str, key: str) -> list[Path]:
    """Paths of all images below a folder, sorted; `LlavaError` if there is no such folder or nothing in it."""
    root = Path(folder)
    if not root.is_dir():
        raise LlavaError(f"{key}: found no folder {folder}, expected one with images")
    found = [Path(base, name) for base, _, names in os.walk(root, followlinks=True) for name in names]
    paths = sorted(path for path in found if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise LlavaError(f"{key}: found no images in {folder}, expected some of {', '.join(PICTURE_SUFFIXES)}")
    return paths


def hold_out(paths: list[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """(training images, held-out images), decided by the seed; at least one of each."""
    if len(paths) < 2:
        raise LlavaError(f"image_folder: found one image, {paths[0]}, expected two or more: some are held out")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(share * len(paths)), 1), len(paths) - 1)
    return [paths[i] for i in sorted(order[count:])], [paths[i] for i in sorted(order[:count])]


def image_class(path: Path, folder: str) -> str | None:
    """Name of the first subfolder, the class of an image; None right below the folder."""
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else None


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each step's images in one epoch, over all processes; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    size = min(batch_size, count)
    return [order[i : i + size] for i in range(0, count - size + 1, size)]


class _Pixels(Dataset):
    """(index, pixels or None, what is wrong with the image)."""

    def __init__(self, paths, processor):
        self.paths, self.processor = paths, processor

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            image = load_image(str(self.paths[index]))
        except LlavaError as error:
            return index, None, str(error)
        return index, self.processor(image, return_tensors="pt")["pixel_values"][0], None


class ImageTokens:
    """Tokens of the images at `paths`, of which the unreadable ones are named once, left out and counted.

    Args:
        tower: a loaded `VisionTower`.
        num_workers: processes that read images.
    """

    def __init__(self, paths: list[Path], tower, num_workers: int = 0):
        self.paths, self.tower, self.num_workers = paths, tower, num_workers
        self.pixels = _Pixels(paths, tower.image_processor)
        self.cache: TokenCache | None = None
        self.bad: set[int] = set()

    def __len__(self):
        return len(self.paths)

    def batches(self, batches: list[list[int]]):
        """For each list of indices (those of the readable images, [b], and their tokens, [b, N, D])."""
        if self.cache is not None:
            for batch in batches:
                good = [i for i in batch if self.cache.state[i] == GOOD]
                yield good, self.cache.tokens[good].to(self.tower.device)
            return
        loader = DataLoader(
            self.pixels, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list, pin_memory=False
        )
        for samples in loader:
            for index, _, error in samples:
                if error is not None:
                    self.report(index, error)
            good = [(index, pixels) for index, pixels, error in samples if error is None]
            yield [index for index, _ in good], self.encode([pixels for _, pixels in good])

    def report(self, index: int, error: str) -> None:
        if index not in self.bad:
            self.bad.add(index)
            tqdm.write(f"left out: {error}")

    @torch.no_grad()
    def encode(self, pixels: list[torch.Tensor]):
        if not pixels:
            side = self.tower.num_patches_per_side
            return torch.empty(0, side**2, self.tower.feature_size, device=self.tower.device)
        images = torch.stack(pixels).to(self.tower.device, self.tower.dtype)
        return self.tower.features(images)

    def use_cache(self, folder: str, accelerator, batch_size: int) -> None:
        """Read tokens from `folder` from now on; those not in it yet are computed first, a share on each process."""
        with accelerator.main_process_first():
            cache = TokenCache(folder, self.paths, self.tower)
        missing = (cache.state == UNKNOWN).nonzero().flatten().tolist()
        accelerator.wait_for_everyone()  # all know what is missing before one of them writes
        missing = missing[accelerator.process_index :: accelerator.num_processes]
        batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        bar = tqdm(total=len(missing), desc="cache", unit="image", disable=not accelerator.is_main_process)
        with bar:
            for batch, (good, tokens) in zip(batches, self.batches(batches), strict=True):
                cache.tokens[good] = tokens.cpu()
                cache.state[batch] = BAD
                cache.state[good] = GOOD
                bar.update(len(batch))
        accelerator.wait_for_everyone()
        for index in (cache.state == BAD).nonzero().flatten().tolist():
            self.report(index, f"image {self.paths[index]}: could not be read when {folder} was filled")
        self.cache = cache


class TokenCache:
    """Memory-mapped `tokens` [images, N, D] in the tower's dtype, `state` [images], and what they are of.

    Raises:
        LlavaError: the folder holds tokens of other images or of another tower.
    """

    def __init__(self, folder: str, paths: list[Path], tower):
        count, tokens, dim = len(paths), tower.num_patches_per_side**2, tower.feature_size
        os.makedirs(folder, exist_ok=True)
        self._check(os.path.join(folder, "cache.json"), self._signature(paths, tower))
        self.state = torch.from_file(os.path.join(folder, "state.bin"), shared=True, size=count, dtype=torch.uint8)
        file = os.path.join(folder, "tokens.bin")
        flat = torch.from_file(file, shared=True, size=count * tokens * dim, dtype=tower.dtype)
        self.tokens = flat.view(count, tokens, dim)

    @staticmethod
    def _signature(paths, tower) -> dict:
        digest = hashlib.sha256()
        for path in paths:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return {
            "vision_tower": tower.vision_tower_name,
            "mm_vision_select_layer": tower.select_layer,
            "shape": [len(paths), tower.num_patches_per_side**2, tower.feature_size],
            "dtype": str(tower.dtype),
            "images": digest.hexdigest(),
        }

    @staticmethod
    def _check(path: str, expected: dict) -> None:
        if not os.path.exists(path):
            with open(path, "w") as file:
                json.dump(expected, file, indent=1)
            return
        with open(path) as file:
            found = json.load(file)
        for name, value in expected.items():
            if found.get(name) != value:
                raise LlavaError(
                    f"{path}: {name}: found {found.get(name)}, expected {value}; name another "
                    "feature_cache, or delete it"
                )
