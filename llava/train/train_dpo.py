"""LLaVA-NeXT's entry point for preference training, which does not exist here: it says so."""

from llava.errors import LlavaError, report_errors
from llava.train.launcher import under_launcher


@under_launcher
@report_errors
def main() -> None:
    raise LlavaError("train_dpo: preference training (DPO) is not available in this version, expected train_mem.py")


if __name__ == "__main__":
    main()
