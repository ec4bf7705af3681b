"""TEMP"""

import random
from dataclasses import dataclass

from llava.errors import LlavaError, report_errors


@report_errors
def train(argv=None):
    """`llava.train.train.train`."""
    from llava.train.arguments import parse_args
    from llava.train.train import run

    run(*parse_args(argv))


@dataclass(frozen=True)
class AlphaRange:
    low: float
    high: float
    seed: int = 0

    def draw(self, seed, epoch: int, record: int, image: int) -> float:
        return random.Random(f"{self.seed}/{epoch}/{record}/{image}").uniform(self.low, self.high)

    @property
    def middle(self) -> float:
        return round((self.low + self.high) / 2, 6)


def set_run_choice(images, data_args, seed):
    for name in ("patch_selection_method", "patch_thresholds", "patch_importance"):
        value = getattr(data_args, name)
        if value is not None:
            setattr(images, name, None if value == "all" else value)
    alpha = check_alpha(data_args.patch_alpha, images.patch_selection_method)
    if isinstance(alpha, list):
        alpha = AlphaRange(*alpha, seed=seed)
        images.alpha = alpha.middle
    elif alpha is not None:
        images.alpha, alpha = alpha, None
    check_selection(images)
    return alpha


def check_alpha(alpha, method: str | None):
    """`patch_alpha` as it is, or as a list of two for a range; refused where nothing uses it."""
    if alpha is None:
        return None
    if method in (None, "v1"):
        used = "with patch_selection_method budget or v2" if method is None else "by budget and v2"
        raise LlavaError(f"patch_alpha: found {alpha} with patch_selection_method {method}, but it is used {used}")
    if isinstance(alpha, list) and (len(alpha) != 2 or not 0 <= alpha[0] <= alpha[1]):
        raise LlavaError(f"patch_alpha: found {alpha}, expected a number, or two from the lower to the higher one")
    return alpha


def check_selection(images) -> None:
    """Let the selection itself refuse its settings, before training rather than at the first image."""
    from llava.model.adaptive_patches import PatchTokenizer

    if images.patch_selection_method is None:
        return
    PatchTokenizer(
        3,
        images.patch_size,
        images.patch_thresholds,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        method=images.patch_importance,
        patch_selection_method=images.patch_selection_method,
        alpha=images.alpha,
    )


if __name__ == "__main__":
    train()
