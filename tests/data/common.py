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


def llava_parts(
    tokenizer, image_processor=None, count=None, version="qwen_1_5", supervise=None, mm_use_im_start_end=False, **args
):
    """(family, loaded, args) of LLaVA for a data set, without a model; `args` are `SampleArgs`."""
    from llava.data.dataset import SampleArgs
    from llava.data.preprocess import Preprocessor
    from llava.families import get_family
    from llava.families.base import Loaded

    count = count or Counter()
    prepare = Preprocessor(tokenizer, version, supervise, mm_use_im_start_end)
    loaded = Loaded(None, tokenizer, tokenizer, image_processor, 4096, version, count, prepare)
    return get_family("llava"), loaded, SampleArgs(**args)


class Counter:
    """In place of a model's: each crop or frame has four tokens, an image one more."""

    chooser = None

    def __call__(self, shape, size, modality):
        return 4 * (shape[0] if len(shape) == 4 else 1) + (modality == "image")
