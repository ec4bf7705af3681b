"""LLaVA-NeXT's entry point for preference training: `python llava/train/train_dpo.py <flags>`, which says what is there."""

from llava.errors import LlavaError, report_errors


@report_errors
def main() -> None:
    raise LlavaError("train_dpo: preference training (DPO) is not available in this version, expected train_mem.py")


if __name__ == "__main__":
    main()
