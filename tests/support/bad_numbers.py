"""Faults in the numbers of training runs, made where they would come from."""

from contextlib import contextmanager

import pytest
import torch

NAN = float("nan")


class _Broken(torch.autograd.Function):
    """The identity, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def _spoil_moments(trainer):
    """One number of an optimizer's second moments; under ZeRO those of this rank's part."""
    optimizer = trainer.optimizer
    while not any("exp_avg_sq" in state for state in optimizer.state.values()):
        optimizer = optimizer.optimizer
    state = next(state for state in optimizer.state.values() if "exp_avg_sq" in state)
    state["exp_avg_sq"].view(-1)[0] = NAN


LOSSES = {
    "loss": lambda loss: loss * NAN,
    "constant": lambda loss: loss + NAN,  # the gradient is as it should be
    "gradient": _Broken.apply,
    "spike": lambda loss: loss * 100,
    "moments": lambda loss: loss,
}


@contextmanager
def install(kind, steps=(), rank=None, micro=None, records=()):
    """Runs in this context have a fault.

    Args:
        kind: of `LOSSES`, in some steps; or "input", in the pictures of some records.
        steps: from 1.
        rank: None: on all.
        micro: number of the step's micro-batch, from 0; None: in all of them.
        records: by their ids.
    """
    from llava.data.dataset import LazySupervisedDataset
    from llava.train.llava_trainer import LLaVATrainer

    own_loss, own_item, seen = LLaVATrainer.compute_loss, LazySupervisedDataset.__getitem__, {}

    def compute_loss(self, *args, **kwargs):
        step = self.state.global_step + 1
        seen[step] = seen.get(step, -1) + 1
        loss = own_loss(self, *args, **kwargs)
        if step not in steps or rank not in (None, self.args.process_index) or micro not in (None, seen[step]):
            return loss
        if kind == "moments":
            _spoil_moments(self)
        return LOSSES[kind](loss)

    def item(self, index):
        found = own_item(self, index)
        if isinstance(found, dict) and found["id"] in records:
            name = "images" if "images" in found else "pixel_values"
            picture = found[name][0] if name == "images" else found[name]
            picture.view(-1)[7] = NAN
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLaVATrainer, "compute_loss", compute_loss)
        patch.setattr(LazySupervisedDataset, "__getitem__", item)
        yield
