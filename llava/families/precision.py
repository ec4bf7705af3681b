"""The dtypes in which a run holds its weights: one rule for whatever is loaded, built or added.

| run                                | trained weights | frozen weights |
|------------------------------------|-----------------|----------------|
| float32                            | float32         | float32        |
| bf16 or fp16                       | float32         | that one       |
| bf16 or fp16 under DeepSpeed       | that one        | that one       |

In the second, autocast computes in half precision; in the third, DeepSpeed keeps float32 master weights itself.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What trained and frozen weights are held in."""

    trained: torch.dtype
    frozen: torch.dtype

    @classmethod
    def of(cls, training_args) -> "Precision":
        half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
        return cls(trained=half if training_args.deepspeed else torch.float32, frozen=half)

    def to_load(self, training_args, parts: set[str]) -> torch.dtype:
        """What a checkpoint is read in: the dtype that its language model will have, by far the most of it."""
        whole = "mm_language_model" in parts and not training_args.lora_enable
        return self.trained if whole else self.frozen

    def apply(self, model) -> None:
        """Cast the weights of a model in which it is settled what is trained; quantised ones stay as they are."""
        for parameter in model.parameters():
            if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
                continue
            dtype = self.trained if parameter.requires_grad else self.frozen
            parameter.data = parameter.data.to(dtype)
            if hasattr(parameter, "ds_tensor"):  # ZeRO-3's: `data` is empty, the weights are there
                parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
