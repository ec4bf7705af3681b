"""YAML files: precedence and sources, faults in files, checkpoints, what `show` prints, and the key table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava.config import resolve
from llava.config.__main__ import main
from llava.config.table import BEGIN, END, help_text, markdown, update_file
from llava.errors import LlavaError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An empty folder as working directory; returns a function that writes a file into it."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def checkpoint(files, folder: str, **config) -> str:
    files(f"{folder}/config.json", json.dumps({"model_type": "llava_qwen", "mm_vision_tower": "tower", **config}))
    return folder


def sources(run, *names):
    return {name: (run[name], run.source(name)) for name in names}


def test_precedence_and_sources(files):
    checkpoint(
        files,
        "ckpt",
        mm_vision_select_layer=-5,
        mm_projector_type="mlp3x_gelu",
        mm_patch_merge_type="spatial",
        mm_newline_position="frame",
        conversation_template="qwen_1_5",
        image_aspect_ratio="pad",
    )
    files("tower.yaml", "mm_vision_select_layer: -4\nmm_projector_type: mlp2x_gelu\nvision_tower: tower\ns2: true\n")
    files(
        "train.yaml",
        "tower: tower.yaml\nmodel_name_or_path: ckpt\nmm_vision_select_layer: -3\nmm_patch_merge_type: flat\nseed: 1\n",
    )
    run = resolve(["train.yaml", "--mm_vision_select_layer", "-2"])
    assert sources(
        run,
        "mm_vision_select_layer",
        "mm_patch_merge_type",
        "mm_projector_type",
        "mm_newline_position",
        "version",
        "image_aspect_ratio",
        "seed",
        "mm_use_im_start_end",
    ) == {
        "mm_vision_select_layer": (-2, "command line"),
        "mm_patch_merge_type": ("flat", "train.yaml"),
        "mm_projector_type": ("mlp2x_gelu", "tower.yaml"),
        "mm_newline_position": ("frame", "checkpoint config"),
        "version": ("qwen_1_5", "checkpoint config"),
        "image_aspect_ratio": ("pad", "checkpoint config"),
        "seed": (1, "train.yaml"),
        "mm_use_im_start_end": (False, "default"),
    }
    assert run["s2"] is True


def test_old_name_on_the_command_line_stands_above_the_yaml(files):
    files("train.yaml", "warmup_steps: 100\neval_strategy: steps\n")
    run = resolve(["train.yaml", "--warmup_ratio", "0.1", "--evaluation_strategy", "no"])
    assert sources(run, "warmup_steps", "eval_strategy") == {
        "warmup_steps": (0.1, "command line"),
        "eval_strategy": ("no", "command line"),
    }


def test_swapped_tower(files):
    checkpoint(files, "ckpt", mm_vision_select_layer=-5, mm_vision_tower_type="special", image_aspect_ratio="pad")
    files("a.yaml", "vision_tower: a\nmm_vision_select_layer: -2\n")
    files("b.yaml", "vision_tower: b\n")
    files("train.yaml", "tower: a.yaml\nmodel_name_or_path: ckpt\n")
    assert sources(resolve(["train.yaml"]), "vision_tower", "mm_vision_select_layer") == {
        "vision_tower": ("a", "a.yaml"),
        "mm_vision_select_layer": (-2, "a.yaml"),
    }
    swapped = resolve(["train.yaml", "--tower", "b.yaml"])
    assert sources(swapped, "vision_tower", "mm_vision_select_layer", "mm_vision_tower_type", "image_aspect_ratio") == {
        "vision_tower": ("b", "b.yaml"),
        "mm_vision_select_layer": (-1, "default"),
        "mm_vision_tower_type": (None, "default"),
        "image_aspect_ratio": ("pad", "checkpoint config"),
    }


def test_checkpoint_alone_supplies_its_tower(files):
    checkpoint(files, "ckpt", mm_vision_select_layer=-2, mm_vision_tower_type="clip")
    files("ckpt/tower/config.json", "{}")
    run = resolve(["--model_name_or_path", "ckpt"])
    assert sources(run, "vision_tower", "mm_vision_select_layer", "mm_vision_tower_type") == {
        "vision_tower": ("ckpt/tower", "checkpoint config"),
        "mm_vision_select_layer": (-2, "checkpoint config"),
        "mm_vision_tower_type": ("clip", "checkpoint config"),
    }


def test_plain_language_model_supplies_nothing(files):
    files("llm/config.json", json.dumps({"model_type": "qwen2", "image_aspect_ratio": "pad"}))
    assert resolve(["--model_name_or_path", "llm"])["image_aspect_ratio"] == "square"


def test_checkpoint_with_an_absent_part(files):
    checkpoint(files, "ckpt", mm_resampler_type="spatial_pool")
    with pytest.raises(LlavaError, match="checkpoint config: mm_resampler_type is 'spatial_pool'"):
        resolve(["--model_name_or_path", "ckpt"])


def test_paths_of_a_shipped_config_hold_from_anywhere(files):
    run = resolve([str(ROOT / "configs/train/finetune_onevision.yaml")])
    assert Path(run.tower) == ROOT / "configs/towers/siglip_so400m.yaml"
    assert Path(run["deepspeed"]) == ROOT / "scripts/zero3.json"


def test_yaml_scalars(files):
    files(
        "train.yaml",
        "learning_rate: 1e-3\nweight_decay: 0.\nsave_strategy: no\nbf16: yes\nnum_train_epochs: 2\nreport_to: [wandb]\n"
        "image_grid_pinpoints: [[1, 2], [3, 4]]\nmm_projector_lr: null\nrun_name: 1e-3x\n",
    )
    run = resolve(["train.yaml"])
    assert (run["learning_rate"], run["weight_decay"], run["save_strategy"], run["bf16"]) == (1e-3, 0.0, "no", True)
    assert (run["num_train_epochs"], run["report_to"], run["mm_projector_lr"]) == (2, ["wandb"], None)
    assert (run["image_grid_pinpoints"], run["run_name"]) == ([[1, 2], [3, 4]], "1e-3x")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mm_projector_typ: linear\n", ["train.yaml", "mm_projector_typ", "'mm_projector_type'"]),
        ("towr: x\n", ["train.yaml", "'towr'", "'tower'"]),
        ("per_device_train_batch_size: four\n", ["train.yaml", "'four'", "expected whole number"]),
        ("per_device_train_batch_size: 1.5\n", ["train.yaml", "1.5", "expected whole number"]),
        ("per_device_train_batch_size: true\n", ["train.yaml", "True (true or false)", "expected whole number"]),
        ("learning_rate: [1, 2]\n", ["learning_rate", "list", "expected number"]),
        ("mm_vision_select_layer:\n", ["mm_vision_select_layer", "nothing", "expected whole number"]),
        ("run_name: 5\n", ["run_name", "5 (whole number)", "expected text"]),
        ("bf16: maybe\n", ["bf16", "'maybe'", "expected true or false"]),
        ("tower: 3\n", ["train.yaml", "tower"]),
        ("tower: missing.yaml\n", ["train.yaml", "missing.yaml"]),
        ("seed: 1\nseed: 2\n", ["train.yaml", "line 2", "'seed' is given twice"]),
        ("vision_tower: a\nmm_vision_tower: b\n", ["train.yaml", "mm_vision_tower", "both"]),
        ("seed: [1\n", ["train.yaml", "line 2", "not valid YAML"]),
        ("- seed\n", ["train.yaml", "list"]),
    ],
)
def test_faults_in_a_train_yaml(files, text, parts):
    files("train.yaml", text)
    with pytest.raises(LlavaError) as error:
        resolve(["train.yaml"])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_tower_yaml_holds_only_tower_keys(files):
    files("tower.yaml", "vision_tower: x\nlearning_rate: 1.0\n")
    with pytest.raises(LlavaError, match=r"tower\.yaml: learning_rate does not belong in a tower config.*vision_tower"):
        resolve(["--tower", "tower.yaml"])


@pytest.mark.parametrize("config", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_resolve(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = resolve([str(config)])
    assert (run.tower is None) == ("qwen2_vl" in config.stem)  # which has an encoder of its own
    assert run["output_dir"].startswith("checkpoints/")


def test_published_values(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = (
        "learning_rate",
        "mm_vision_tower_lr",
        "warmup_steps",
        "lr_scheduler_type",
        "model_max_length",
        "weight_decay",
    )
    for config in ("finetune_next", "finetune_onevision"):
        run = resolve([f"configs/train/{config}.yaml"])
        assert [run[name] for name in names] == [1e-5, 2e-6, 0.03, "cosine", 32768, 0.0]
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert resolve(["configs/train/finetune_next.yaml"])["image_grid_pinpoints"] == grid
    assert resolve(["configs/train/finetune_onevision.yaml"])["image_grid_pinpoints"] == "(1x1),...,(6x6)"
    pretrain = resolve(["configs/train/pretrain_blip558k.yaml"])
    assert [pretrain[name] for name in names] == [1e-3, None, 0.03, "cosine", 8192, 0.0]


def test_show(files, capsys):
    files("tower.yaml", "vision_tower: x\n")
    files("train.yaml", "tower: tower.yaml\nseed: 1\nnum_train_epochs: 2\n")
    main(["show", "train.yaml", "--learning_rate", "2e-5"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["learning_rate", "2e-05", "command", "line"] in lines
    assert ["seed", "1", "train.yaml"] in lines
    assert ["num_train_epochs", "2", "train.yaml"] in lines
    assert ["vision_tower", "x", "tower.yaml"] in lines
    assert not any(line[-1:] == ["default"] for line in lines)
    main(["show", "train.yaml", "--all"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mm_projector_type", "linear", "default"] in lines
    assert ["adam_beta1", "0.9", "default"] in lines


def test_show_reports_a_fault_in_one_line(files, capsys):
    files("train.yaml", "lerning_rate: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["show", "train.yaml"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: train.yaml: unknown key 'lerning_rate'; the nearest valid key is 'learning_rate'\n"
    )


def test_table_update(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert update_file(path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and markdown() in text and "\nold\n" not in text
    assert not update_file(path)
    path.write_text("no markers")
    with pytest.raises(LlavaError, match="keys:begin"):
        update_file(path)


def test_key_table_in_the_readme_is_up_to_date(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    assert not update_file(copy), "run: python -m llava.config table --update README.md"


@pytest.mark.parametrize(
    "code",
    [
        "from llava.train.arguments import parse_args\ntry: parse_args(['--help'])\nexcept SystemExit: pass",
        "from llava.config import resolve; print(resolve(['configs/train/finetune_next.yaml']).to_dict())",
        "from llava.config.__main__ import main; main(['table'])",
    ],
    ids=["help", "resolve", "table"],
)
def test_no_heavy_import(code):
    check = "\nimport sys; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mm_projector_type" in done.stdout


def test_help_lists_keys():
    text = help_text()
    assert "--mm_tunable_parts" in text and "--per_device_train_batch_size" in text
    assert "mm_perceiver_depth" not in text
