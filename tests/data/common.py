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


def llava_parts(tokenizer, image_processor=None, count_visual_tokens=None, **args):
    """(family, loaded, args) of LLaVA for a data set, without a model; `args` are `SampleArgs`."""
    from llava.data.dataset import SampleArgs
    from llava.families import get_family
    from llava.families.base import Loaded

    args = SampleArgs(**args)
    loaded = Loaded(None, tokenizer, tokenizer, image_processor, 4096, args.version, count_visual_tokens)
    return get_family("llava"), loaded, args
