"""Fine-tune Qwen2-VL with adaptive patches: `llava.train.train` by the name that its users know."""

from llava.errors import LlavaError, report_errors, report_interrupts
from llava.train.launcher import under_launcher


@under_launcher
@report_errors
@report_interrupts
def train(argv=None):
    """As `llava.train.train.train`, for a model with a vision encoder of its own."""
    from llava.families import family_of
    from llava.train.arguments import parse_args
    from llava.train.train import run

    args = parse_args(argv)
    path = args[0].model_name_or_path
    if family_of(path).name == "llava":
        raise LlavaError(f"model_name_or_path: {path}: found a LLaVA or language model, expected Qwen2-VL's kind")
    run(*args)


if __name__ == "__main__":
    train()
