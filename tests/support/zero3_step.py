"""Two ranks under ZeRO-3 with unlike batches: the gradients are those of one process with both.

`main([TOWER])`, or `encoders([CHECKPOINT, ...])` for LLaVA models, on each of two ranks. One has eight images and many
labels, the other a text with a single one, so that their chunks of images and of logits differ in number.
"""

import copy
import importlib

import deepspeed
import torch

from llava.model import chunked_loss
from llava.model.vision_chunks import set_micro_batch
from tests.model import small
from tests.model.test_chunked_loss import Adapted
from tests.model.test_training_forward import SIDE, batch

TEXT = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, -100, 8]])}
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def batches(side: int = SIDE) -> list[dict]:
    """Of each rank; `side`: pixels of a crop."""
    pictures = batch()
    pictures["images"] = [small.pixels(*image.shape[:-2], side, side, seed=image.ndim) for image in pictures["images"]]
    pictures["image_sizes"] = [(w * side // SIDE, h * side // SIDE) for w, h in pictures["image_sizes"]]
    pictures["labels"] = pictures["input_ids"].masked_fill(~pictures["attention_mask"], -100)
    return [pictures, TEXT | {"attention_mask": torch.ones(1, 4, dtype=torch.bool)}]


def compare(model, adapted: bool = False, limit: float = 1e-6) -> None:
    model.train().requires_grad_(True)
    if adapted:
        model.lm_head = Adapted(model.lm_head)
    given = batches(model.get_vision_tower().image_size)
    alone, count = copy.deepcopy(model), sum(int((b["labels"][:, 1:] >= 0).sum()) for b in given)
    for inputs in given:
        alone(**inputs, num_items_in_batch=count).loss.backward()
    chunked_loss.LOGITS_BYTES = 3 * 4 * small.VOCAB  # of three rows
    set_micro_batch(model, 3)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)[0]
    for _ in range(2):  # the second time DeepSpeed fetches ahead what the first one used
        loss = engine(**given[rank], num_items_in_batch=count).loss
        engine.backward(loss)
        named, compared = dict(engine.module.named_parameters()), 0
        for name, expected in alone.named_parameters():
            found = deepspeed.utils.safe_get_full_grad(named[name])
            expected = torch.zeros_like(expected) if expected.grad is None else expected.grad
            if found is None:  # on every rank
                assert not expected.any(), name
                continue
            share = ((found * world - expected).abs().max() / max(1, expected.abs().max())).item()
            assert share < limit, (name, share)
            compared += 1
        assert compared > 40, compared
        engine.zero_grad()
        engine.optimizer.zero_grad()


def load_split(checkpoint: str, plain) -> None:
    """A checkpoint that is read in parts computes what it does in one: what no checkpoint holds is right too."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    settings = HfDeepSpeedConfig(ZERO3)  # as long as it lives, models are split as they are made
    model = type(plain).from_pretrained(checkpoint).eval()
    tower = model.get_vision_tower()
    whole = [name for name, parameter in tower.named_parameters() if not hasattr(parameter, "ds_id")]
    # BLIP-2 makes its bias anew behind the layer's own constructor, where DeepSpeed does not see it: rank 0 alone has
    # the checkpoint's until `initialize`, which gives every rank those of rank 0
    assert all(name.endswith("qkv.bias") for name in whole), whole
    with deepspeed.zero.GatheredParameters(list(model.parameters())), torch.no_grad():
        images = small.pixels(2, 3, tower.image_size, tower.image_size)
        found, expected = model.encode_images(images), plain.encode_images(images)
    if not whole or torch.distributed.get_rank() == 0:
        # close: where a weight lies in memory decides how convolutions are summed
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), checkpoint
    del settings


def begin() -> None:
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute it is PyTorch itself
    backend.build_shm_op = lambda: None  # gloo's own collectives: nothing is compiled
    deepspeed.init_distributed("gloo")


def main(words: list[str]) -> None:
    begin()
    for head in (False, True):
        compare(small.model(words[0], image_grid_pinpoints="(1x1),...,(2x2)"), head)
    torch.distributed.destroy_process_group()


def encoders(words: list[str]) -> None:
    from llava.model import LlavaQwenForCausalLM

    begin()
    for checkpoint in words:
        print(checkpoint, flush=True)
        load_split(checkpoint, LlavaQwenForCausalLM.from_pretrained(checkpoint).eval())
        # one that has not run yet: transformers' hooks for hidden states come behind DeepSpeed's, as in a training run
        # convolutions of fewer images at a time are summed in another order
        compare(LlavaQwenForCausalLM.from_pretrained(checkpoint), limit=1e-5)
    torch.distributed.destroy_process_group()
