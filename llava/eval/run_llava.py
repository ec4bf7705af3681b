"""One question about pictures to a checkpoint, as LLaVA's README asks it.

    python -m llava.eval.run_llava --model-path DIR --image-file a.jpg,b.jpg --query "What is shown?"

In the question `<image-placeholder>` marks where a picture belongs; without any, the pictures stand in front of it.
Without --conv-mode the conversation template is the checkpoint's own, or for a published checkpoint of LLaVA the one
that LLaVA goes by its name for. Addresses (http, https) are read, since you name them.
"""

import argparse
import sys

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.errors import LlavaError, report_errors

# what LLaVA goes by in a checkpoint's name, in this order; in others it takes llava_v0, here they have their own
_BY_NAME = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def eval_model(args) -> str:
    """Print the answer to a question about pictures, and return it.

    Args:
        args: any object with LLaVA's attributes: model_path, query, image_file (several joined by `sep`); and if they
            are to be other than by default model_base (None), conv_mode (None), sep (","), temperature (0.2; 0 is
            greedy), top_p (None), num_beams (1), max_new_tokens (512), device, dtype.

    Raises:
        LlavaError: a checkpoint, template or picture that cannot be had; as many placeholders as pictures are expected.
    """
    from llava.inference.engine import Inference
    from llava.inference.pictures import open_picture

    sep = getattr(args, "sep", None) or ","
    names = [name.strip() for name in args.image_file.split(sep) if name.strip()]
    pictures = [open_picture(name, allow_remote=True).image for name in names]
    question = _question(args.query, len(pictures))
    base = getattr(args, "model_base", None)
    template = _template(args.model_path, getattr(args, "conv_mode", None))
    inference = Inference.load(
        *(args.model_path, base),
        **{"version": template, "device": getattr(args, "device", None), "dtype": getattr(args, "dtype", None)},
    )
    answer = inference.generate([_prompt(inference, question)], [pictures], **_options(args))[0]
    print(answer)
    return answer


def _question(query: str, pictures: int) -> str:
    """The question with an `<image>` for each picture."""
    marked = query.count(IMAGE_PLACEHOLDER)
    if marked and marked != pictures:
        raise LlavaError(f"query: found {marked} {IMAGE_PLACEHOLDER} for {pictures} pictures, expected as many")
    if marked:
        return query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    return f"{DEFAULT_IMAGE_TOKEN}\n" * pictures + query


def _prompt(inference, question: str) -> list[int]:
    """Token ids; pictures stay where the question has them, which chat and training move to its front."""
    if not inference.family.chooses_template:
        return inference.prompt([("human", question)])
    if getattr(inference.model.config, "mm_use_im_start_end", False):
        marked = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
        question = question.replace(DEFAULT_IMAGE_TOKEN, marked)
    conversation = inference.template.copy()
    for role, text in zip(conversation.roles, (question, None), strict=True):
        conversation.append_message(role, text)
    return inference.tokens(conversation.get_prompt())


def _template(path: str, asked: str | None) -> str | None:
    """The conversation template to ask with; None: the checkpoint's."""
    from llava.families import family_of
    from llava.model.builder import read_config
    from llava.utils import get_model_name_from_path

    if not family_of(path).chooses_template or read_config(path).get("conversation_template"):
        return asked
    name = get_model_name_from_path(path).lower()
    usual = next((template for part, template in _BY_NAME if part in name), None)
    if asked is not None and usual not in (None, asked):
        print(f"note: {path} is usually asked with {usual}, here with {asked}", file=sys.stderr)
    return asked or usual


def _options(args) -> dict:
    """Arguments of transformers' `generate`."""
    temperature, top_p = getattr(args, "temperature", 0.2), getattr(args, "top_p", None)
    options = {
        "max_new_tokens": getattr(args, "max_new_tokens", 512),
        "num_beams": getattr(args, "num_beams", 1),
        "do_sample": temperature > 0,
        "temperature": temperature if temperature > 0 else None,
        "top_p": top_p if temperature > 0 else None,
    }
    return options if temperature > 0 else options | {"top_k": None}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.run_llava",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="language model under a projector-only checkpoint or an adapter")
    parser.add_argument("--image-file", required=True, help="picture, or several joined by --sep")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--conv-mode", help="conversation template")
    parser.add_argument("--sep", default=",", help="what stands between the names of pictures (default: a comma)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0: always the likeliest token (default: 0.2)")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens of this share alone")
    parser.add_argument("--num_beams", type=int, default=1, help="beam search with this many beams")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer, in tokens (default: 512)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="default: float32 on cpu, else bfloat16")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    eval_model(args)


if __name__ == "__main__":
    main()
