"""The options of every command that loads a checkpoint about code that is not this project's."""

import argparse
import contextlib


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--vision_tower` and `--trust_remote_code`, with dashes too."""
    parser.add_argument(
        *("--vision_tower", "--vision-tower"),
        metavar="CLASS",
        help="the class of your own that the checkpoint's encoder is of, as my_vit.py:MyViT; a checkpoint's word alone "
        "runs no code",
    )
    parser.add_argument(
        *("--trust_remote_code", "--trust-remote-code"),
        action="store_true",
        help="run the class that the checkpoint names, also one in its own folder",
    )


def overrides(args: argparse.Namespace) -> dict:
    """What the options add to the keyword arguments of `Family.load`."""
    found = {} if args.vision_tower is None else {"vision_tower": args.vision_tower}
    return found | ({"trust_remote_code": True} if args.trust_remote_code else {})


@contextlib.contextmanager
def allowed(args: argparse.Namespace):
    """Inside, a checkpoint's tower is built as the options allow, by what reads no weights."""
    from llava.model.multimodal_encoder.trust import naming, trusting_checkpoints

    with naming(args.vision_tower), trusting_checkpoints(args.trust_remote_code):
        yield
