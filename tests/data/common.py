"""What the data tests share."""

from functools import lru_cache
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"


@lru_cache
def tokenizer(name: str):
    """The golden tokenizer called `name`: qwen, llama (sentencepiece file only) or llama3."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{name}")


def talk(*texts: str) -> list[dict]:
    """A conversation of alternating turns, the human's first."""
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
