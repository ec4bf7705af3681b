"""Names that transformers 4.40 knew and transformers 5 does not: translated, or accepted with one warning.

A translation takes place inside the layer (command line, YAML file) in which the old name was found, so precedence
holds whichever name a layer uses. A name that the installed transformers still has is never translated.
"""

import math
from dataclasses import dataclass
from typing import Any

from llava.config.rules import COUNT, POSITIVE, SHARE, Rule
from llava.config.schema import Key


@dataclass(frozen=True)
class OldName:
    """`target`: the key that takes the value, or "" where nothing does; `note`: why nothing does, for the warning;
    `within`: as a key's."""

    type: Any
    target: str = ""
    note: str = ""
    within: Rule | None = None

    def key(self, name: str) -> Key:
        return Key(name, "old", self.type, None, within=self.within)


_GONE = "it has no effect since transformers 5"

OLD_NAMES: dict[str, OldName] = {
    "evaluation_strategy": OldName(str, "eval_strategy"),
    "warmup_ratio": OldName(float, "warmup_steps", within=SHARE),
    "group_by_length": OldName(bool, "train_sampling_strategy"),
    "no_cuda": OldName(bool, "use_cpu"),
    "per_gpu_train_batch_size": OldName(int | None, "per_device_train_batch_size", within=POSITIVE),
    "per_gpu_eval_batch_size": OldName(int | None, "per_device_eval_batch_size", within=POSITIVE),
    "push_to_hub_token": OldName(str | None, "hub_token"),
    "push_to_hub_model_id": OldName(str | None, "hub_model_id"),
    "adafactor": OldName(bool, "optim"),
    "torchdynamo": OldName(str | None, "torch_compile_backend"),
    "include_inputs_for_metrics": OldName(bool, "include_for_metrics"),
    "include_tokens_per_second": OldName(bool | None, "include_num_input_tokens_seen"),
    "dispatch_batches": OldName(bool | None, "accelerator_config"),
    "split_batches": OldName(bool | None, "accelerator_config"),
    "fsdp_min_num_params": OldName(int, "fsdp_config", within=COUNT),
    "fsdp_transformer_layer_cls_to_wrap": OldName(str | None, "fsdp_config"),
    "save_safetensors": OldName(bool, note="weights are always saved as safetensors"),
    "push_to_hub_organization": OldName(str | None, note="put the organization into hub_model_id"),
    "fp16_backend": OldName(str, note=_GONE),
    "half_precision_backend": OldName(str, note=_GONE),
    "fp16_opt_level": OldName(str, note="it was for apex, which transformers 5 does not use"),
    "jit_mode_eval": OldName(bool, note=_GONE),
    "use_ipex": OldName(bool, note=_GONE),
    "use_mps_device": OldName(bool, note="an Apple GPU is used when there is one"),
    "use_legacy_prediction_loop": OldName(bool, note=_GONE),
    "past_index": OldName(int, note=_GONE),
    "mp_parameters": OldName(str, note=_GONE),
    "ray_scope": OldName(str | None, note=_GONE),
    "tpu_num_cores": OldName(int | None, note=_GONE),
    "tpu_metrics_debug": OldName(bool, note="use debug"),
}

_NESTED = {
    "dispatch_batches": "dispatch_batches",
    "split_batches": "split_batches",
    "fsdp_min_num_params": "min_num_params",
    "fsdp_transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
}
_WHEN_TRUE = {
    "group_by_length": "group_by_length",
    "adafactor": "adafactor",
    "include_inputs_for_metrics": ["inputs"],
    "include_tokens_per_second": "all",
}


def translate(layer: dict[str, Any], old: dict[str, Any], where: str, notices: list[str]) -> None:
    """Put the values of `old` (old name -> value) into `layer` under today's names; append warnings to `notices`."""
    for name, value in old.items():
        target = OLD_NAMES[name].target
        if not target:
            notices.append(f"{where}: {name} is accepted but not used: {OLD_NAMES[name].note}")
        elif value is None or (target == "fsdp_config" and not value):
            continue
        elif name in _NESTED:
            nested = layer.setdefault(target, {})
            if isinstance(nested, dict):
                nested.setdefault(_NESTED[name], value)
        elif name == "warmup_ratio":
            _translate_warmup(layer, value)
        elif name in _WHEN_TRUE:
            if value:
                layer.setdefault(target, _WHEN_TRUE[name])
        elif layer.setdefault(target, value) != value:
            notices.append(f"{where}: {name} is another name of {target}, which is given too and used")


def _translate_warmup(layer: dict[str, Any], ratio: float) -> None:
    """As before transformers 5, warmup_steps wins if it is above 0; there, a value below 1 is a share of all steps."""
    if not layer.get("warmup_steps"):
        layer["warmup_steps"] = min(ratio, math.nextafter(1, 0))
