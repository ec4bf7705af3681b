"""Two ranks under ZeRO-3 with unlike batches: the gradients are those of one process with both.

`main([TOWER])` on each of two ranks. One has eight images and many labels, the other a text with a single one, so that
their chunks of images and of logits differ in number.
"""

import copy
import importlib

import deepspeed
import torch

from llava.model import chunked_loss
from llava.model.vision_chunks import set_micro_batch
from tests.model import small
from tests.model.test_chunked_loss import Adapted
from tests.model.test_training_forward import batch

TEXT = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, -100, 8]])}
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def batches() -> list[dict]:
    pictures = batch()
    pictures["labels"] = pictures["input_ids"].masked_fill(~pictures["attention_mask"], -100)
    return [pictures, TEXT | {"attention_mask": torch.ones(1, 4, dtype=torch.bool)}]


def compare(tower: str, adapted: bool) -> None:
    model = small.model(tower, image_grid_pinpoints="(1x1),...,(2x2)").train().requires_grad_(True)
    if adapted:
        model.lm_head = Adapted(model.lm_head)
    alone, count = copy.deepcopy(model), sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches())
    for inputs in batches():
        alone(**inputs, num_items_in_batch=count).loss.backward()
    chunked_loss.LOGITS_BYTES = 3 * 4 * small.VOCAB  # of three rows
    set_micro_batch(model, 3)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)[0]
    for _ in range(2):  # the second time DeepSpeed fetches ahead what the first one used
        loss = engine(**batches()[rank], num_items_in_batch=count).loss
        engine.backward(loss)
        named, compared = dict(engine.module.named_parameters()), 0
        for name, expected in alone.named_parameters():
            found = deepspeed.utils.safe_get_full_grad(named[name])
            expected = torch.zeros_like(expected) if expected.grad is None else expected.grad
            if found is None:  # on every rank
                assert not expected.any(), name
                continue
            assert (found * world - expected).abs().max() < 1e-6 * max(1, expected.abs().max()), name
            compared += 1
        assert compared > 40, compared
        engine.zero_grad()
        engine.optimizer.zero_grad()


def main(words: list[str]) -> None:
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute it is PyTorch itself
    backend.build_shm_op = lambda: None  # gloo's own collectives: nothing is compiled
    deepspeed.init_distributed("gloo")
    for head in (False, True):
        compare(words[0], head)
    torch.distributed.destroy_process_group()
