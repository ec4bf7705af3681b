"""A run that goes on: after Ctrl-C, after its end, without an optimizer's state, and not as another model."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

STEPS = dict(save_strategy="steps", save_steps=1)


def rates(out):
    return [entry["learning_rate"] for entry in tiny.history(out)]


@pytest.fixture
def stop_at(kit, monkeypatch):
    """A function: a run that gets Ctrl-C when it has taken `step` steps."""
    from llava.train.llava_trainer import LLaVATrainer

    take = LLaVATrainer.training_step

    def run(out, step, **flags):
        def stop(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return take(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"^130$"):
            patch.setattr(LLaVATrainer, "training_step", stop)
            kit.run(out, "iiii", **flags)
        return out

    return run


@pytest.fixture
def refusal(kit, capsys):
    """A function: what a run that must be refused says, one line."""

    def of(out, **flags):
        capsys.readouterr()
        with pytest.raises(SystemExit, match=r"^2$"):
            kit.run(out, "iiii", **flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return of


# --- the learning rate ------------------------------------------------------------------------------------------------


def scheduler(kind, highest, total=10):
    from transformers import get_scheduler

    weights = [torch.nn.Parameter(torch.ones(1)) for _ in highest]
    optimizer = torch.optim.SGD([{"params": [w], "lr": rate} for w, rate in zip(weights, highest, strict=True)], lr=1.0)
    options = {"min_lr": 1e-5} if "min_lr" in kind else {"num_decay_steps": 4} if kind == "warmup_stable_decay" else {}
    return optimizer, get_scheduler(kind, optimizer, 3, total, scheduler_specific_kwargs=options)


def test_every_schedule_of_the_step_goes_on_at_a_step():
    from transformers.trainer_utils import SchedulerType

    from llava.train.schedule import MEASURED, go_on

    kinds = {kind.value for kind in SchedulerType} - set(MEASURED)
    assert len(kinds) >= 9
    for kind, step in itertools.product(sorted(kinds), (1, 2, 6)):
        optimizer, plain = scheduler(kind, [1e-3, 2e-4])
        expected = []
        for _ in range(10):
            expected.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            plain.step()
        again, late = scheduler(kind, [1e-3, 2e-4])
        for group in again.param_groups:
            group["lr"] = 0.0  # as an optimizer's state at the end of a schedule has it
        go_on(late, late.base_lrs, step)
        found = []
        for _ in range(10 - step):
            found.append([group["lr"] for group in again.param_groups])
            again.step()
            late.step()
        assert found == expected[step:], (kind, step)


COSINE = dict(max_steps=4, lr_scheduler_type="cosine", warmup_steps=2, **STEPS)
RUNS = {
    "all": {"mm_projector_lr": 5e-4},
    "lora": {"lora_enable": True, "lora_r": 4},
    "projector": {"mm_tunable_parts": "mm_mlp_adapter"},
}


@pytest.fixture(scope="module")
def through(kit, tmp_path_factory):
    """A function: the folder of a run of a kind that was not stopped, made once."""
    folder, made = tmp_path_factory.mktemp("through"), {}

    def of(kind):
        if kind not in made:
            made[kind] = kit.run(folder / kind, "iiii", **COSINE, **RUNS[kind])
        return made[kind]

    return of


def stopped(whole, folder, step, lacking):
    """The folder as it was when the run had taken `step` steps, without some files of its last checkpoint."""
    shutil.copytree(whole, folder)
    (folder / "trainer_state.json").unlink()
    for later in range(step + 1, 5):
        shutil.rmtree(folder / f"checkpoint-{later}")
    for name in (*lacking, "manifest.json"):  # as save_only_model writes, or another program
        (folder / f"checkpoint-{step}" / name).unlink()
    return folder


LACKING = {  # of a checkpoint -> what is said
    ("optimizer.pt", "scheduler.pt", "rng_state.pth"): "checkpoint-3: holds no optimizer state (save_only_model)",
    ("optimizer.pt",): "checkpoint-3: holds no optimizer state",
    ("scheduler.pt",): "checkpoint-3: holds no scheduler state: the learning rate goes on from step 3",
}


@pytest.mark.parametrize(
    "kind, lacking",
    [("all", names) for names in LACKING] + [(kind, next(iter(LACKING))) for kind in ("lora", "projector")],
)
def test_without_state_a_run_goes_on_in_its_schedule(kit, tmp_path, through, capsys, kind, lacking):
    out = stopped(through(kind), tmp_path / "out", 3, lacking)
    capsys.readouterr()
    kit.run(out, "iiii", **COSINE, **RUNS[kind])
    assert LACKING[lacking] in capsys.readouterr().out
    assert rates(out) == pytest.approx(rates(through(kind))) and rates(out)[3] > 0
    if "optimizer.pt" not in lacking:  # the moments are there, and make the same weights
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, through(kind)))
        assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())


def test_state_that_cannot_be_done_without(tmp_path):
    from llava.errors import LlavaError
    from llava.train.schedule import check_state

    def check(kind="linear", deepspeed=None, fsdp=None):
        check_state(str(tmp_path), SimpleNamespace(lr_scheduler_type=kind, deepspeed=deepspeed, fsdp=fsdp))

    check()
    for needs in ({"kind": "reduce_lr_on_plateau"}, {"kind": "greedy"}, {"deepspeed": "zero3.json"}, {"fsdp": True}):
        with pytest.raises(LlavaError, match=r"holds no .*save_only_model.*--overwrite_output_dir"):
            check(**needs)
    (tmp_path / "global_step1").mkdir()
    check(deepspeed="zero3.json")
    for name in ("optimizer.pt", "scheduler.pt"):
        with pytest.raises(LlavaError, match="greedy"):
            check(kind="greedy")
        (tmp_path / name).touch()
    check(kind="greedy")


def test_save_only_model_stops_and_goes_on(kit, tmp_path, through, stop_at):
    flags = COSINE | RUNS["all"] | {"save_only_model": True}
    out = stop_at(tmp_path / "out", 3, **flags)
    kit.run(out, "iiii", **flags)
    assert rates(out) == pytest.approx(rates(through("all")))


# --- a run that has ended ---------------------------------------------------------------------------------------------


def test_steps_are_counted_as_transformers_counts_them():
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader
    from transformers import Trainer

    from llava.train.resume import steps_asked

    compared = 0
    for records, batch, collected, drop, world, split, epochs in itertools.product(
        (1, 7, 12, 13, 24), (1, 4), (1, 3), (False, True), (1, 2, 3), (False, True), (0.4, 1, 2.5)
    ):
        if split and batch % world:
            continue
        args = SimpleNamespace(
            max_steps=-1,
            num_train_epochs=epochs,
            dataloader_drop_last=drop,
            train_batch_size=batch,
            world_size=world,
            gradient_accumulation_steps=collected,
            accelerator_config=SimpleNamespace(split_batches=split),
        )
        loader = DataLoader(range(records), batch_size=batch, drop_last=drop)
        loader = prepare_data_loader(loader, num_processes=world, process_index=0, split_batches=split)
        if not len(loader):
            continue
        trainer = SimpleNamespace(
            get_total_train_batch_size=lambda args: 1, get_sp_size=lambda: 1, num_examples=lambda loader: 1
        )
        assert steps_asked(args, records) == Trainer.set_initial_training_values(trainer, args, loader)[-1]
        compared += 1
    assert compared > 300


def test_a_finished_run_takes_more_steps_and_may_be_interrupted(kit, tmp_path, stop_at, capsys):
    """Linear, so that the old schedule has ended at a rate of 0."""
    flags = dict(lr_scheduler_type="linear", **STEPS)
    out = kit.run(tmp_path / "out", "iiii", max_steps=2, **flags)
    capsys.readouterr()
    stop_at(out, 3, max_steps=4, **flags)
    said = capsys.readouterr()
    assert f"{out}: was trained for 2 steps, 4 are asked for: the run goes on" in said.out
    assert f"interrupted at step 3; the same command goes on from {out}/checkpoint-3" in said.err
    assert not (out / "trainer_state.json").exists()
    kit.run(out, "iiii", max_steps=4, **flags)
    assert f"resuming from {out}/checkpoint-3" in capsys.readouterr().out
    assert rates(out) == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])  # of 2 steps, then of 4
    for steps in (4, 3):
        kit.run(out, "iiii", max_steps=steps, **flags)
        assert f"{out}: already trained (4 steps)" in capsys.readouterr().out


def test_more_steps_equal_a_run_of_as_many(kit, tmp_path):
    flags = dict(lr_scheduler_type="constant", **STEPS)
    straight = kit.run(tmp_path / "straight", max_steps=4, **flags)  # the second epoch begins with step 4
    out = kit.run(tmp_path / "out", max_steps=2, **flags)
    kit.run(out, max_steps=4, **flags)
    expected = [entry["loss"] for entry in tiny.history(straight)]
    assert [entry["loss"] for entry in tiny.history(out)] == pytest.approx(expected, abs=1e-6)


def test_a_run_of_epochs_goes_on_for_more_epochs_or_more_data(kit, tmp_path, capsys):
    flags = dict(max_steps=-1, num_train_epochs=1, save_strategy="epoch")
    data = tmp_path / "data.json"
    records = json.loads(Path(kit.records("iiii")).read_text())
    data.write_text(json.dumps(records))
    (tmp_path / "images").symlink_to(kit.folder / "data_iiii" / "images")

    def run(steps, **changes):
        capsys.readouterr()
        kit.run(tmp_path / "out", None, data_path=data, **(flags | changes))
        assert len(tiny.history(tmp_path / "out")) == steps
        return capsys.readouterr().out

    run(1)
    assert "already trained (1 steps)" in run(1)
    assert "already trained" in run(1, per_device_train_batch_size=1)  # other batches make no more epochs
    assert "2 are asked for: the run goes on" in run(2, num_train_epochs=2)
    data.write_text(json.dumps(records + [{**record, "id": f"new{i}"} for i, record in enumerate(records)]))
    assert "4 are asked for: the run goes on" in run(4, num_train_epochs=2)
    data.unlink()
    assert "already trained (4 steps)" in run(4, num_train_epochs=2)


def test_without_a_checkpoint_a_finished_run_says_how(kit, tmp_path, refusal):
    out = kit.run(tmp_path / "out", "iiii", max_steps=1)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    said = refusal(out, max_steps=2)
    assert f"{out} was trained for 1 steps, 2 are asked for" in said
    assert "--overwrite_output_dir" in said and "model_name_or_path" in said
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for text in ("", "{}", '{"global_step": 4, "log_hist'):
        (out / "trainer_state.json").write_text(text)
        assert f"{out} was trained for 1 steps, 2 are asked for" in refusal(out, max_steps=2)
    (out / "run_state.json").unlink()  # as of an earlier version
    assert "trainer_state.json: not valid JSON" in (said := refusal(out, max_steps=2)) and "cannot be told" in said


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(kit, tmp_path, stop_at, capsys, monkeypatch):
    from llava.families.llava import Llava

    out = stop_at(tmp_path / "out", 1, max_steps=2)
    assert "interrupted at step 1; no checkpoint yet: the same command begins anew\n" in capsys.readouterr().err
    stop_at(out, 1, max_steps=2, **STEPS, overwrite_output_dir=True)
    said = capsys.readouterr().err
    assert f"interrupted at step 1; the command without --overwrite_output_dir goes on from {out}/checkpoint-1" in said
    stop_at(tmp_path / "other", 1, max_steps=2, resume_from_checkpoint=out / "checkpoint-1")
    assert f"at step 1; the same command goes on from {out}/checkpoint-1" in capsys.readouterr().err

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Llava, "prepare", stop)
    with pytest.raises(SystemExit, match=r"^130$"):
        kit.run(out, "iiii", max_steps=2)
    said = capsys.readouterr().err
    assert f"interrupted before training began; the same command goes on from {out}/checkpoint-1" in said
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match=r"^130$"):
        kit.run(out, "iiii", max_steps=2)
    assert "interrupted" not in capsys.readouterr().err


# --- another model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(kit, tmp_path_factory):
    """A run of which one more step is asked for, and its flags."""
    flags = dict(mm_projector_lr=5e-4, **STEPS)
    return kit.run(tmp_path_factory.mktemp("cut") / "out", "iiii", max_steps=1, **flags), flags | {"max_steps": 2}


OTHER = {  # key -> (its value, what the line also names)
    "vision_tower": ("siglip", "/clip"),
    "mm_vision_tower_type": ("hevc_vit", "clip"),
    "mm_vision_select_layer": (-1, "-2"),
    "mm_vision_select_feature": ("cls_patch", "patch"),
    "s2": (True, "False"),
    "use_token_compression": (True, "False"),
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_use_im_start_end": (True, "False"),
    "mm_tunable_parts": ("mm_mlp_adapter", "mm_language_model,mm_mlp_adapter,mm_vision_tower"),
    "lora_enable": (True, "False"),
    "mm_projector_lr": (1e-3, "0.0005"),
    "optim": ("adafactor", "adamw_torch"),
}


@pytest.mark.parametrize("bare", [False, True])
def test_another_model_is_refused(kit, cut, tmp_path, refusal, monkeypatch, bare):
    from llava.families.llava import Llava

    out, flags = cut
    if bare:  # as LLaVA-NeXT's and earlier ones: config.json alone
        out = shutil.copytree(out, tmp_path / "bare")
        for name in ("run_config.json", "manifest.json"):
            (out / "checkpoint-1" / name).unlink()
    monkeypatch.setattr(Llava, "prepare", lambda *args: pytest.fail("weights are loaded"))
    for key, (value, before) in OTHER.items():
        if bare and key in ("mm_projector_lr", "optim"):
            continue
        value = getattr(kit, value) if key == "vision_tower" else value
        said = refusal(out, **(flags | {key: value}))
        assert f"{out}/checkpoint-1: found a checkpoint of another run" in said, (key, said)
        assert f"{key} is " in said and str(value) in said and f"{before}; " in said, (key, said)
        assert "--overwrite_output_dir" in said
    wide = tiny.llm(tmp_path / "wide", hidden_size=64)
    said = refusal(out, **(flags | {"model_name_or_path": wide}))
    assert "hidden_size 64" in said and "hidden_size 32" in said
    other = tiny.llm(tmp_path / "llama", kind="llama")
    assert "LlavaLlamaForCausalLM" in refusal(out, **(flags | {"model_name_or_path": other}))


def test_the_same_tower_by_another_name_goes_on(kit, cut, tmp_path, capsys):
    out = shutil.copytree(cut[0], tmp_path / "out")
    (tmp_path / "link").symlink_to(kit.clip)
    kit.run(out, "iiii", **(cut[1] | {"vision_tower": f"{tmp_path}/../{tmp_path.name}/link/"}), learning_rate=2e-3)
    assert len(tiny.history(out)) == 2 and math.isclose(rates(out)[1], 1e-3)  # this run's rate, half way


def test_another_adapter_is_refused(kit, tmp_path, refusal):
    flags = dict(lora_enable=True, lora_r=4, **STEPS)
    out = kit.run(tmp_path / "out", "iiii", max_steps=1, **flags)
    same = shutil.copytree(kit.llm, tmp_path / "copy")
    for bare in (False, True):
        if bare:
            for name in ("run_config.json", "manifest.json"):
                (out / "checkpoint-1" / name).unlink()
        for changes in ({"lora_r": 8}, {"lora_alpha": 32}, {"lora_enable": False}, {"model_name_or_path": same}):
            said = refusal(out, **(flags | {"max_steps": 2} | changes))
            assert f"{next(iter(changes))} is " in said, (changes, said)
