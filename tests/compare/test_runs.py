"""The runs of a comparison side by side, with a program in the recipe's place that only writes down its work."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from llava.compare import display, driver, record, slurm
from llava.compare.command import command
from llava.compare.comparison import read_comparison
from llava.compare.facts import Facts
from llava.compare.plan import link_shared, owners, plan_runs, shared_stages
from llava.compare.runs import Job, Runner, shares
from llava.errors import LlavaError
from llava.tools.compare_towers import build_parser
from llava.train.launcher import process as alive
from tests.compare.small import STUB, start, wait_for

PROGRAM = (sys.executable, str(STUB))


@pytest.fixture
def made(small, tmp_path, monkeypatch):
    """Makes the plan of a comparison, and says how its runs behave."""

    def make(towers, behave=None, given=(), **more):
        monkeypatch.setenv("STUB_RECIPE", json.dumps(behave or {}))
        path = small.write(tmp_path / "compare.yaml", towers, **more)
        return driver.make_plan(read_comparison(path, list(given)), tmp_path / "out")

    return make


def calls(run) -> list[dict]:
    path = run.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def go(plan, count=1, only=None):
    stream = io.StringIO()
    came = driver.run_all(plan, driver.select(plan, only), count, PROGRAM, stream)
    assert came == []
    return stream.getvalue().splitlines()


def statuses(plan) -> list[str]:
    return [record.status_of(run)[0] for run in plan.runs]


def test_runs_by_hand_count_too(small, made):
    """Run as `--dry-run` lists them, somewhere else, and put in their folders."""
    plan = made([small.tower("clip"), small.tower("siglip", "siglip")], {"siglip/seed_1": {"fail": "finetune"}})
    go(plan)
    told = [record.status_of(run) for run in plan.runs]
    for run in plan.runs:
        (run.folder / record.FILE).unlink()
    assert [record.status_of(run) for run in plan.runs] == told and told[3][0] == "failed"
    # of another training, as its recipe.json has it
    file = plan.runs[0].folder / "recipe.json"
    state = json.loads(file.read_text())
    state["stages"][0]["settings"] = plan.runs[0].stages[0].settings | {"max_steps": 9}
    file.write_text(json.dumps(state))
    state["stages"][1]["settings"] = plan.runs[1].stages[1].settings
    (plan.runs[1].folder / "recipe.json").write_text(json.dumps(state | {"stages": state["stages"][1:]}))
    assert statuses(plan) == ["missing", "finished", "finished", "failed"]
    shutil.rmtree(plan.runs[2].folder)
    assert statuses(plan)[2] == "missing"


def test_each_run_is_a_recipe_run_in_its_own_folder(small, made, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = made([small.tower("clip"), small.tower("siglip", "siglip", set={"finetune.weight_decay": 0.1})])
    lines = go(plan)
    assert statuses(plan) == ["finished"] * 4
    assert [run.folder.relative_to(plan.out).as_posix() for run in plan.runs] == [
        f"runs/{tower}/seed_{seed}" for tower in ("clip", "siglip") for seed in (0, 1)
    ]
    told = calls(plan.runs[3])[0]
    assert told["recipe"] == str(small.folder / "recipe.yaml") and "--prepared" in told["words"]
    tower = str(small.folder / "siglip.yaml")
    assert told["words"][-6:] == ["--tower", tower, "--finetune.weight_decay", "0.1", "--seed", "1"]
    assert (plan.runs[0].folder / "log.txt").read_text().startswith("$ ")
    assert len([line for line in lines if line.endswith(": started")]) == 4
    assert re.fullmatch(r"\[4/4\] siglip/seed_1: finished after \d+ s", lines[-1])
    go(plan)  # finished runs are left alone
    assert all(len(calls(run)) == 1 for run in plan.runs)


def test_a_failed_run_is_named_and_stops_no_other(small, made):
    plan = made([small.tower("clip"), small.tower("siglip", "siglip")], {"clip/seed_0": {"fail": "finetune"}})
    lines = go(plan)
    assert statuses(plan) == ["failed", "finished", "finished", "finished"]
    assert record.status_of(plan.runs[0])[1] == "finetune: error: the loss is not finite"
    said = next(line for line in lines if "clip/seed_0: failed" in line)
    assert said.endswith(": finetune: error: the loss is not finite")
    os.environ["STUB_RECIPE"] = "{}"
    go(plan)  # tried again, and nothing else
    assert statuses(plan) == ["finished"] * 4 and [len(calls(run)) for run in plan.runs] == [2, 1, 1, 1]


def test_runs_at_once_share_out_the_machine(small, made, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    plan = made([small.tower("clip"), small.tower("siglip", "siglip")], seeds=[0])
    go(plan, count=2)
    assert [calls(run)[0]["threads"] for run in plan.runs] == ["3", "3"]


def test_gpus_are_shared_out_evenly(monkeypatch):
    from llava.compare import runs

    monkeypatch.delenv("NUM_GPUS", raising=False)
    monkeypatch.setattr(runs, "cuda_devices", lambda: ["0", "1", "2", "5", "6"])
    assert shares(2) == [
        {"CUDA_VISIBLE_DEVICES": "0,1", "NUM_GPUS": "2"},
        {"CUDA_VISIBLE_DEVICES": "2,5", "NUM_GPUS": "2"},
    ]
    monkeypatch.setenv("NUM_GPUS", "1")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(5)] == ["0", "1", "2", "5", "6"]
    with pytest.raises(LlavaError, match="--jobs 6: 1 GPUs for each are 6, found 5"):
        shares(6)


def test_only_the_named_towers_are_run(small, made):
    plan = made([small.tower("clip"), small.tower("siglip", "siglip")], seeds=[0])
    go(plan, only=["siglip"])
    assert statuses(plan) == ["missing", "finished"]
    with pytest.raises(LlavaError, match="--only clop: no such tower, expected some of clip, siglip"):
        driver.select(plan, ["clop"])


# --- shared stages ----------------------------------------------------------------------------------------------------


def test_stages_of_one_fingerprint_are_trained_once(small, made):
    """`same` differs in its evaluation alone, `later` in stage 2, `other` in stage 1."""
    towers = [
        small.tower("clip"),
        small.tower("same", evaluate={"heldout.max_new_tokens": 3}),
        small.tower("later", set={"finetune.weight_decay": 0.1}),
        small.tower("other", set={"pretrain.weight_decay": 0.1}),
    ]
    plan = made(towers, seeds=[0])
    clip, same, later, other = plan.runs
    assert shared_stages(plan.runs, owners(plan.runs)) == [(clip, "pretrain"), (clip, "finetune")]
    assert len({run.prints["finetune"] for run in plan.runs}) == 3
    go(plan)
    assert statuses(plan) == ["finished"] * 4
    assert [call["until"] for call in calls(clip)] == ["pretrain", "finetune", None]
    assert [len(calls(run)) for run in (same, later, other)] == [1, 1, 1]
    assert os.readlink(same.folder / "pretrain") == "../../clip/seed_0/pretrain"
    assert (same.folder / "finetune").is_symlink() and (later.folder / "pretrain").is_symlink()
    assert not (later.folder / "finetune").is_symlink() and not (other.folder / "pretrain").is_symlink()


def test_what_waits_for_a_failed_stage_fails_with_a_word_of_it(small, made):
    towers = [small.tower("clip"), small.tower("later", set={"finetune.weight_decay": 0.1})]
    plan = made(towers, {"clip/seed_0": {"fail": "pretrain"}}, seeds=[0])
    go(plan)
    assert statuses(plan) == ["failed", "failed"] and len(calls(plan.runs[0])) == 1
    assert record.status_of(plan.runs[1])[1] == "needs pretrain of clip/seed_0, which is not finished"


def test_a_stage_is_taken_from_the_run_that_has_it(small, made):
    towers = [small.tower("clip"), small.tower("later", set={"finetune.weight_decay": 0.1})]
    plan = made(towers, seeds=[0])
    go(plan, only=["later"])
    assert not (plan.runs[1].folder / "pretrain").is_symlink()
    go(plan)
    assert os.readlink(plan.runs[0].folder / "pretrain") == "../../later/seed_0/pretrain"
    assert [call["until"] for call in calls(plan.runs[0])] == [None]


def test_data_of_other_content_are_another_stage(small, made, tmp_path):
    data = json.loads((small.folder / "data" / "records.json").read_text())
    prints = []
    for name, content in (("a.json", data), ("b.json", data), ("c.json", data[1:])):
        (tmp_path / name).write_text(json.dumps(content))
        plan = made([small.tower("clip")], given=["--data_path", str(tmp_path / name)])
        prints.append(plan.runs[0].prints)
    assert prints[0] == prints[1] and prints[0]["pretrain"] != prints[2]["pretrain"]


def test_frozen_entries_share_the_stages_that_train_no_tower(small, made):
    given = ["--pretrain.mm_tunable_parts", "mm_mlp_adapter,mm_language_model"]
    plan = made([small.tower("clip"), small.tower("cold", frozen=True)], given=given, seeds=[0])
    clip, cold = plan.runs
    assert clip.prints["pretrain"] == cold.prints["pretrain"] and clip.prints["finetune"] != cold.prints["finetune"]


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_comparison_is_refused(small, made):
    towers = [small.tower("clip"), small.tower("siglip", "siglip")]
    plan = made(towers, seeds=[0])
    go(plan)

    def check(name="small", **more):
        other = made(more.pop("towers", towers), name=name, **({"seeds": [0]} | more))
        record.check_folder(plan.out, name, other.runs, other.common)

    check()
    check(towers=[*towers, small.tower("third")], seeds=[0, 1])  # more of the same
    with pytest.raises(LlavaError, match="holds the comparison 'small', expected 'another'"):
        check(name="another")
    with pytest.raises(LlavaError, match=r"other settings .match none, now samples"):
        check(match="samples")
    with pytest.raises(LlavaError, match="clip/seed_0 was trained with other settings"):
        check(given=["--max_steps", "7"])
    (plan.out / "state.json").unlink()
    with pytest.raises(LlavaError, match=r"holds runs without state\.json"):
        check()


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_a_grid_trains_all_rates_and_evaluates_the_chosen_one(small, made, monkeypatch):
    from llava.compare import validation

    def command(run, out):  # the higher the rate the better, but for one seed of the highest
        score = run.learning_rate - (1 if run.name == "clip/seed_1/lr_0.003" else 0)
        code = f"open({str(run.folder / 'validation.json')!r}, 'w').write('{{\"exact_match\": {score}}}')"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(validation, "command", command)
    towers = [small.tower("clip", learning_rates=[0.001, 0.002, 0.003]), small.tower("siglip", "siglip")]
    plan = made(towers, validation={"share": 0.3, "seed": 0})
    go(plan)
    assert validation.read_choice(plan.out, "clip") == 0.002
    untils = {run.name: [call["until"] for call in calls(run)] for run in plan.runs}
    assert untils["clip/seed_0/lr_0.002"][-2:] == ["finetune", None] and untils["siglip/seed_0"] == [None]
    assert untils["clip/seed_0/lr_0.003"] == ["finetune"]
    assert untils["clip/seed_0/lr_0.001"][0] == "pretrain" and (plan.runs[1].folder / "pretrain").is_symlink()
    assert [run.name for run in plan.chosen(plan.comparison.entries[0])] == [f"clip/seed_{n}/lr_0.002" for n in (0, 1)]
    assert "--finetune.learning_rate" in calls(plan.runs[0])[0]["words"]
    go(plan)
    assert {run.name: [call["until"] for call in calls(run)] for run in plan.runs} == untils


def test_validation_images_are_in_no_training_record(small, made, tmp_path):
    from llava.compare import validation

    plan = made([small.tower("clip", learning_rates=[0.1])], validation={"share": 0.4, "seed": 3})
    held = {f"{n}_0.png" for n in range(12) if validation.is_held(f"{n}_0.png", 0.4, 3)}
    records = json.loads((small.folder / "data" / "records.json").read_text())
    asked = json.loads((plan.out / "validation" / "validation.json").read_text())
    for stage in ("pretrain", "finetune"):
        left = json.loads((plan.out / "validation" / f"{stage}.json").read_text())
        assert not held & {record.get("image") for record in left}
        assert len(left) + len(asked) == len(records) and len([r for r in left if "image" not in r]) == 4
        assert plan.runs[0].words[plan.runs[0].words.index(f"--{stage}.data_path") + 1] == str(
            plan.out / "validation" / f"{stage}.json"
        )
    assert asked and {record["image"] for record in asked} == held & {r.get("image") for r in records}
    with pytest.raises(LlavaError, match="none of the images"):
        made([small.tower("clip", learning_rates=[0.1])], validation={"share": 1e-6})


def test_a_mixture_keeps_its_folders(small, made, tmp_path):
    (tmp_path / "mix.yaml").write_text(
        f"datasets:\n  - {{json_path: {small.folder}/data/records.json, image_folder: {small.folder}/data/images}}\n"
    )
    given = ["--data_path", str(tmp_path / "mix.yaml")]
    plan = made([small.tower("clip", learning_rates=[0.1])], given=given, validation={"share": 0.4, "seed": 3})
    from llava.data.records import load_records

    records = load_records(str(plan.out / "validation" / "finetune.yaml"))
    assert records.part(0).image_folder == f"{small.folder}/data/images" and 0 < len(records) < 12
    asked = json.loads((plan.out / "validation" / "validation.json").read_text())
    assert all(os.path.isfile(record["image"]) for record in asked)


def test_the_best_mean_counts_where_all_seeds_have_one(small, made, tmp_path):
    from llava.compare import validation

    plan = made([small.tower("clip", learning_rates=[0.1, 0.2, 0.3])], validation={"share": 0.4, "seed": 3})
    assert validation.choose(plan.runs)["learning_rate"] is None
    scores = {0.1: (0.5, 0.6), 0.2: (0.6, 0.5), 0.3: (0.9, None)}
    for run in plan.runs:
        score = scores[run.learning_rate][run.seed]
        run.folder.mkdir(parents=True)
        if score is not None:
            (run.folder / "validation.json").write_text(json.dumps({"exact_match": score}))
    found = validation.choose(plan.runs)
    assert found["learning_rate"] == 0.1 and found["means"] == {"0.1": 0.55, "0.2": 0.55, "0.3": None}


# --- signals ----------------------------------------------------------------------------------------------------------


def signals(run) -> list:
    path = run.folder / "signals.jsonl"
    return json.loads(path.read_text().splitlines()[-1]) if path.is_file() else []


def hanging(small, tmp_path, stage, deaf=False):
    """A command in which clip hangs in a stage, siglip waits for its turn, and the folder's plan."""
    path = small.write(tmp_path / "compare.yaml", [small.tower("clip"), small.tower("siglip", "siglip")], seeds=[0])
    behave = {"clip/seed_0": {"hang": stage, "deaf": deaf}}
    process = start([path, "--output", tmp_path / "out", "--no-cost"], behave)
    plan = driver.make_plan(read_comparison(path), tmp_path / "out")
    running = plan.runs[0].folder / stage
    wait_for(lambda: (running.is_dir() and not (running / "run_state.json").exists()) or process.poll() is not None)
    return process, plan


@pytest.mark.parametrize(("name", "stage"), [("SIGTERM", "pretrain"), ("SIGINT", "finetune")])
def test_a_signal_reaches_the_runs_once_and_all_goes_on(small, tmp_path, name, stage):
    process, plan = hanging(small, tmp_path, stage)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped before its end; the same command goes on" in said
    assert signals(plan.runs[0]) == [getattr(signal, name)]
    assert statuses(plan) == ["preempted", "missing"]
    assert record.read_json(plan.out / "state.json")["state"] == "preempted"
    os.environ["STUB_RECIPE"] = "{}"
    try:
        go(plan)
    finally:
        del os.environ["STUB_RECIPE"]
    assert statuses(plan) == ["finished"] * 2


def test_a_second_interrupt_stops_at_once(small, tmp_path, monkeypatch):
    process, plan = hanging(small, tmp_path, "pretrain", deaf=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    pid = calls(plan.runs[0])[0]["pid"]
    assert alive(pid) is None


def test_runs_end_with_a_command_that_was_killed(small, tmp_path):
    process, plan = hanging(small, tmp_path, "pretrain")
    process.kill()
    process.communicate(timeout=60)
    # Linux sends it for each thread of the command that ends, so that it may come more than once
    wait_for(lambda: set(signals(plan.runs[0])) == {signal.SIGTERM})


# --- the display ------------------------------------------------------------------------------------------------------


def test_progress_is_read_from_what_a_run_writes(small, tmp_path):
    assert display.progress(tmp_path, tmp_path / "log.txt") == ("", None, None)
    state = {"stages": [{"name": "pretrain", "status": "finished"}, {"name": "finetune", "status": "running"}]}
    (tmp_path / "recipe.json").write_text(json.dumps(state))
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "run_state.json").write_text('{"state": "running", "step": 7}')
    assert display.progress(tmp_path, tmp_path / "log.txt") == ("finetune", 7, None)
    (tmp_path / "log.txt").write_text("100%|##| 5/5 [00:01<00:00]\r\n 1%| | 12/450 [00:01<00:40, 9it/s]\r {'loss': 3}")
    assert display.progress(tmp_path, tmp_path / "log.txt") == ("finetune", 12, 450)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_block_and_other_outputs_lines(small, made, monkeypatch):
    plan = made([small.tower("clip")], seeds=[0])
    job = Job(plan.runs[0], begun=time.monotonic())
    job.folder.mkdir(parents=True)
    job.log.write_text("1%| | 12/450 [00:01<00:40, 9it/s]")
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        shown = display.Display(3, 1, stream)
        shown.started(job.title)
        monkeypatch.setattr(shown, "said", time.monotonic() - 2 * display.EVERY)
        for _ in range(3):
            shown.show([job])
        shown.ended(job.title, "finished", 130)
    assert terminal.getvalue().count("\x1b[2F\x1b[J") == 3 and "12/450" in terminal.getvalue()
    assert plain.getvalue().splitlines() == [
        "clip/seed_0: started",
        "[1/3] running: clip/seed_0 (12/450)",  # once in EVERY seconds
        "[2/3] clip/seed_0: finished after 2 min",
    ]


# --- Slurm ------------------------------------------------------------------------------------------------------------


def write_scripts(small, tmp_path, monkeypatch, towers, **more):
    """The comparison's plan, and what is said where its scripts are written; they start the stub's runs."""
    path = small.write(tmp_path / "compare.yaml", towers, seeds=[0], **more)
    out = tmp_path / "out dir"
    monkeypatch.setattr(driver, "check", lambda plan: Facts())
    args = build_parser().parse_args([str(path), "--output", str(out), "--slurm", "--jobs", "1"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert command(args, []) == 0
    for script in (out / "slurm").glob("*.sh"):
        assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
        script.write_text(script.read_text().replace("llava.tools.compare_towers", "tests.compare.small"))
    return driver.make_plan(read_comparison(path), out, written=True), said.getvalue().splitlines()


def by_hand(plan, script: str, number: int, **env) -> subprocess.Popen:
    env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(number), **env)
    return subprocess.Popen(
        ["bash", plan.out / "slurm" / script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_scripts_for_slurm_parse_and_their_tasks_run(small, tmp_path, monkeypatch):
    towers = [small.tower("clip"), small.tower("later", set={"finetune.weight_decay": 0.1})]
    plan, said = write_scripts(small, tmp_path, monkeypatch, towers)
    folder = plan.out / "slurm"
    assert sorted(file.name for file in folder.glob("*.sh")) == ["array.sh", "collect.sh", "shared.sh", "submit.sh"]
    array = (folder / "array.sh").read_text()
    assert "#SBATCH --array=0-1%1\n" in array and "#SBATCH --signal=B:USR1@120\n" in array
    assert said[-1].startswith("job2=$(sbatch --parsable --dependency=afterany:$job1 ") and "collect.sh" in said[-1]
    monkeypatch.setenv("STUB_RECIPE", "{}")

    def task(word):
        return slurm.task(plan.comparison, plan.out, word, PROGRAM)

    assert task("1:1") == 1 and record.status_of(plan.runs[1])[1].startswith("needs pretrain of clip/seed_0")
    assert task("0:0") == 0 and task("1:1") == 0
    first = by_hand(plan, "array.sh", 0)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert statuses(plan) == ["finished"] * 2 and (plan.runs[1].folder / "pretrain").is_symlink()
    with pytest.raises(LlavaError, match=r"--task 1:2: .* has no such task"):
        task("1:2")


def test_rates_are_chosen_by_an_array_of_its_own(small, tmp_path, monkeypatch):
    towers = [small.tower("clip", learning_rates=[0.1, 0.2])]
    plan, said = write_scripts(small, tmp_path, monkeypatch, towers, validation={"share": 0.4, "seed": 3})
    names = [line.split("/")[-1].rstrip("')\"") for line in said[1:]]
    assert names == ["shared.sh", "array.sh", "chosen.sh", "collect.sh"]
    monkeypatch.setenv("STUB_RECIPE", "{}")
    with pytest.raises(LlavaError, match="clip: no learning rate has been validated"):
        slurm.task(plan.comparison, plan.out, "2:0", PROGRAM)
    for run, score in zip(plan.runs, (0.3, 0.6), strict=True):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "validation.json").write_text(json.dumps({"exact_match": score}))
    assert slurm.task(plan.comparison, plan.out, "0:0", PROGRAM) == 0
    assert slurm.task(plan.comparison, plan.out, "2:0", PROGRAM) == 0
    assert statuses(plan) == ["missing", "finished"]


def test_a_task_that_is_stopped_is_queued_again(small, tmp_path, monkeypatch):
    plan, _ = write_scripts(small, tmp_path, monkeypatch, [small.tower("clip")])
    monkeypatch.setenv("STUB_RECIPE", json.dumps({"clip/seed_0": {"hang": "finetune"}}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/scontrol.log\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    task = by_hand(plan, "array.sh", 0, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", SLURM_JOB_ID="17")
    stage = plan.runs[0].folder / "finetune"
    wait_for(lambda: stage.is_dir() or task.poll() is not None)
    task.send_signal(signal.SIGUSR1)
    said, _ = task.communicate(timeout=60)
    assert task.returncode == 0 and signals(plan.runs[0]) == [signal.SIGUSR1], said
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"


def test_runs_need_their_owner(small, made):
    plan = made([small.tower("clip"), small.tower("same", evaluate={"heldout.max_new_tokens": 3})], seeds=[0])
    owner = owners(plan.runs)
    assert set(owner.values()) == {plan.runs[0]} and plan_runs(plan.comparison, plan.out) == plan.runs
    with pytest.raises(LlavaError, match="needs pretrain of clip/seed_0"):
        link_shared(plan.runs[1], owner)
    job = Job(plan.runs[1])
    Runner(plan.comparison.recipe.path, owner, 1, PROGRAM, io.StringIO()).execute([job])
    assert job.status == "failed" and not calls(plan.runs[1])
