"""What a user gets wrong ends a run with exit status 2 and one line that says what, where and what was expected."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    """A function: change the records of a new data file and get its path."""

    def changed(change) -> Path:
        path = Path(tiny.records(tmp_path / "data", "iimt"))
        records = json.loads(path.read_text())
        change(records)
        path.write_text(json.dumps(records, indent=1))
        return path

    return changed


def fails(kit, capsys, out, **changes) -> str:
    """The line that a run ends with."""
    with pytest.raises(SystemExit) as stop:
        kit.run(out, **changes)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0])  # the last line, and the only one
    assert "Traceback" not in captured.err
    assert not (out / "trainer_state.json").exists()
    return lines[0]


def test_missing_image(kit, tmp_path, capsys, data):
    path = data(lambda records: records[1].update(image="gone.png"))
    error = fails(kit, capsys, tmp_path / "out", data_path=path)
    assert f"{path}: record 2 (id 'r1')" in error and f"{path.parent}/images/gone.png" in error


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_that_does_not_parse(kit, tmp_path, capsys, data, suffix):
    path = data(lambda records: None)
    lines = path.read_text().splitlines()
    if suffix == "jsonl":
        lines = [json.dumps(record) for record in json.loads(path.read_text())]
    lines[2] = lines[2].replace(":", "", 1)
    (path.parent / f"bad.{suffix}").write_text("\n".join(lines))
    error = fails(kit, capsys, tmp_path / "out", data_path=path.parent / f"bad.{suffix}")
    assert f"{path.parent}/bad.{suffix}, line 3: " in error


def test_record_without_conversations(kit, tmp_path, capsys, data):
    for change in (lambda records: records[3].pop("conversations"), lambda r: r[3].update(conversations=[])):
        path = data(change)
        error = fails(kit, capsys, tmp_path / "out", data_path=path)
        assert f"{path}: record 4 (id 'r3'): conversations: found" in error


def test_image_count(kit, tmp_path, capsys, data):
    path = data(lambda records: records[2].update(image=records[2]["image"][:1]))
    error = fails(kit, capsys, tmp_path / "out", data_path=path)
    assert "record 3 (id 'r2')" in error and "found 2 <image> for 1 image" in error


def test_path_that_leaves_the_folder(kit, tmp_path, capsys, data):
    for name in ("../images/0_0.png", str(tmp_path / "outside.png")):
        path = data(lambda records, name=name: records[0].update(image=name))
        shutil.copy(tmp_path / "data/images/0_0.png", tmp_path / "outside.png")
        error = fails(kit, capsys, tmp_path / "out", data_path=path)
        assert "record 1 (id 'r0')" in error and repr(name) in error and "allow_absolute_paths" in error
        out = kit.run(tmp_path / f"allowed{len(name)}", data_path=path, allow_absolute_paths=True, max_steps=1)
        assert (out / "model.safetensors").is_file()


def test_unknown_template(kit, tmp_path, capsys):
    error = fails(kit, capsys, tmp_path / "out", version="qwen_1_6")
    assert "qwen_1_6" in error and "qwen_1_5" in error


def test_tower_folder_without_config(kit, tmp_path, capsys):
    (tmp_path / "tower").mkdir()
    error = fails(kit, capsys, tmp_path / "out", vision_tower=tmp_path / "tower")
    assert f"{tmp_path}/tower" in error and "config.json" in error


def test_language_model_folder_without_config(kit, tmp_path, capsys):
    (tmp_path / "llm").mkdir()
    error = fails(kit, capsys, tmp_path / "out", model_name_or_path=tmp_path / "llm")
    assert f"{tmp_path}/llm" in error and "config.json" in error


def test_weights_cut_short(kit, tmp_path, capsys):
    import shutil

    for kind, flag in ((kit.llm, "model_name_or_path"), (kit.clip, "vision_tower")):
        folder = tmp_path / flag
        shutil.copytree(kind, folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        error = fails(kit, capsys, tmp_path / "out", **{flag: folder})
        assert str(folder) in error
        file.unlink()
        assert str(folder) in fails(kit, capsys, tmp_path / "out", **{flag: folder})


def test_missing_paths(kit, tmp_path, capsys):
    from llava.train.train import train

    flags = kit.flags(tmp_path / "out")
    for key in ("output_dir", "data_path"):
        at = flags.index(f"--{key}")
        with pytest.raises(SystemExit) as stop:
            train([*flags[:at], *flags[at + 2 :]])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and key in error
    assert "no such file" in fails(kit, capsys, tmp_path / "out", data_path=tmp_path / "nowhere.json")


def test_grid_is_missing(kit, tmp_path, capsys):
    error = fails(kit, capsys, tmp_path / "out", image_grid_pinpoints=None)
    assert "image_grid_pinpoints" in error


def test_layers_and_projectors_that_do_not_exist(kit, tmp_path, capsys):
    assert "mm_vision_select_layer" in fails(kit, capsys, tmp_path / "out", mm_vision_select_layer=-9)
    assert "mlp2x_gleu" in fails(kit, capsys, tmp_path / "out", mm_projector_type="mlp2x_gleu")
    assert "spatial_unpadd" in fails(kit, capsys, tmp_path / "out", mm_patch_merge_type="spatial_unpadd")
    assert "anyress" in fails(kit, capsys, tmp_path / "out", image_aspect_ratio="anyress")
    assert "lion_80bit" in fails(kit, capsys, tmp_path / "out", optim="lion_80bit")
    assert "fancy" in fails(kit, capsys, tmp_path / "out", attn_implementation="fancy")


def command_line(*words) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llava.train.train", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)


def test_yaml_of_a_wrong_type_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: out\nlearning_rate: fast\n")
    done = command_line(tmp_path / "run.yaml")
    assert done.returncode == 2
    (error,) = done.stderr.strip().splitlines()
    assert error.startswith(f"error: {tmp_path}/run.yaml: learning_rate") and "fast" in error


def test_missing_image_on_the_command_line(kit, tmp_path, data):
    path = data(lambda records: records[1].update(image="gone.png"))
    done = command_line(*kit.flags(tmp_path / "out", data_path=path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {path}: record 2 (id 'r1'): ")
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1


def test_deepspeed_state_of_another_folder_is_not_read(tmp_path):
    from llava.errors import LlavaError
    from llava.train.train import check_own

    check_own(str(tmp_path / "out" / "checkpoint-3"), str(tmp_path / "out"))
    for stranger in ("other/checkpoint-3", "out/../other/checkpoint-3", "out"):
        with pytest.raises(LlavaError, match="expected one of the run's own"):
            check_own(str(tmp_path / stranger), str(tmp_path / "out"))
