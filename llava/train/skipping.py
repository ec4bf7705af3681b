"""How a step whose gradient is not finite is left out: of a plain run or DDP, and of one under DeepSpeed.

All ranks see the same gradient, or the same norm of it, and so decide alike.
"""

import math

import torch


def skipping(trainer) -> "Skipping":
    """What leaves steps out of a trainer's run."""
    if not trainer.is_deepspeed_enabled:
        return Skipping(trainer)
    optimizer = trainer.model_wrapped.optimizer
    return ZeroSkipping(trainer, optimizer) if hasattr(optimizer, "overflow") else StageZeroSkipping(trainer, optimizer)


class Skipping:
    """Of a plain run, DDP or FSDP: the optimizer passes over weights that have no gradient."""

    def __init__(self, trainer):
        self.trainer = trainer

    def begin(self) -> None:
        """A step begins."""

    def step(self, norm, finite: bool) -> bool:
        """Leave the step out if its gradient is not finite, and say whether it is. The host waits for the norm.

        Args:
            norm: of the gradient, over all ranks, as `Trainer` has it before the optimizer's step.
            finite: whether losses and inputs are, so that the gradient alone decides.
        """
        finite = finite and math.isfinite(float(norm))
        if not finite:
            self.trainer.model_wrapped.zero_grad()
        return not finite

    def scale_falls(self) -> bool:
        """Whether it is fp16's loss scale that was too large for the gradient, and it gets smaller."""
        scaler = self.trainer.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1


class ZeroSkipping(Skipping):
    """Under ZeRO, whose optimizers look at the gradient themselves: `overflow` says that they have left it out."""

    def __init__(self, trainer, optimizer):
        super().__init__(trainer)
        self.optimizer = optimizer
        self.scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        self._scale = None
        if hasattr(self.scaler, "raise_error_at_min_scale"):
            self.scaler.raise_error_at_min_scale = False  # such steps are counted
        in_norm = getattr(optimizer, "compute_grad_norm", True) and getattr(optimizer, "dtype", None) != torch.bfloat16
        if hasattr(optimizer, "check_grad_overflow") and not in_norm:
            optimizer.check_grad_overflow = True  # whatever DeepSpeed's file says

    def begin(self) -> None:
        self._scale = getattr(self.scaler, "cur_scale", None)

    def step(self, norm, finite) -> bool:
        return bool(self.optimizer.overflow)

    def scale_falls(self) -> bool:
        least = getattr(self.scaler, "min_scale", None) or getattr(self.scaler, "min_loss_scale", None)
        return least is not None and self._scale > least  # in this step, or once DeepSpeed's hysteresis is used up


class StageZeroSkipping(Skipping):
    """Under DeepSpeed without ZeRO, which takes the optimizer's step before `Trainer` knows of a norm."""

    def __init__(self, trainer, optimizer):
        super().__init__(trainer)
        self._finite = True
        optimizer.register_step_pre_hook(self._look)

    def _look(self, optimizer, args, kwargs) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights], float("inf"))
        self._finite = math.isfinite(float(norm))
        for weight in weights if not self._finite else ():
            weight.grad = None

    def step(self, norm, finite) -> bool:
        return not self._finite

    def scale_falls(self) -> bool:
        return False
