"""The loss is the mean over the supervised tokens of the global batch, however that is cut up."""

import math

import pytest

from tests import tiny

ALL = "mm_vision_tower,mm_mlp_adapter,mm_language_model"


def history(kit, out, kinds, **changes):
    return tiny.history(kit.run(out, kinds, **changes))


def assert_equal(ours, expected, tolerance=1e-5):
    assert len(ours) == len(expected) > 0
    for got, want in zip(ours, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=tolerance)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], abs=tolerance)


@pytest.fixture(scope="module")
def plain(kit, tmp_path_factory):
    """Batches of four at once; answers are one to three sentences long."""
    return history(kit, tmp_path_factory.mktemp("plain") / "out", "itmtitmtiimt")


@pytest.mark.parametrize("batch", [2, 1])
def test_accumulation_equals_one_batch(kit, tmp_path, plain, batch):
    ours = history(
        kit,
        tmp_path / "out",
        "itmtitmtiimt",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
    )
    assert_equal(ours, plain)


def test_loss_is_the_mean_over_supervised_tokens(kit, tmp_path, plain, spy):
    """The first logged loss, from the model's own logits and the labels after the merge."""
    import torch

    kit.run(tmp_path / "out", "itmtitmtiimt", learning_rate=0.0)
    trainer = spy.trainer
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    labels = batch.pop("labels")
    model = trainer.model.eval()
    with torch.no_grad():
        merged = model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"],
            None,
            batch["attention_mask"],
            None,
            labels,
            batch["images"],
            batch["modalities"],
            batch["image_sizes"],
        )
        logits = model(inputs_embeds=merged[4], attention_mask=merged[2]).logits
    targets = merged[5][:, 1:]
    supervised = targets != -100
    log_probs = logits[:, :-1].log_softmax(-1)[supervised]
    expected = -log_probs.gather(1, targets[supervised][:, None]).mean().item()
    assert plain[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reentrant", [None, True])
def test_gradient_checkpointing_changes_no_number(kit, tmp_path, plain, spy, reentrant):
    changes = {} if reentrant is None else {"gradient_checkpointing_kwargs": '{"use_reentrant": true}'}
    assert_equal(history(kit, tmp_path / "out", "itmtitmtiimt", gradient_checkpointing=True, **changes), plain)
    model = spy.trainer.model
    layers = [*model.get_model().layers, *model.get_vision_tower().vision_tower.vision_model.encoder.layers]
    assert len(layers) == 5 and all(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("reentrant", [None, True])
def test_gradient_checkpointing_in_stage_one(kit, tmp_path, reentrant):
    changes = dict(mm_tunable_parts="mm_mlp_adapter", version="plain")
    expected = history(kit, tmp_path / "off", "iiiiiiiiiiii", **changes)
    if reentrant:
        changes["gradient_checkpointing_kwargs"] = '{"use_reentrant": true}'
    ours = history(kit, tmp_path / "on", "iiiiiiiiiiii", gradient_checkpointing=True, **changes)
    assert all(entry["grad_norm"] > 0 for entry in expected)
    assert_equal(ours, expected)


@pytest.mark.parametrize("parts", [ALL, "mm_mlp_adapter", "mm_vision_tower"])
def test_text_only_batches_whatever_is_trained(kit, tmp_path, parts):
    """A batch that reaches no trained weight still takes its step: its loss counts, its gradient is zero."""
    flags = {"pretrain_mm_mlp_adapter": kit.projector} if parts == "mm_vision_tower" else {}
    flags |= dict(per_device_train_batch_size=3, mm_tunable_parts=parts)
    steps = history(kit, tmp_path / "out", "tttiiittt", **flags)
    assert [entry["grad_norm"] > 0 for entry in steps] == ([True] * 3 if parts == ALL else [False, True, False])
    assert all(entry["loss"] > 1 for entry in steps)


@pytest.mark.parametrize("parts", [ALL, "mm_mlp_adapter"])
def test_a_batch_without_labels_has_loss_zero(kit, tmp_path, parts):
    """Its one record has no readable picture, so nothing is left in it."""
    from pathlib import Path

    data = Path(tiny.records(tmp_path / "data", "iii"))
    picture = data.parent / "images/1_0.png"
    picture.write_bytes(picture.read_bytes()[:200])
    steps = history(
        kit,
        tmp_path / "out",
        None,
        data_path=data,
        per_device_train_batch_size=1,
        mm_tunable_parts=parts,
        logging_nan_inf_filter=False,
    )
    assert [entry["loss"] == 0 for entry in steps] == [False, True, False]
    assert steps[1]["grad_norm"] == 0
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in steps)
