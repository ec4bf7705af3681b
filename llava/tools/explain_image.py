"""Show, step by step, what LLaVA-NeXT's image handling makes of a photo, and how many tokens it costs.

    python -m llava.tools.explain_image photo.jpg                                # LLaVA-NeXT as published, CLIP-L/336
    python -m llava.tools.explain_image photo.jpg --config configs/train/finetune_onevision.yaml --output walk.png
    python -m llava.tools.explain_image photo.jpg --model-path checkpoints/mine --prompt "What is shown?"
    python -m llava.tools.explain_image photo.jpg --grid "(1x1),...,(6x6)" --crop 384 --patch 14

With --config, further `--key value` pairs override the config as in training.
"""

import argparse
import sys
from typing import NamedTuple

from llava.errors import LlavaError, report_errors


class Prompt(NamedTuple):
    """A rendered prompt: its text, `tokens` of it that are text, and the longest sequence, with that limit's name."""

    text: str
    template: str
    tokens: int
    source: str
    limit: int | None
    limit_name: str


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tools.explain_image",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("photo", help="image file")
    parser.add_argument("--config", help="train YAML: do as that run would")
    parser.add_argument(
        "--model-path", help="checkpoint, folder or hub id: do as it does; its tokenizer counts --prompt"
    )
    parser.add_argument("--grid", help='candidate resolutions, "[[336, 672], ...]" or "(1x1),...,(6x6)"')
    parser.add_argument("--crop", type=int, help="side of a crop in pixels (336); also for a tower out of reach")
    parser.add_argument("--patch", type=int, help="side of the encoder's patch in pixels (14); with --crop")
    for name, meaning in (
        ("image_aspect_ratio", "anyres, anyres_max_N, pad, square or native"),
        ("mm_patch_merge_type", "flat, spatial, spatial_unpad, ..."),
    ):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", help=meaning)
    parser.add_argument("--prompt", help="a question: count the whole sequence too")
    parser.add_argument("--conv-mode", help="conversation template of --prompt (default: the config's or checkpoint's)")
    parser.add_argument("--output", help="draw the walk into this file (.png, .jpg)")
    parser.add_argument("--all", action="store_true", help="list every candidate of a large grid")
    return parser


def read_geometry(args, rest: list[str]):
    """(geometry, resolved run or None) as the command line asks."""
    from llava.families import llava_geometry as geometry

    names = {"image_aspect_ratio": args.image_aspect_ratio, "mm_patch_merge_type": args.mm_patch_merge_type}
    changes = {name: value for name, value in names.items() if value is not None}
    if args.config is not None:
        from llava.config.resolve import resolve

        changes |= {} if args.grid is None else {"image_grid_pinpoints": args.grid}
        run = resolve([args.config, *(f"--{name}={value}" for name, value in changes.items()), *rest])
        return geometry.run_geometry(run, args.crop, args.patch), run
    if rest:
        raise LlavaError(f"command line: {' '.join(rest)}: a training key needs --config; see --help")
    if args.model_path is not None and args.grid is None:
        return geometry.checkpoint_geometry(args.model_path, args.crop, args.patch, changes), None
    named = {"aspect_ratio": args.image_aspect_ratio, "kind": args.mm_patch_merge_type}
    crop, patch = (
        (geometry.CROP if args.crop is None else args.crop),
        (geometry.PATCH if args.patch is None else args.patch),
    )
    if args.grid is None and args.crop is not None and args.crop != geometry.CROP:
        raise LlavaError(f'--crop {args.crop}: expected a --grid of that crop, for example "(1x1),...,(2x2)"')
    options = {name: value for name, value in named.items() if value is not None}
    options["source"] = "LLaVA-NeXT as published" if args.grid is None else "--grid"
    return geometry.plain_geometry(args.grid or geometry.GRID, crop, patch, **options), None


def read_prompt(args, run) -> Prompt:
    """The question in its template, counted.

    Raises:
        LlavaError: no tokenizer is named or it is out of reach, or the question has more than one `<image>`.
    """
    from types import SimpleNamespace

    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import get_template
    from llava.data.turns import place_image
    from llava.model.builder import context_limit, load_tokenizer, read_config
    from llava.model.families import LANGUAGE_MODELS, resolve_architecture
    from llava.text_encoding import tokenizer_image_token

    source = args.model_path or (run and run["model_name_or_path"])
    if not source:
        raise LlavaError("--prompt: counting its tokens needs a tokenizer; expected --model-path, or a --config")
    question = args.prompt if DEFAULT_IMAGE_TOKEN in args.prompt else f"{DEFAULT_IMAGE_TOKEN}\n{args.prompt}"
    if question.count(DEFAULT_IMAGE_TOKEN) > 1:
        raise LlavaError(f"--prompt: found {question.count(DEFAULT_IMAGE_TOKEN)} <image>, expected one at most")
    config = read_config(args.model_path) if args.model_path else {}
    wrapped = run["mm_use_im_start_end"] if run else config.get("mm_use_im_start_end", False)
    name = args.conv_mode or (run and run["version"]) or config.get("conversation_template")
    name = name or LANGUAGE_MODELS[resolve_architecture(config, source)].template
    conversation = get_template(name)
    tokenizer = load_tokenizer(source)
    if wrapped:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    question = place_image(question, "mmtag" in conversation.version, wrapped)
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    text = conversation.get_prompt()
    ids = tokenizer_image_token(text, tokenizer)
    limit = run["model_max_length"] if run else context_limit(SimpleNamespace(**config))
    count = sum(token != IMAGE_TOKEN_INDEX for token in ids)
    return Prompt(text, name, count, source, limit, "model_max_length" if run else "the checkpoint's context")


@report_errors
def main(argv: list[str] | None = None) -> None:
    args, rest = build_parser().parse_known_args(argv)
    from llava.images.reading import load_image

    photo = load_image(args.photo)

    from llava.tools.walk import text
    from llava.tools.walk.steps import walk
    from llava.tools.walk.stock import stock_count

    geometry, run = read_geometry(args, rest)
    prompt = None if args.prompt is None else read_prompt(args, run)
    try:
        steps = walk(photo, geometry)
    except LlavaError as error:
        raise LlavaError(f"image {args.photo}: {error}") from None
    stock = stock_count(geometry, photo.size)
    print("\n".join(text.lines(args.photo, steps, geometry, prompt, stock, args.all)))
    if args.output is not None:
        from llava.tools.walk.picture import draw

        draw(photo, args.photo, steps, geometry, prompt, args.output)
        print(f"\ndrawn in {args.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
