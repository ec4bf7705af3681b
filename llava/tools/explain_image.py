"""Show, step by step, what a model's image handling makes of a photo, and how many tokens it costs.

    python -m llava.tools.explain_image photo.jpg                                # LLaVA-NeXT as published, CLIP-L/336
    python -m llava.tools.explain_image photo.jpg --config configs/train/finetune_onevision.yaml --output walk.png
    python -m llava.tools.explain_image photo.jpg --config configs/train/finetune_qwen2_vl.yaml
    python -m llava.tools.explain_image photo.jpg --model-path checkpoints/mine --prompt "What is shown?"
    python -m llava.tools.explain_image photo.jpg --grid "(1x1),...,(6x6)" --crop 384 --patch 14

With --config, further `--key value` pairs override the config as in training.
"""

import argparse
import sys
from typing import NamedTuple

from llava.errors import LlavaError, report_errors
from llava.inference import own_code

# options about sizes -> the training key that each stands for
OPTIONS = {
    "image_aspect_ratio": "image_aspect_ratio",
    "mm_patch_merge_type": "mm_patch_merge_type",
    "grid": "image_grid_pinpoints",
    "crop": None,
    "patch": None,
}


class Prompt(NamedTuple):
    """A rendered prompt.

    tokens: of `text`, without `<image>`.
    template, source, limit_name: for people, also where tokenizer and limit come from.
    limit: the longest sequence in tokens.
    """

    text: str
    template: str
    tokens: int
    source: str
    limit: int
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
    own_code.add_options(parser)
    return parser


def read_geometry(args, rest: list[str]):
    """(family, geometry, resolved run or None) as the command line asks."""
    from llava.families import family_of, family_of_run, get_family

    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.config is not None:
        from llava.config.resolve import resolve

        keys = {key: options.pop(name) for name, key in OPTIONS.items() if key is not None and name in options}
        keys |= {} if args.vision_tower is None else {"vision_tower": args.vision_tower}
        run = resolve([args.config, *(f"--{key}={value}" for key, value in keys.items()), *rest])
        family = family_of_run(run)
        return family, family.geometry(run["model_name_or_path"], run, **options), run
    if rest:
        raise LlavaError(f"command line: {' '.join(rest)}: a training key needs --config; see --help")
    family = get_family("llava") if args.model_path is None else family_of(args.model_path)
    with own_code.allowed(args):
        return family, family.geometry(args.model_path, **options), None


def read_prompt(args, family, run) -> Prompt:
    """The question in its template, counted.

    Raises:
        LlavaError: no tokenizer is named or it is out of reach, or the question has more than one `<image>`.
    """
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.inference.engine import Inference

    source = args.model_path or (run and run["model_name_or_path"])
    if not source:
        raise LlavaError("--prompt: counting its tokens needs a tokenizer; expected --model-path, or a --config")
    question = args.prompt if DEFAULT_IMAGE_TOKEN in args.prompt else f"{DEFAULT_IMAGE_TOKEN}\n{args.prompt}"
    if question.count(DEFAULT_IMAGE_TOKEN) > 1:
        raise LlavaError(f"--prompt: found {question.count(DEFAULT_IMAGE_TOKEN)} <image>, expected one at most")
    loaded = Inference(family, family.load_text(source, run), args.conv_mode).loaded
    text = family.prompt_text([("human", question)], loaded)
    count = sum(token != IMAGE_TOKEN_INDEX for token in family.tokens(text, loaded))
    template = f"template {loaded.template}" if family.chooses_template else f"chat template of {family.name}"
    limit_name = "model_max_length" if run else "the checkpoint's context"
    return Prompt(text, template, count, source, loaded.context, limit_name)


@report_errors
def main(argv: list[str] | None = None) -> None:
    args, rest = build_parser().parse_known_args(argv)
    from llava.images.reading import load_image

    photo = load_image(args.photo)

    from llava.tools.walk import text
    from llava.tools.walk.steps import walk
    from llava.tools.walk.stock import stock_count

    family, geometry, run = read_geometry(args, rest)
    prompt = None if args.prompt is None else read_prompt(args, family, run)
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
