"""The ranges of numbers: a few named rules, and which field of `transformers.TrainingArguments` has which.

A key of this project names its rule where it is defined, in `keys.py`. A few words of closed sets have rules as well.
"""

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava.config import reporting
from llava.config.trainer_fields import trainer_fields

# beyond these, numbers overflow in what computes with them: PyTorch's integers, and float32 after a few products
LARGEST_WHOLE, LARGEST = 2**63 - 1, 1e30


@dataclass(frozen=True)
class Rule:
    """What values a key takes beside its type: `text` in words, which stand for the type in messages and the key table.

    fits: of one value; for a list, of each item. Of numbers it sees those that are finite and not beyond the largest.
    """

    text: str
    fits: Callable[[Any], bool]

    def fault(self, value: Any) -> str | None:
        """What was expected in place of `value`; None where it is right, as nothing (None) always is."""
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is None or isinstance(item, bool):
                continue
            if isinstance(item, float) and not math.isfinite(item):
                return self.text
            largest = LARGEST_WHOLE if isinstance(item, int) else LARGEST
            if isinstance(item, (int, float)) and abs(item) > largest:
                return f"{self.text}, none beyond {largest}"
            if not self.fits(item):
                return self.text
        return None


def _whole_or_share(value: float) -> bool:
    return value < 1 or float(value).is_integer()


def one_of(*choices: int) -> Rule:
    """These numbers alone."""
    *most, last = map(str, choices)
    return Rule(f"{', '.join(most)} or {last}" if most else last, lambda value: value in choices)


def words(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda word: word in choices)


def _scales(text: str) -> bool:
    return all(part.strip().isdecimal() and int(part) > 0 for part in text.split(","))


WHOLE = Rule("whole number", lambda value: True)
POSITIVE = Rule("positive whole number", lambda value: value > 0)
COUNT = Rule("whole number from 0", lambda value: value >= 0)
POSITIVE_OR_ALL = Rule("-1 or a positive whole number", lambda value: value == -1 or value > 0)
RANK = Rule("-1 or a whole number from 0", lambda value: value >= -1)
SEED = Rule(f"whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)  # NumPy's
SECONDS = Rule("positive whole number of seconds, at most 1000000000", lambda value: 0 < value <= 10**9)

NUMBER = Rule("finite number", lambda value: True)
FROM_0 = Rule("number from 0", lambda value: value >= 0)
FROM_1 = Rule("number from 1", lambda value: value >= 1)
FACTOR = Rule("0, or a number from 1", lambda value: value == 0 or value >= 1)
ABOVE_0 = Rule("number above 0", lambda value: value > 0)
EPSILON = Rule("number from 1e-30", lambda value: value >= 1e-30)  # one that float32 still knows
SHARE = Rule("share from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_ABOVE_0 = Rule("number above 0 and at most 1", lambda value: 0 < value <= 1)
SHARE_BELOW_1 = Rule("share from 0 and below 1", lambda value: 0 <= value < 1)
INTERVAL = Rule(
    "positive whole number of steps, or a share of all below 1", lambda value: value > 0 and _whole_or_share(value)
)
WARMUP = Rule(
    "whole number of steps from 0, or a share of all below 1", lambda value: value >= 0 and _whole_or_share(value)
)
SCALES = Rule("positive whole numbers joined by commas", _scales)
REPORTS = Rule(
    f"none, all, or some of {', '.join(reporting.REPORTS)}",
    lambda name: name in reporting.REPORTS or name in reporting.ALONE,
)

OPTIMIZER = Rule(
    "an optimizer of transformers, as adamw_torch", lambda name: name in typing.get_args(trainer_fields()["optim"][0])
)
LOG_LEVEL = words("passive", "detail", "debug", "info", "warning", "error", "critical")

# fields of `transformers.TrainingArguments`: all that hold numbers; one that the installed version lacks is no key
TRAINER_RULES: dict[str, Rule] = {
    "per_device_train_batch_size": POSITIVE,
    "per_device_eval_batch_size": POSITIVE,
    "gradient_accumulation_steps": POSITIVE,
    "eval_accumulation_steps": POSITIVE,
    "num_train_epochs": FROM_0,  # 0: max_steps says it
    "max_steps": POSITIVE_OR_ALL,
    "learning_rate": FROM_0,
    "warmup_steps": WARMUP,
    "weight_decay": FROM_0,
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": EPSILON,
    "max_grad_norm": FROM_0,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": FROM_0,
    "torch_empty_cache_steps": POSITIVE,
    "logging_steps": INTERVAL,
    "eval_steps": INTERVAL,
    "save_steps": INTERVAL,
    "eval_delay": FROM_0,
    "save_total_limit": POSITIVE,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": COUNT,
    "dataloader_prefetch_factor": POSITIVE,
    "ddp_bucket_cap_mb": POSITIVE,
    "ddp_timeout": SECONDS,
    "local_rank": RANK,
    "log_level": LOG_LEVEL,
    "log_level_replica": LOG_LEVEL,
    "include_num_input_tokens_seen": words("true", "false", "all", "non_padding", "no"),
}
