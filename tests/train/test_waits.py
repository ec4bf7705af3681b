"""A training step hardly waits for the device, whatever the family and the batch; see `tests.support.waits`."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.support.families import CHECKPOINTS
from tests.support.waits import Waits

NATIVE = {  # every image a size of its own, packed
    "mm_vision_tower_type": "hevc_vit_packing",
    "mm_projector_type": "spatial_merge",
    "image_aspect_ratio": "native",
    "min_pixels": 56 * 56,
}
BUDGET = '{"method": "budget", "alpha": 0.5}'
DRAWN = '{"method": "budget", "alpha": [0.2, 0.8]}'
# name: (family, tower, keys of the run)
RUNS = {
    "llava-pad": ("llava", "clip", {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}),
    "llava-anyres": ("llava", "clip", {}),
    "llava-compressed": (
        "llava",
        "clip_fine",
        {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2},
    ),
    "llava-hevc": ("llava", "hevc_vit", {"image_aspect_ratio": "pad", "mm_vision_tower_type": "hevc_vit"}),
    "llava-packed": ("llava", "hevc_vit", NATIVE),
    "llava-packed-adaptive": ("llava", "hevc_vit", NATIVE | {"adaptive_patches": BUDGET}),
    "llava-packed-drawn": ("llava", "hevc_vit", NATIVE | {"adaptive_patches": DRAWN}),
    "qwen2_vl": ("qwen2_vl", None, {}),
    "qwen2_vl-adaptive": ("qwen2_vl", None, {"adaptive_patches": BUDGET}),
    "qwen2_vl-drawn": ("qwen2_vl", None, {"adaptive_patches": DRAWN}),
    "qwen2_5_vl": ("qwen2_5_vl", None, {}),
    "qwen2_5_vl-adaptive": ("qwen2_5_vl", None, {"adaptive_patches": BUDGET}),
    "qwen3_vl": ("qwen3_vl", None, {}),
}


class _Enough(Exception):
    """Ends a run whose batches are known."""


@dataclass
class Step:
    """What one batch did: `loss`, `gradients` by name, and the waits."""

    loss: torch.Tensor
    gradients: dict
    waits: Waits


class Taken:
    """A run's trainer and model, and the batches of its first three steps, of which the third has no image."""

    def __init__(self, flags):
        from llava.train import train
        from llava.train.llava_trainer import LLaVATrainer

        self.batches = []

        def keep(trainer, model, inputs, count=None):
            self.trainer, self.model = trainer, model.train()
            self.batches.append((trainer._prepare_inputs(inputs), count))
            if len(self.batches) == 3:
                raise _Enough
            return torch.zeros(())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LLaVATrainer, "training_step", keep)
            with pytest.raises(_Enough):
                train.train(flags)

    def batch_of(self, record: int) -> dict:
        """A batch of one record."""
        trainer = self.trainer
        return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[record]]))

    def step(self, number: int, **changes) -> Step:
        batch, count = self.batches[number]
        self.model.zero_grad()
        with Waits() as waits:
            self.model = waits.to_device(self.model)
            batch, count = waits.to_device({**batch, **changes}), waits.to_device(count)
            loss = self.model(**batch, num_items_in_batch=count).loss
            loss.backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return Step(loss.detach(), found, waits)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A function: what the run of a name in `RUNS` takes."""
    made, folder = {}, tmp_path_factory.mktemp("runs")

    def of(name: str) -> Taken:
        if name not in made:
            family, tower, changes = RUNS[name]
            here = folder / name
            here.mkdir()
            checkpoint, keys = CHECKPOINTS[family](here)
            if tower is not None:
                side = 56 if tower == "clip_fine" else 28
                keys["vision_tower"] = tiny.tower(here / tower, kind=tower.removesuffix("_fine"), side=side)
            keys = {"model_name_or_path": checkpoint, **keys, **changes}
            run = {"data_path": tiny.records(here / "records", "imtitt"), "output_dir": here / "out"}
            run |= {"image_folder": here / "records/images", "per_device_train_batch_size": 2, **keys}
            if family != "llava":
                known = {"version": None, "vision_tower": None, **{key: None for key in LLAVA_ONLY}}
                run = known | run
            made[name] = Taken(tiny.train_flags(here, **run))
        return made[name]

    return of


LLAVA_ONLY = (
    *("mm_vision_select_layer", "mm_projector_type", "mm_patch_merge_type", "image_aspect_ratio"),
    *("image_grid_pinpoints", "mm_use_im_patch_token"),
)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_waits_of_a_step(taken, name, number):
    step = taken(name).step(number)
    assert not step.waits.where, str(step.waits)


@pytest.mark.parametrize("name", RUNS)
def test_host_copies_change_no_number(taken, name):
    """Without them all is read from the device, as before; loss and gradients are the same bit for bit."""
    for number in range(3):
        ours, without = taken(name).step(number), taken(name).step(number, host=None)
        assert len(without.waits.where) > len(ours.waits.where)
        assert ours.loss.equal(without.loss) and ours.gradients.keys() == without.gradients.keys()
        assert all(value.equal(without.gradients[key]) for key, value in ours.gradients.items())
        assert any(value.any() for value in ours.gradients.values())


@pytest.mark.parametrize("name", ["llava-pad", "qwen2_vl-adaptive", "qwen2_5_vl", "qwen3_vl"])
def test_a_mask_of_padding_on_the_right_is_not_needed(taken, name, monkeypatch):
    from llava.model import llava_arch
    from llava.model.qwen2_vl import host_plan

    ours = taken(name).step(1)
    mask = taken(name).batches[1][0]["attention_mask"]
    assert not mask.all() and taken(name).batches[1][0]["host"].right_padded
    for module in (llava_arch, host_plan):
        monkeypatch.setattr(module, "needs_no_mask", lambda attention: False)
    masked = taken(name).step(1)
    assert len(masked.waits.where) > len(ours.waits.where)
    assert abs(ours.loss - masked.loss) < 1e-6
    assert all(torch.allclose(value, masked.gradients[key], atol=1e-6) for key, value in ours.gradients.items())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_mask_with_padding_elsewhere_counts(taken, name):
    """Rows padded on the left, as a user may give them: the host's look at the mask decides."""
    run = taken(name)
    batch, count = run.batches[1]
    text = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
    padding = int((batch["attention_mask"] == 0).sum(1).max())
    rows = (batch["attention_mask"] == 0).sum(1).tolist()
    assert padding > 0
    turned = {key: torch.stack([row.roll(n) for row, n in zip(batch[key], rows, strict=True)]) for key in text}
    with torch.no_grad():
        expected, found = (
            run.model(**{**batch, **changes, "host": None}, num_items_in_batch=count).loss for changes in ({}, turned)
        )
    assert abs(expected - found) < 1e-6


@pytest.mark.parametrize("name", ["llava-anyres", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_need_not_unpad(taken, name, rows, monkeypatch):
    """It gets no mask, and nothing that makes it look whether a row is packed; the language model alone is meant."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"), len(query)))
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=True, **kwargs)

    run = taken(name)
    batch, count = run.batches[1]
    if rows == 1:
        batch = run.batch_of(1)
    language_model = getattr(run.model.model, "language_model", run.model.model)
    expected = run.model(**batch, num_items_in_batch=count).loss
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(language_model.config, "_attn_implementation", "flash_attention_2")
    found = run.model(**batch, num_items_in_batch=count).loss
    assert len(seen) == language_model.config.num_hidden_layers and abs(found - expected) < 1e-6
    for mask, positions, starts, size in seen:
        assert mask is None and size == rows
        assert rows > 1 or positions is None or starts is not None


def test_bad_records_of_several_ranks_cost_no_wait(taken, monkeypatch):
    """One gather for tokens and bad records, of which the numbers are read in the next step."""
    trainer, (batch, _) = taken("llava-pad").trainer, taken("llava-pad").batches[1]
    gathered, told = [], []

    def gather(numbers):
        gathered.append(numbers)
        return torch.cat([numbers, numbers])

    def all_gather_object(out, new):
        out[:] = [new, ([], [])]  # the other rank found none

    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(trainer.left_out, "add", lambda bad, no_label: told.extend(bad))
    with Waits() as waits:
        batch = waits.to_device(batch)
        for bad in (["r1: dark"], [], []):
            tokens = trainer._get_num_items_in_batch([batch | {"bad_records": bad}], batch["labels"].device)
            assert waits.on_device(tokens)
        assert not waits.where, str(waits)
    assert len(gathered) == 3 and told == ["r1: dark"]
    assert int(tokens) == 2 * int((batch["labels"][:, 1:] != -100).sum())


# --- the counter itself ---


@pytest.mark.parametrize(
    ("does", "waits"),
    [
        (lambda x, mask: x[mask], 1),
        (lambda x, mask: x.index_select(0, torch.tensor([0]).to("cuda", non_blocking=True)), 0),
        (lambda x, mask: x[torch.tensor([0])], 1),  # an index of the host's
        (lambda x, mask: x.sum().item(), 1),
        (lambda x, mask: x.tolist(), 1),
        (lambda x, mask: x.cpu().numpy(), 1),
        (lambda x, mask: bool(mask.all()), 1),
        (lambda x, mask: x.repeat_interleave(mask.long()), 1),
        (lambda x, mask: x.repeat_interleave(mask.long(), output_size=2), 0),
        (lambda x, mask: torch.tensor([1.0], device=x.device) + x, 1),
        (lambda x, mask: x.new_tensor([1.0]) + x, 1),
        (lambda x, mask: torch.ones(3, device=x.device) + torch.zeros_like(x) + 1 + torch.tensor(2.0), 0),
        (lambda x, mask: torch.ones(3).to(x) + x, 1),
        (lambda x, mask: torch.where(mask, x, 0).masked_fill(mask, 1).double().to(torch.float32), 0),
        (lambda x, mask: x.requires_grad_()[mask].sum().backward(), 2),  # in the backward pass again
    ],
)
def test_the_counter(does, waits):
    with Waits() as counted:
        x, mask = counted.to_device((torch.arange(3.0), torch.tensor([True, False, True])))
        assert x.device.type == "cuda" and x.is_cuda and torch.ones(1).device.type == "cpu"
        does(x, mask)
    assert len(counted.where) == waits, str(counted)
    assert x.device.type == "cpu"  # outside, nothing is pretended


def test_the_counter_refuses_two_devices():
    with Waits() as waits, pytest.raises(RuntimeError, match="on the host"):
        waits.to_device(torch.ones(3)) + torch.ones(3)


def test_one_copy_for_all():
    """Dtypes, shapes and what is left out come out as they went in, from tensors of no element and of no dimension."""
    from llava.model.host import send

    given = [torch.arange(5), None, torch.tensor([True, False, True]), torch.zeros(0, 2), torch.tensor(2.5)]
    given += [torch.arange(6, dtype=torch.uint8).view(2, 3).T, torch.randn(3, 2, 2).to(torch.bfloat16)]
    with Waits() as waits:
        sent = send(given, "cuda")
        assert all(waits.on_device(x) for x in sent if x is not None) and not waits.where
    for ours, theirs in zip(sent, given, strict=True):
        assert ours is theirs is None or (ours.equal(theirs) and ours.dtype == theirs.dtype)
