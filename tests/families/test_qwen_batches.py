"""Packed rows of the Qwen-VL families: what a row gives is what its samples give, one by one.

Where all patches are kept the samples are computed by transformers' own model, else by this project's, both with plain
attention and logits at every position.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX
from llava.data.dataset import BadRecord, SampleArgs
from llava.data.records import load_records
from llava.errors import LlavaError
from llava.families import get_family
from llava.families.training import attention_for
from llava.model.adaptive_patches import PatchChoice
from llava.model.lora import add_lora
from llavavit.varlen_attention import varlen_attention_forward
from tests import tiny
from tests.support.waits import Waits

KINDS = "itmitim"  # the records: one image, text only, two images, ...
CASES = [("qwen2_vl", "all"), ("qwen2_vl", "budget"), ("qwen2_5_vl", "all"), ("qwen2_5_vl", "budget")]
CASES += [("qwen3_vl", "all")]
MIXED, TEXT = (0, 1, 2, 3), (1, 4)  # numbers of records; only the first have images


class Packs:
    """One family's samples, a model that packs them, and another that takes them one by one."""

    def __init__(self, name: str, patches: str, folder):
        from transformers import AutoModelForImageTextToText

        self.family, checkpoint = get_family(name), tiny.qwen2_vl(folder / name, name)
        self.loaded = self.family.load(checkpoint, device="cpu", attn_implementation="varlen")
        if patches == "budget":
            self.family.choose_patches(self.loaded, PatchChoice(method="budget", alpha=0.5))
            self.alone = self.family.load(checkpoint, device="cpu", attn_implementation="eager").model
        else:
            self.alone = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager")
        self.model = self.loaded.model
        records = load_records(tiny.records(folder / f"{name}_{patches}", KINDS))
        self.args = SampleArgs(image_folder=str(folder / f"{name}_{patches}/images"))
        self.samples = [self.family.sample(record, self.loaded, self.args) for record in records]

    def row(self, numbers) -> dict:
        """The batch of these samples, packed."""
        args = replace(self.args, pack_sequences=True)
        return self.family.collate([self.samples[number] for number in numbers], self.loaded, args)

    def lengths(self, numbers) -> list[int]:
        return [len(self.samples[number]["input_ids"]) for number in numbers]

    def loss_alone(self, model, numbers, count: int) -> torch.Tensor:
        total = 0
        for number in numbers:
            given = {key: value for key, value in self.samples[number].items() if key not in ("labels", "truncated")}
            ids = given.pop("input_ids")[None]
            kinds = (ids == self.family.visual_token(self.loaded)).long()
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **given).logits[0, :-1]
            total = total + F.cross_entropy(logits, self.samples[number]["labels"][1:], reduction="sum")
        return total / count

    def count(self, numbers) -> int:
        return sum(int((self.samples[number]["labels"][1:] != IGNORE_INDEX).sum()) for number in numbers)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def packs(request, tmp_path_factory):
    return Packs(*request.param, tmp_path_factory.mktemp("packs"))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """By parameters' names; zero where the loss does not reach."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def check_equal(packs, numbers, model, alone, batch=None):
    """Loss and every gradient within 1e-5."""
    count = packs.count(numbers) + 3  # of more rows than this
    packed = model.train()(**(batch or packs.row(numbers)), num_items_in_batch=torch.tensor(count)).loss
    single = packs.loss_alone(alone.eval(), numbers, count)
    assert packed.item() == pytest.approx(single.item(), abs=1e-5)
    found, expected = gradients(model, packed), gradients(alone, single)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), name
    return found


def test_a_row_is_its_samples(packs):
    batch = packs.row(MIXED)
    lengths = packs.lengths(MIXED)
    assert batch["host"].packed == lengths and batch["input_ids"].shape == (1, sum(lengths))
    assert "attention_mask" not in batch and batch["host"].attention_mask is None
    for key in ("input_ids", "labels", "mm_token_type_ids", "image_grid_thw"):
        assert getattr(batch["host"], key).equal(batch[key])
    for number, ids, labels in zip(
        MIXED, batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths), strict=True
    ):
        assert ids.equal(packs.samples[number]["input_ids"]) and labels[0] == IGNORE_INDEX
        assert labels[1:].equal(packs.samples[number]["labels"][1:])
    images = [packs.samples[number] for number in MIXED if "pixel_values" in packs.samples[number]]
    assert batch["pixel_values"].equal(torch.cat([sample["pixel_values"] for sample in images]))


def test_the_first_label_of_a_sample_is_dropped(packs):
    """Nothing predicts it; in the row it would be learned from the sample before."""
    sample = {"input_ids": torch.arange(5, 9), "labels": torch.arange(5, 9)}
    batch = packs.family.collate([sample, sample], packs.loaded, replace(packs.args, pack_sequences=True))
    assert batch["labels"][0, :8].tolist() == [IGNORE_INDEX, 6, 7, 8] * 2
    assert sample["labels"].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_loss_and_gradients(packs, checkpointing, lora):
    models = [packs.model, packs.alone]
    if checkpointing:
        packs.model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        models = [add_lora(model, r=4, alpha=8, dropout=0.0, base="base") for model in models]
        for model in models:
            torch.manual_seed(1)
            for name, value in model.named_parameters():
                value.requires_grad = "lora_" in name or ".visual." in name
                if "lora_B" in name:
                    torch.nn.init.normal_(value, std=0.1)  # of itself 0, which would leave lora_A without a gradient
    found = check_equal(packs, MIXED, *models)
    vision, adapters = ([name for name in found if part in name] for part in (".visual.", "lora_"))
    assert all(found[name].any() for name in vision + adapters) and len(adapters) == (
        2 * 7 * packs.model.config.text_config.num_hidden_layers if lora else 0
    )
    packs.model.gradient_checkpointing_disable()
    if lora:
        packs.model, packs.alone = (model.unload() for model in models)
        for model in (packs.model, packs.alone):
            model.requires_grad_(True)


@settings(max_examples=4, deadline=None)
@given(numbers=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=6))
def test_whatever_is_packed(packs, numbers):
    check_equal(packs, numbers, packs.model, packs.alone)


@pytest.fixture
def watched(packs):
    """The keyword arguments that the language model is called with, call by call."""
    seen = []

    def watch(module, args, kwargs):
        kwargs["inputs_embeds"].retain_grad()
        seen.append(kwargs)

    hook = packs.model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    yield seen
    hook.remove()
    packs.model.zero_grad()


def test_positions_start_anew(packs, watched):
    """Rotary angles count differences alone, so no loss tells: but positions would grow beyond what a model knows."""
    packs.model.train()(**packs.row(MIXED))
    for number, found in zip(MIXED, watched[0]["position_ids"].split(packs.lengths(MIXED), dim=2), strict=True):
        sample = packs.samples[number]
        ids = sample["input_ids"][None]
        expected = torch.arange(ids.shape[1]).expand(3, 1, -1)
        if "image_grid_thw" in sample:
            kinds = (ids == packs.family.visual_token(packs.loaded)).long()
            levels = {key: sample[key] for key in sample if key == "image_patch_levels"}
            grids = {"image_grid_thw": sample["image_grid_thw"]}
            expected = packs.alone.model.get_rope_index(ids, kinds, **grids, **levels)[0]
        assert found.equal(expected)


def test_no_sample_reaches_another(packs, watched):
    """The gradient of one sample's loss, with respect to the embeddings of the others, is 0."""
    batch, lengths = packs.row(MIXED), packs.lengths(MIXED)
    for learned in range(len(MIXED)):
        labels = torch.full_like(batch["labels"], IGNORE_INDEX)
        own = slice(sum(lengths[:learned]), sum(lengths[: learned + 1]))
        labels[0, own] = batch["labels"][0, own]
        packs.model.train()(**batch | {"labels": labels, "host": replace(batch["host"], labels=labels)}).loss.backward()
        reached = [bool(part.any()) for part in watched[-1]["inputs_embeds"].grad[0].split(lengths)]
        assert reached == [at == learned for at in range(len(MIXED))]


def test_text_alone(packs):
    """An image that nobody sees keeps every process's vision encoder at work: it changes nothing."""
    batch = packs.row(TEXT)
    assert batch["host"].packed == [*packs.lengths(TEXT), 1]
    assert batch["pixel_values"].shape[0] == 4 and sum(batch["host"].packed) == batch["input_ids"].shape[1]
    found = check_equal(packs, TEXT, packs.model, packs.alone, batch)
    vision = [value for name, value in packs.model.named_parameters() if ".visual." in name]
    assert all(value.grad is not None and not value.grad.any() for value in vision)
    assert found["lm_head.weight"].any()


def test_bad_records_alone(packs):
    """One short row without labels, for which a step is taken all the same."""
    bad = [BadRecord("r1", "gone"), BadRecord("r2", "nothing to learn", "no_label")]
    for left_out in ([], bad):
        batch = packs.family.collate(left_out, packs.loaded, replace(packs.args, pack_sequences=True))
        assert [batch.pop(kind, []) for kind in ("bad_records", "no_label")] == (
            [["r1: gone"], ["r2: nothing to learn"]] if left_out else [[], []]
        )
        assert batch["input_ids"].shape == (1, 3) and batch["host"].packed == [2, 1]
        loss = packs.model.train()(**batch, num_items_in_batch=torch.tensor(7)).loss
        assert loss.item() == 0 and not any(value.any() for value in gradients(packs.model, loss).values())


def test_in_evaluation_too(packs):
    """eval_loss is computed in eval mode, of the same batches."""
    with torch.no_grad():
        count = torch.ones((), dtype=torch.long)
        packed = packs.model.eval()(**packs.row(MIXED), num_items_in_batch=count).loss
        assert packed.item() == pytest.approx(packs.loss_alone(packs.alone, MIXED, 1).item(), rel=1e-5)


def test_flash_attention_gets_the_segments(packs, monkeypatch):
    """And no mask or positions, by which it would go instead."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs["position_ids"], kwargs["cu_seq_lens_k"] is kwargs["cu_seq_lens_q"]))
        return varlen_attention_forward(module, query, key, value, attention_mask, **kwargs)

    batch, language_model = packs.row(MIXED), packs.model.model.language_model
    expected = packs.model.train()(**batch).loss
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(language_model.config, "_attn_implementation", "flash_attention_2")
    # whether a mask comes with the row or not
    for inputs in (batch, batch | {"attention_mask": torch.ones_like(batch["input_ids"])}):
        assert packs.model(**inputs).loss.equal(expected)
    assert seen == [(None, None, True)] * 2 * language_model.config.num_hidden_layers


def test_a_step_does_not_wait_for_the_device(packs):
    packs.model.zero_grad()
    batch = packs.row(MIXED)
    with Waits() as waits:
        model, batch = waits.to_device(packs.model.train()), waits.to_device(batch)
        model(**batch, num_items_in_batch=waits.to_device(torch.tensor(40))).loss.backward()
    assert not waits.where, str(waits)
    packs.model.zero_grad()


def test_attention_without_segments_is_refused(packs, monkeypatch):
    monkeypatch.setattr(packs.model.model.language_model.config, "_attn_implementation", "sdpa")
    with pytest.raises(LlavaError, match="attn_implementation: found 'sdpa', which lets the samples of a packed row"):
        packs.model(**packs.row(MIXED))


def training_args(asked: str | None) -> SimpleNamespace:
    own = {"bf16": False, "fp16": False, "deepspeed": None, "lora_enable": False, "device": torch.device("cpu")}
    return SimpleNamespace(attn_implementation=asked, **own)


def test_attention_of_a_packed_run():
    chosen = {
        asked: attention_for(training_args(asked), packed=True) for asked in (None, "varlen", "flash_attention_2")
    }
    assert chosen == {None: "varlen", "varlen": "varlen", "flash_attention_2": "flash_attention_2"}
    assert attention_for(training_args(None)) == attention_for(training_args("sdpa")) == "sdpa"
    for asked in ("sdpa", "eager"):
        with pytest.raises(LlavaError, match=f"found '{asked}', which lets .*; expected varlen or flash_attention_2"):
            attention_for(training_args(asked), packed=True)
