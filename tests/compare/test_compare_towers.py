"""Comparisons from the command to the report, with real training runs of two steps."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava.compare.command import command
from llava.errors import LlavaError
from llava.tools.compare_towers import build_parser, main
from tests.compare.small import wait_for

FILES = ("report.md", "report.html", "results.json", "results.csv", "table.tex")
PICTURES = ("accuracy_vs_tokens.png", "by_kind.png")


def compare(path: Path, *words: str) -> int:
    """The command in this process, which has all that takes long to import."""
    return command(*build_parser().parse_known_args([str(path), *words]))


@contextlib.contextmanager
def told_to_stop(out: Path, stage: str):
    """Inside, this process gets SIGTERM when a run has begun a stage."""

    def watch() -> None:
        wait_for(lambda: any(out.glob(f"runs/*/seed_0/{stage}")), 300)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("nobody listened to SIGTERM"))
    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_loads_nothing(words):
    code = (
        "import sys, llava.tools.compare_towers as tool\n"
        f"try: tool.main({words!r})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'yaml'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "compare_towers" in done.stdout, done.stderr


def test_two_towers_killed_in_each_stage_and_gone_on_with(small, tmp_path, capsys):
    """A third entry fails where its pictures are looked for, and stops neither of them."""
    (tmp_path / "empty").mkdir()
    towers = [
        small.tower("clip"),
        small.tower("siglip", "siglip", set={"finetune.weight_decay": 0.1}),
        small.tower("broken", set={"image_folder": str(tmp_path / "empty")}),
    ]
    path, out = small.write(tmp_path / "compare.yaml", towers, seeds=[0]), tmp_path / "out"
    words = ("--output", str(out), "--no-cost")
    for stage in ("pretrain", "finetune"):
        with told_to_stop(out, stage):
            assert compare(path, "--only", "clip", *words) == 0
        assert "the same command goes on" in capsys.readouterr().err
        assert json.loads((out / "state.json").read_text())["state"] == "preempted"
        assert not (out / "results.json").exists()
    assert compare(path, "--jobs", "2", *words) == 1
    told = capsys.readouterr().out
    assert all((out / name).is_file() for name in (*FILES, *PICTURES))
    results = json.loads((out / "results.json").read_text())
    clip, siglip, broken = results["towers"]
    assert [tower["status"] for tower in results["towers"]] == ["finished", "finished", "failed"]
    assert broken["error"].startswith("broken/seed_0: pretrain: ") and str(tmp_path / "empty") in broken["error"]
    for tower in (clip, siglip):
        run = out / "runs" / tower["name"] / "seed_0"
        found = json.loads((run / "eval_heldout.json").read_text())
        assert tower["scores"]["heldout"]["per_seed"] == {"0": found["exact_match"]}
        assert (tower["scores"]["heldout"]["n"], tower["n_seeds"]) == (found["n"], 1)
        for stage in ("pretrain", "finetune"):
            assert json.loads((run / stage / "trainer_state.json").read_text())["global_step"] == 2
        assert f"{tower['name']}: heldout {found['exact_match']:.3f}" in told
    assert "broken: no score (failed: " in told
    assert {row["what"] for row in results["differences"]} >= {"encoder", "weight_decay (finetune)", "tower parameters"}
    assert results["fixed"]["language model"] == "llm" and results["fixed_hash"]
    assert any("seed noise unmeasured" in note for note in results["notes"])
    for name in ("state.json", "runs/clip/seed_0/compare.json", "runs/siglip/seed_0/compare.json"):
        (out / name).unlink()  # as if the runs had been made by hand
    assert compare(path, "--collect", *words) == 1
    again = json.loads((out / "results.json").read_text())
    assert (again["towers"], again["pairs"]) == (results["towers"], results["pairs"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
        (["--collect", "--slurm"], "expected one of them at most"),
        (["--gpu", "H100"], "--gpu and --hours"),
        (["--probe", "no/such/folder"], "no/such/folder: no such folder"),
        (["--only", "clop"], "--only clop"),
        (["--collect"], "holds no comparison"),
    ],
)
def test_options_that_are_refused(small, tmp_path, words, said):
    path = small.write(tmp_path / "compare.yaml", [small.tower("clip")])
    with pytest.raises(LlavaError, match=said):
        compare(path, "--output", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_refusal_is_one_line_and_trains_nothing(small, tmp_path, capsys):
    towers = [small.tower("clip"), small.tower("fine", "fine")]
    path = small.write(tmp_path / "compare.yaml", towers, match="tokens")
    with pytest.raises(SystemExit) as end:
        main([str(path), "--output", str(tmp_path / "out")])
    told, said = capsys.readouterr()
    assert end.value.code == 2 and told == ""
    assert said.count("\n") == 1 and said.startswith("error: ") and "clip 4, fine 16" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_commands_steps_and_shared_stages(small, tmp_path, capsys):
    towers = [small.tower("clip"), small.tower("later", set={"finetune.max_steps": 7})]
    path = small.write(tmp_path / "compare.yaml", towers, seeds=[0])
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert compare(path, "--output", str(tmp_path / "out"), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "clip/seed_0 (to be run):" and "python -m llava.train.recipe" in lines[1]
    assert lines[2:4] == ["  pretrain: 2 steps", "  finetune: 2 steps"]
    assert lines[6:8] == [
        "  pretrain: 2 steps, the same as of clip/seed_0: not trained again",
        "  finetune: 7 steps",
    ]
    assert lines[-1] == "2 runs, 3 stages to train of 4"
    assert not (tmp_path / "out").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") == before
