"""Checkpoints that are damaged, cut off or lost: named, passed over, replaced; what was whole before stays."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.train.checkpoints import checkpoints_of, fault, newest_whole, rotate, tidy
from tests import tiny

STEPS = dict(save_strategy="steps", save_steps=1, lr_scheduler_type="constant")


def quiet(*lines):
    pass


def weights_differ(one: Path, other: Path) -> list[str]:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


@pytest.fixture(scope="module")
def whole(kit, tmp_path_factory):
    """A run of three steps with a checkpoint of each."""
    return kit.run(tmp_path_factory.mktemp("whole") / "out", "iiii", max_steps=3, **STEPS)


@pytest.fixture
def unfinished(whole, tmp_path):
    """The same run as it was after its second step."""
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "trainer_state.json").unlink()
    shutil.rmtree(out / "checkpoint-3")
    return out


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "flipped": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
}


def test_the_manifest_lists_what_is_there(whole):
    folder = whole / "checkpoint-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == names - {"manifest.json"} and len(names) > 8
    for name, entry in manifest["files"].items():
        said = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout.split()
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": said[0]}
    del manifest["files"]
    versions = manifest.pop("versions")
    assert versions["torch"].startswith(torch.__version__.split("+")[0]) and "transformers" in versions
    assert manifest == {"schema": 1, "step": 2, "world_size": 1, "deepspeed": None, "finite": True}
    assert not list(whole.glob(".*"))


def test_damage_to_any_file_is_seen(whole, tmp_path):
    """A checkpoint without a manifest shows that a file was cut, but not that one has gone or has changed."""
    names = sorted(path.name for path in (whole / "checkpoint-2").iterdir() if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "config.json", "tokenizer.json"} < set(names)
    for name in names:
        for how, damage in DAMAGE.items():
            folder = shutil.copytree(whole / "checkpoint-2", tmp_path / name / how)
            damage(folder / name)
            found = fault(folder, tell=quiet)
            if name == "manifest.json" and how in ("missing", "longer"):
                assert found is None  # as of another program; as it was
            elif name == "manifest.json" and how == "flipped":
                continue  # a letter of a version's name may be anything
            else:
                assert found is not None and name in found, (name, how, found)
            if name != "manifest.json":
                seen_by_size = fault(folder, "sizes", tell=quiet) is not None
                assert seen_by_size == (how != "flipped") or name == "trainer_state.json", (name, how)
                (folder / "manifest.json").unlink()
                cut = Path(name).suffix in (".json", ".safetensors", ".pt", ".pth") and how in ("cut", "empty")
                assert (fault(folder, tell=quiet) is not None) >= cut, (name, how)
            shutil.rmtree(folder)


def test_damage_in_a_folder_of_a_checkpoint_is_seen(whole, tmp_path):
    """As DeepSpeed's state is."""
    from llava.train import checkpoints

    folder = shutil.copytree(whole / "checkpoint-2", tmp_path / "out/.checkpoint-2.tmp/checkpoint-2")
    (folder / "manifest.json").unlink()
    (folder / "global_step2").mkdir()
    torch.save({"a": torch.ones(9)}, folder / "global_step2/zero_pp_rank_0_optim_states.pt")
    (folder / "latest").write_text("global_step2")
    files = checkpoints.entries(folder, checkpoints.files_in(folder))
    final = checkpoints.publish(folder, tmp_path / "out", {"step": 2}, files)
    assert final == tmp_path / "out/checkpoint-2" and fault(final) is None
    state = final / "global_step2/zero_pp_rank_0_optim_states.pt"
    for how in ("cut", "flipped", "missing"):
        content = state.read_bytes()
        DAMAGE[how](state)
        assert "global_step2/zero_pp_rank_0_optim_states.pt" in fault(final)
        if how != "missing":
            state.write_bytes(content)
    (final / "manifest.json").unlink()
    shutil.rmtree(final / "global_step2")
    assert fault(final, tell=quiet) == "global_step2 is missing"


def test_a_manifest_that_is_none(whole, tmp_path):
    for number, text in enumerate(("[]", "{}", '{"schema": 1, "files": 3}', '{"schema": 7, "files": {}}', "\x00")):
        folder = shutil.copytree(whole / "checkpoint-1", tmp_path / str(number))
        (folder / "manifest.json").write_text(text)
        assert "manifest.json" in fault(folder), text
    manifest = json.loads((whole / "checkpoint-1/manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "finite": False}))
    assert fault(folder) == "its weights are not finite"


def test_a_damaged_checkpoint_is_passed_over_and_replaced(kit, unfinished, whole, capsys):
    out = unfinished
    flip(out / "checkpoint-2/model.safetensors")
    (out / "checkpoint-2/foreign").write_text("of the old one")
    capsys.readouterr()
    kit.run(out, "iiii", max_steps=3, **STEPS)
    said = capsys.readouterr().out
    assert f"{out}/checkpoint-2: passed over: model.safetensors is not as it was written (SHA-256)" in said
    assert f"resuming from {out}/checkpoint-1" in said
    assert not weights_differ(out, whole) and not weights_differ(out / "checkpoint-2", whole / "checkpoint-2")
    assert not (out / "checkpoint-2/foreign").exists()
    assert [fault(folder) for folder in checkpoints_of(out)] == [None] * 3


def test_sizes_alone_are_quick_and_see_less(kit, unfinished, capsys):
    flip(unfinished / "checkpoint-2/optimizer.pt")
    assert newest_whole(str(unfinished), "sizes", quiet).endswith("checkpoint-2")
    assert newest_whole(str(unfinished), "full", quiet).endswith("checkpoint-1")
    with pytest.raises(SystemExit, match=r"^2$"):
        kit.run(unfinished, "iiii", max_steps=3, resume_from_checkpoint=unfinished / "checkpoint-2", **STEPS)
    assert f"{unfinished}/checkpoint-2: optimizer.pt is not as it was written" in capsys.readouterr().err


def test_without_one_that_is_whole_the_run_begins_anew(kit, unfinished, whole, capsys):
    for step in (1, 2):
        (unfinished / f"checkpoint-{step}/trainer_state.json").unlink()
    capsys.readouterr()
    kit.run(unfinished, "iiii", max_steps=3, **STEPS)
    said = capsys.readouterr().out
    assert said.count("passed over: trainer_state.json is missing") == 2 and "resuming" not in said
    assert not weights_differ(unfinished, whole)


def test_what_is_kept(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(out / "checkpoint-3", out / "checkpoint-9")
    (out / "checkpoint-final").mkdir()

    def kept(limit, *keep):
        rotate(out, limit, {str(out / f"checkpoint-{step}") for step in keep})
        return [folder.name for folder in checkpoints_of(out)]

    assert len(kept(None, 3)) == 4
    assert kept(3, 3) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # one of a later step is not this run's
    assert kept(2, 3, 1) == ["checkpoint-1", "checkpoint-3"]
    assert kept(1, 3, 1) == ["checkpoint-1", "checkpoint-3"]
    assert kept(1, 3) == ["checkpoint-3"]
    assert (out / "checkpoint-final").is_dir() and not list(out.glob(".checkpoint*"))


def test_what_a_killed_save_leaves(whole, tmp_path):
    """Whole ones come into sight, halves go, whatever was there stays."""
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-1", out / "checkpoint-1")
    for step in (1, 2, 3):
        shutil.copytree(whole / f"checkpoint-{step}", out / f".checkpoint-{step}.tmp/checkpoint-{step}")
    (out / ".checkpoint-3.tmp/checkpoint-3/manifest.json").unlink()
    shutil.copytree(whole / "checkpoint-3", out / ".checkpoint-3.old")
    (out / ".checkpoint-3.old/of_the_old_one").touch()
    (out / ".checkpoint-x.tmp").mkdir()
    flip(out / ".checkpoint-1.tmp/checkpoint-1/model.safetensors")
    tidy(out)
    assert [fault(folder) for folder in checkpoints_of(out)] == [None] * 3
    assert (out / "checkpoint-3/of_the_old_one").exists()
    assert [path.name for path in out.glob(".*")] == [".checkpoint-x.tmp"]


# --- killed -----------------------------------------------------------------------------------------------------------

MOMENTS = 5  # at which a run is killed, of those that there are; all of them in the long tests
KILLED = dict(max_steps=3, save_total_limit=1, **STEPS)


def test_killed_at_any_moment_of_a_save_it_goes_on(kit, forks, tmp_path):
    """Two checkpoints that are written, one that is removed, the final model: no half of them is ever visible."""
    flags = {"data_path": kit.records("iiii"), **KILLED}
    long = bool(os.environ.get("LLAVA_LONG_TESTS"))

    def run(name, change=None):
        return forks.run(kit.flags(tmp_path / name, **flags), tmp_path / f"{name}.log", change=change)

    assert run("through", f"tests.train.faults:count_moments:{tmp_path}/moments") == 0
    moments = range(int((tmp_path / "moments").read_text()))
    assert len(moments) > 60
    moments = moments if long else sorted(random.Random(0).sample(moments, MOMENTS))
    for moment in moments:
        out = tmp_path / f"at_{moment}"
        assert run(out.name, f"tests.train.faults:kill_at:{moment}") == -9
        visible = checkpoints_of(out)
        assert [fault(folder) for folder in visible] == [None] * len(visible), moment
        before = visible[-1].name if visible else None
        state = out / "run_state.json"
        ended = state.exists() and json.loads(state.read_text())["state"] == "finished"
        assert run(out.name) == 0, (moment, (tmp_path / f"{out.name}.log").read_text()[-3000:])
        said = (tmp_path / f"{out.name}.log").read_text()
        assert before is None or ended or f"resuming from {out}/checkpoint-" in said
        assert len(tiny.history(out)) == 3 and not weights_differ(out, tmp_path / "through"), moment
        assert json.loads((out / "run_state.json").read_text())["state"] == "finished"
        assert [folder.name for folder in checkpoints_of(out)] == ["checkpoint-3"], moment
        assert not list(out.glob(".*")), list(out.glob(".*"))
        shutil.rmtree(out)


def test_a_run_killed_behind_its_last_save_keeps_to_its_limit(kit, whole, tmp_path):
    """All steps are taken and saved, what is too many is not removed yet, and the final model not written."""
    out = shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("trainer_state.json"))
    shutil.copy(whole / "checkpoint-3/trainer_state.json", out / "checkpoint-3")
    shutil.copy(whole / "checkpoint-2/trainer_state.json", out / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-1")
    (out / "model.safetensors").unlink()
    (out / "run_state.json").unlink()
    kit.run(out, "iiii", max_steps=3, **STEPS, save_total_limit=1)
    assert [folder.name for folder in checkpoints_of(out)] == ["checkpoint-3"] and not weights_differ(out, whole)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function: a file system of so many bytes; called again, the same with another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def of(size: int) -> Path:
        remount = ["-o", f"remount,size={size}"] if os.path.ismount(folder) else ["-o", f"size={size}"]
        done = subprocess.run(["mount", "-t", "tmpfs", *remount, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount a tmpfs ({done.stderr.strip()})")
        return folder

    yield of
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_in_any_file_of_a_save(kit, whole, small_disk, capsys):
    size = sum(path.stat().st_size for path in (whole / "checkpoint-1").iterdir())
    model = (whole / "model.safetensors").stat().st_size
    shares = {"weights": 0.2, "optimizer": 0.8, "last files": 0.98, "final model": None}
    for what, share in shares.items():
        room = size + int(size * share) if share else 2 * size + size // 10 + model // 2
        out = small_disk(room) / "out"
        flags = dict(max_steps=2, **STEPS)
        with pytest.raises(SystemExit, match=r"^2$"):
            kit.run(out, "iiii", **flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "disk full: a checkpoint needs about " in lines[0], (what, lines)
        assert f"needs about {size / 1e6:.3g} MB" in lines[0]
        last = 1 if share else 2
        assert newest_whole(str(out)) == str(out / f"checkpoint-{last}"), what
        assert not list(out.glob(".checkpoint*")) and not list(out.glob(".final*"))
        small_disk(10 * size)
        kit.run(out, "iiii", **flags)
        assert f"resuming from {out}/checkpoint-{last}" in capsys.readouterr().out
        assert len(tiny.history(out)) == 2 and fault(out / "checkpoint-2") is None
        assert not weights_differ(out, whole / "checkpoint-2")
        shutil.rmtree(out)
