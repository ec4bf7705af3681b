"""What the README says can be typed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))
README = (ROOT / "README.md").read_text()


def run(*command, **env):
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, **env}, capture_output=True, text=True
    )


def test_the_demo_cut_short(tmp_path):
    """`bash scripts/finetune.sh` from nothing to the last line, with few steps and questions."""
    command = ["bash", "scripts/finetune.sh", "--output_dir", str(tmp_path), "--max_steps", "3", "--save_steps", "2"]
    first = run(*command, EVAL_LIMIT="40")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    result = json.loads((tmp_path / "finetune" / "eval.json").read_text())
    last = first.stdout.rstrip().splitlines()[-1]
    assert last == f"held-out exact match: {result['exact_match']:.3f} (n={result['n']})"
    assert result["n"] == sum(part["n"] for part in result["by_kind"].values()) == len(result["questions"])
    assert {"question", "answer", "prediction"} <= set(result["questions"][0])
    assert "exact_match" in result["blank_images"]
    assert Image.open(tmp_path / "finetune" / "report.png").width > 400
    again = run(*command)
    assert again.returncode == 0 and "--overwrite" in again.stdout and len(again.stdout.strip().splitlines()) == 1

    if not LONG:  # test_supervise.py has the rest with programs that do nothing
        return
    # the evaluation went missing: the trained stages are not trained again
    (tmp_path / "finetune" / "eval.json").unlink()
    third = run(*command, EVAL_LIMIT="40")
    assert third.returncode == 0 and third.stdout.count("finished before") == 2
    assert third.stdout.rstrip().splitlines()[-1] == last


@pytest.mark.skipif(not LONG, reason="a minute more: scripts/test_long.sh runs it (LLAVA_LONG_TESTS)")
def test_the_qwen2_vl_demo_cut_short(tmp_path):
    """`bash scripts/finetune_qwen2_vl.sh` likewise, with two choices of patches."""
    command = ["bash", "scripts/finetune_qwen2_vl.sh", "--output_dir", str(tmp_path), "--max_steps", "2"]
    done = run(*command, "--save_steps", "2", EVAL_LIMIT="24", SELECTIONS="none budget:0.5")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "qwen2_vl" / "eval.json").read_text())
    assert (
        done.stdout.rstrip().splitlines()[-1] == f"held-out exact match: {result['exact_match']:.3f} (n={result['n']})"
    )
    assert list(result["selections"]) == ["none", "budget:0.5"]
    every, half = result["selections"].values()
    assert (every["vision_tokens"], every["llm_tokens"]) == (64, 16)
    assert 16 <= half["vision_tokens"] <= 32 and half["llm_tokens"] <= 16
    assert "exact_match" in result["blank_images"]
    assert Image.open(tmp_path / "qwen2_vl" / "report.png").width > 400


PATHS = sorted(set(re.findall(r"\b(?:benchmarks|configs|scripts|llava|playground)/[\w./]+\.\w+", README)))


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs" / "train").glob("*.yaml")))
def test_every_train_config_resolves(config, capsys):
    from llava.config.__main__ import main

    main(["show", str(ROOT / "configs/train" / config), "--learning_rate", "2e-5"])
    shown = capsys.readouterr().out
    assert re.search(r"learning_rate +2e-05 +command line", shown)
    tower = (
        r"adaptive_patches +\{'method': '(budget|all)'.*\} +\S*configs/"
        if "qwen2_vl" in config
        else r"vision_tower +\S+ +\S*configs/towers/"
    )
    assert re.search(tower, shown)
