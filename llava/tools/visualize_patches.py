"""Show which patch sizes a picture is cut into, and why.

    python -m llava.tools.visualize_patches --input-image photo.jpg --patch-selection-method budget --alpha 0.3

Each picture, resized to multiples of twice the patch size as Qwen2-VL does it, gives three PNG files: NAME_patches (the
picture with the outlines of its patches, a colour for each size), NAME_importance (a heat map) and NAME_side_by_side;
small pictures are drawn enlarged. stats.json holds the figures of all. A folder is read without its subfolders. A
picture that cannot be read is reported and left out; the exit status is then 1.

Without --output-dir the files lie beside the picture, and the figures in NAME_stats.json; those of a folder lie in
FOLDER_patches beside it. Then only what an earlier run has left is written over.
"""

import argparse
import errno
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from llava.config.patch_choice import IMPORTANCES, MEMBERS, METHODS, NUM_SCALES, PatchChoice
from llava.errors import LlavaError, report_errors
from llava.images import PICTURE_SUFFIXES

PANELS = ("patches", "importance", "side_by_side")
OPTIONS = {member: f"--{member.replace('_', '-')}" for member in MEMBERS} | {"method": "--patch-selection-method"}


@dataclass(frozen=True)
class Output:
    """Where the results of a source go: a folder, the file of the figures, and whether both follow from the source."""

    source: str
    folder: str
    stats: str
    beside: bool

    @classmethod
    def of(cls, source: str, output_dir: str | None) -> "Output":
        if output_dir is not None:
            return cls(source, output_dir, os.path.join(output_dir, "stats.json"), False)
        path = os.path.realpath(source) if os.path.isdir(source) else os.path.abspath(source)
        if os.path.isdir(path):
            return cls(source, f"{path}_patches", os.path.join(f"{path}_patches", "stats.json"), True)
        return cls(source, os.path.dirname(path), f"{os.path.splitext(path)[0]}_stats.json", True)

    def files(self, name: str) -> dict[str, str]:
        """{panel: path} of one picture's panels."""
        return {panel: os.path.join(self.folder, f"{name}_{panel}.png") for panel in PANELS}

    def make(self, pictures: dict[str, Path]) -> None:
        """Make the folder; `LlavaError` where it cannot be written to, or holds files that are not results."""
        if self.beside and not _results_of(pictures.values(), self.stats):
            files = [self.stats, *(path for name in pictures for path in self.files(name).values())]
            taken = next((path for path in files if os.path.lexists(path)), None)
            if taken is not None:
                raise LlavaError(
                    f"{taken}: exists, and no earlier run on {self.source} has written it; move it, or name a folder "
                    "with --output-dir"
                )
        try:
            os.makedirs(self.folder, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise self.unwritable(error) from None

    def write_stats(self, options: dict, found: list[dict], failed: list[dict]) -> None:
        with open(self.stats, "w") as file:
            json.dump({"options": options, "pictures": found, "failed": failed}, file, indent=1, sort_keys=True)
            file.write("\n")

    def unwritable(self, error: OSError) -> LlavaError:
        wish = "; name a folder with --output-dir" if self.beside else ""
        return LlavaError(f"--output-dir {self.folder}: cannot be written to ({error.strerror or error}){wish}")


def _results_of(pictures, stats: str) -> bool:
    """Whether a file holds the figures that an earlier run has written of some of these pictures."""
    if not os.path.isfile(stats):  # a pipe would be waited for
        return False
    try:
        with open(stats) as file:
            found = json.load(file)
        told = {entry["file"] for entry in (*found["pictures"], *found["failed"])}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not told.isdisjoint(file.name for file in pictures)


def find_pictures(path: str, output_dir: str) -> dict[str, Path]:
    """{name of its results: file} of a picture or of a folder's pictures, sorted.

    Raises:
        LlavaError: there is nothing at `path`, or the results would lie among the pictures.
    """
    source = Path(path)
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise LlavaError(f"--input-image {path}: no such file or folder")
    if os.path.realpath(output_dir) == os.path.realpath(path):
        raise LlavaError(f"--output-dir {output_dir}: is the folder of the pictures, expected another one")
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file())
    if not files:
        raise LlavaError(
            f"--input-image {path}: found no pictures in the folder, expected {', '.join(PICTURE_SUFFIXES)}"
        )
    stems = [file.stem for file in files]
    return {file.stem if stems.count(file.stem) == 1 else file.name: file for file in files}


def make_tokenizer(args):
    """The `PatchTokenizer` that the options ask for, of pixels as 0..1."""
    from llava.model.adaptive_patches import PatchTokenizer

    given = args.patch_selection_method, args.alpha, args.thresholds, args.importance
    choice = PatchChoice.from_published(*given, num_scales=args.num_scales, names=OPTIONS)
    if choice is None:
        importance = args.importance
        return PatchTokenizer(args.num_scales, args.patch_size, None, (0,) * 3, (1,) * 3, "all", importance=importance)
    return PatchTokenizer.from_choice(choice, args.patch_size, (0, 0, 0), (1, 1, 1))


def resized(image, patch_size: int, min_pixels: int, max_pixels: int):
    """The picture in the size and with the filter of Qwen2-VL's image processor."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        height, width = smart_resize(image.height, image.width, 2 * patch_size, min_pixels, max_pixels)
    except ValueError as error:
        raise LlavaError(f"found {image.width}x{image.height} pixels: {error}") from None
    return image.resize((width, height), Image.Resampling.BICUBIC)


def select(tokenizer, image):
    """(importance maps, masks, levels) of one picture, without the batch."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    maps = tokenizer.compute_importance_maps(pixels)
    masks, levels, _ = tokenizer.construct_masks(maps)
    return *({size: values[0] for size, values in part.items()} for part in (maps, masks)), levels[0]


def draw(image, maps, levels, found: dict, importance: str) -> dict:
    """The three panels by the ending of their file's name; `found` is what `figures` tells."""
    from llava.drawing.panels import heat_panel, patch_panel, side_by_side, zoom_of
    from llava.model.adaptive_patches.importance import OUTSIDE

    # of the base patches; their reconstruction error is 0, and the next size shows more
    size = sorted(maps)[min(importance == "reconstruction", len(maps) - 1)]
    values = maps[size].masked_fill(maps[size] >= OUTSIDE, math.nan).numpy()
    known = values[values == values]
    unit, highest = "", float(known.max()) if known.size else 0.0
    if importance == "entropy":
        unit, highest = ", bits", math.log2(min(size**2, 512))  # one scale for all pictures
    zoom = zoom_of(*image.size)
    title = f"{found['tokens']:,} of {found['all_tokens']:,} tokens ({found['retention']:.1%})"
    counts = {int(size): count for size, count in found["counts"].items()}
    patches = patch_panel(image, levels.numpy(), counts, zoom, title)
    heat = heat_panel(values, size, highest, zoom, *image.size, f"{importance} of {size} px patches{unit}")
    return {"patches": patches, "importance": heat, "side_by_side": side_by_side(patches, heat)}


def figures(original, image, masks, tokenizer) -> dict:
    """What stats.json tells of one picture."""
    counts = {str(size): int(mask.sum()) for size, mask in masks.items()}
    tokens, all_tokens = sum(counts.values()), masks[tokenizer.base_patch_size].numel()
    small = counts[str(tokenizer.base_patch_size)]
    info = tokenizer.last_budget_info
    return {
        "size": list(original.size),
        "resized": list(image.size),
        "counts": counts,
        "tokens": tokens,
        "all_tokens": all_tokens,
        "retention": tokens / all_tokens,
        "target_retention": None if info is None else min(info["alpha"].item(), 1.0),
        # behind a merger of 2x2 base patches, where a larger patch is one token as well
        "merged_tokens": small // 4 + tokens - small,
        "all_merged_tokens": all_tokens // 4,
        "budget": None if info is None else {name: values.item() for name, values in info.items()},
    }


def line_of(name: str, found: dict) -> str:
    """One picture's line on the terminal."""
    target = found["target_retention"]
    counts = ", ".join(f"{count} of {size} px" for size, count in found["counts"].items())
    words = [
        f"{name}: {found['resized'][0]}x{found['resized'][1]} px",
        f"target {target:.1%}" if target is not None else "no target",
        f"real {found['retention']:.1%} ({found['tokens']} of {found['all_tokens']} tokens: {counts})",
        f"merged 2x2 {found['merged_tokens']} of {found['all_merged_tokens']}",
    ]
    if target is not None and found["budget"]["budget"] < found["budget"]["base_tokens"]:
        words.append(f"the largest patches alone are {found['budget']['base_tokens']} tokens")
    return ", ".join(words)


def visualize(name: str, file: Path, tokenizer, args, output: Output) -> dict:
    """Write one picture's panels; returns its figures."""
    from llava.images.reading import load_image

    original = load_image(str(file))
    try:
        image = resized(original, args.patch_size, args.min_pixels, args.max_pixels)
    except LlavaError as error:
        raise LlavaError(f"image {file}: {error}") from None
    maps, masks, levels = select(tokenizer, image)
    found = figures(original, image, masks, tokenizer)
    panels = draw(image, maps, levels, found, args.importance)
    for panel, path in output.files(name).items():
        panels[panel].save(path)
    return {"file": file.name, **found}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tools.visualize_patches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    kinds = f"a picture, or a folder of {', '.join(PICTURE_SUFFIXES)}"
    source.add_argument("--input-image", "--input-dir", metavar="P", help=kinds)
    source.add_argument("input", nargs="?", metavar="P", help="the same")
    add(
        "-o", "--output", "--output-dir", dest="output_dir", metavar="D", help="folder for the results, made if missing"
    )
    add("--patch-selection-method", choices=(*METHODS, "all"), default="budget", help="default: budget")
    add("--alpha", type=float, help="budget: share of the tokens to keep; v2: threshold over the mean importance")
    add(
        "--thresholds",
        type=float,
        nargs="*",
        metavar="T",
        help="v1: one for each larger size (default for entropy: 3 2)",
    )
    add("--importance", choices=IMPORTANCES, default="entropy", help="default: entropy")
    add("--patch-size", type=int, default=14, help="smallest patch in pixels (default: 14)")
    add("--num-scales", type=int, default=NUM_SCALES, help="how many sizes, each twice the one before (default: 3)")
    add("--min-pixels", type=int, default=56 * 56, help="smaller pictures are enlarged (default: 3136, as Qwen2-VL)")
    add("--max-pixels", type=int, default=28 * 28 * 1280, help="larger ones reduced (default: 1003520, as Qwen2-VL)")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    source = args.input_image or args.input
    output = Output.of(source, args.output_dir)
    pictures = find_pictures(source, output.folder)
    tokenizer = make_tokenizer(args)
    if not (2 * args.patch_size) ** 2 <= args.min_pixels <= args.max_pixels:
        raise LlavaError(
            f"--min-pixels, --max-pixels: found {args.min_pixels}, {args.max_pixels}, expected the first not above the "
            f"second, and at least {(2 * args.patch_size) ** 2}"
        )
    output.make(pictures)
    options = {key: value for key, value in vars(args).items() if key not in ("input", "input_image", "output_dir")}
    options["thresholds"] = tokenizer.thresholds
    try:
        # first, so that what a run leaves that is cut short is known as its own
        output.write_stats(options, [], [{"file": file.name, "error": "not drawn yet"} for file in pictures.values()])
        found, failed = visualize_all(pictures, tokenizer, args, output)
        output.write_stats(options, found, failed)
    except OSError as error:
        raise output.unwritable(error) from None
    print(f"{len(found)} of {len(pictures)} pictures in {output.folder}")
    return 1 if failed else 0


def visualize_all(pictures: dict[str, Path], tokenizer, args, output: Output) -> tuple[list[dict], list[dict]]:
    """(figures of those that were drawn, faults of the others), each told as it comes."""
    found, failed = [], []
    for name, file in pictures.items():
        try:
            found.append(visualize(name, file, tokenizer, args, output))
        except LlavaError as error:
            failed.append({"file": file.name, "error": str(error)})
            print(f"error: {error}", file=sys.stderr)
            continue
        print(line_of(file.name, found[-1]), flush=True)
    return found, failed


if __name__ == "__main__":
    raise SystemExit(main())
