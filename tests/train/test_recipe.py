"""`python -m llava.train.recipe`: stages one after another, what becomes of each, and what is left for the next start.

The training runs of most tests are a program that does nothing but say how it ended.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llava.config.commandline import parse_command_line
from llava.errors import LlavaError
from llava.train import recipe
from llava.train.recipe import stage_argv
from llava.train.recipe_evaluation import command, keep, read_lmms
from llava.train.recipe_file import Evaluation, Overrides, flags, read_recipe
from llava.train.recipe_settings import plan_stages
from llava.train.recipe_state import read_recipe_state
from llava.train.run_state import read_state
from llava.train.stage_end import how_it_ended
from tests.config.test_supervise import running, wait_for

ROOT = Path(__file__).parents[2]

# In place of scripts/launch.sh: writes down its words, and ends as the next line of FOLDER/ends says.
LAUNCH = """#!{python}
import json, os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
with open(folder / "launched", "a") as file:
    print(*sys.argv[1:], file=file)
ends = json.loads((folder / "ends").read_text())
text, status = ends.pop(0) if ends else ('{{"state": "finished", "step": 3}}', 0)
(folder / "ends").write_text(json.dumps(ends))
if text == "wait":
    got = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))
    (folder / "ready").touch()
    while not got:
        time.sleep(0.02)
    time.sleep(0.3)
    text = json.dumps({{"state": "preempted", "step": 2, "signal": got[0], "all": got}})
if text is not None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "run_state.json").write_text(text)
    (out / "model.safetensors").touch()
    (out / "trainer_state.json").write_text("{{}}")
print("trained", out.name)
print("error: as asked" if status else "well", file=sys.stderr)
sys.exit(status)
"""

DRIVER = """
import pathlib, sys
from llava.train import recipe
recipe.ROOT = pathlib.Path(sys.argv[1])
recipe.main(sys.argv[2:])
"""


def state(name: str, step: int = 3) -> str:
    return json.dumps({"state": name, "step": step})


class Bench:
    """A recipe of two stages, `one` and `two`, whose training runs are stubs."""

    def __init__(self, folder: Path, capture):
        self.folder, self.out, self.capture = folder, folder / "out", capture
        (folder / "scripts").mkdir()
        # the recipe calls it by bash
        (folder / "stub.py").write_text(LAUNCH.format(python=sys.executable, folder=str(folder)))
        stub = f'exec {shlex.quote(sys.executable)} {shlex.quote(str(folder / "stub.py"))} "$@"\n'
        (folder / "scripts/launch.sh").write_text(stub)
        self.ends()
        common = {"model_name_or_path": "llm", "version": "plain", "data_path": "data.json"}
        common |= {"vision_tower": "clip", "max_steps": 3, "learning_rate": 1e-3}
        for name in ("one", "two"):
            self.write(f"{name}.yaml", common)
        self.recipe = {
            "name": "bench",
            "output_dir": str(self.out),
            "prepare": [["python", "-c", "open('prepared', 'a').write('{seed} ')"]],
            "stages": [
                {"name": "one", "config": str(folder / "one.yaml")},
                {"name": "two", "config": str(folder / "two.yaml"), "from": "one", "passes": "model"},
            ],
            "report": False,
        }

    def write(self, name: str, content: dict) -> Path:
        (self.folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
        return self.folder / name

    def ends(self, *ends) -> None:
        """How the next runs end: (text of run_state.json or None, exit status); "wait": when a signal comes."""
        (self.folder / "ends").write_text(json.dumps(ends))

    def words(self, *flags: str) -> list[str]:
        file = self.write("recipe.yaml", self.recipe)
        return [sys.executable, "-c", DRIVER, str(self.folder), str(file), *flags]

    def run(self, *flags: str) -> tuple[int, str, str]:
        """In this process: (exit status, stdout, stderr)."""
        (self.folder / "launched").unlink(missing_ok=True)
        status = 0
        self.capture.readouterr()
        try:
            recipe.main([str(self.write("recipe.yaml", self.recipe)), *flags])
        except SystemExit as end:
            status = end.code
        return status, *self.capture.readouterr()

    @property
    def options(self) -> dict:
        return {"cwd": self.folder, "env": {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}}

    @property
    def launched(self) -> list[str]:
        file = self.folder / "launched"
        return file.read_text().splitlines() if file.is_file() else []

    def stage(self, name: str) -> dict:
        return next(entry for entry in read_recipe_state(self.out)["stages"] if entry["name"] == name)


@pytest.fixture
def bench(tmp_path, monkeypatch, capfd):
    made = Bench(tmp_path, capfd)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    return made


@pytest.fixture
def alone(bench):
    """Of one stage: no settings of a later one are checked, which takes seconds."""
    del bench.recipe["stages"][1]
    return bench


def test_stages_follow_one_another(bench):
    status, said, error = bench.run("--seed", "7", "--two.learning_rate", "2e-3")
    assert (status, said, error) == (0, "trained one\ntrained two\n", "well\nwell\n")
    out = bench.out
    assert bench.launched == [
        f"{bench.folder}/one.yaml --seed 7 --output_dir {out}/one",
        f"{bench.folder}/two.yaml --seed 7 --learning_rate 2e-3 --model_name_or_path {out}/one --output_dir {out}/two",
    ]
    assert (bench.folder / "prepared").read_text() == "7 "
    content = read_recipe_state(out)
    assert (content["schema"], content["recipe"]) == (1, "bench") and content["config_hash"]
    for entry in content["stages"]:
        assert (entry["status"], entry["steps"], entry["last_line"]) == ("finished", 3, f"trained {entry['name']}")
        assert type(entry["seconds"]) is float and bench.folder.name in entry["command"]
    # all is there: nothing is prepared or trained again
    status, said, _ = bench.run("--seed", "7", "--two.learning_rate", "2e-3")
    assert status == 0 and said.count("\n") == 1 and "--overwrite" in said
    assert not bench.launched and (bench.folder / "prepared").read_text() == "7 "


def test_nothing_is_built_on_half_a_stage(alone, monkeypatch):
    monkeypatch.setattr(recipe.RecipeRun, "check", lambda self, plan: None)  # takes seconds each time
    alone.recipe["stages"].append({"name": "two", "config": f"{alone.folder}/two.yaml", "from": "one"})
    flags = "--prepared"
    alone.ends((state("preempted"), 0))
    status, said, _ = alone.run(flags)
    stopped = "stopped before its end, and nothing after it was begun; the same command goes on"
    assert (status, said) == (0, f"trained one\n{alone.out}/one: {stopped}\n")
    assert alone.stage("one")["status"] == "preempted" and alone.stage("two")["status"] == "waiting"
    assert read_state(alone.out)["state"] == "preempted"  # of the whole
    alone.ends((state("preempted", 2), 1))  # a launcher that was stopped itself says 1; the run says what became of it
    assert alone.run(flags)[0] == 0 and len(alone.launched) == 1
    alone.ends((state("finished"), 0), (state("preempted"), 0))
    assert alone.run(flags)[:2] == (0, f"trained one\ntrained two\n{alone.out}/two: {stopped}\n")


@pytest.mark.parametrize(
    ("text", "status", "ended", "exit_status"),
    [
        (state("failed"), 1, "failed", 1),
        (state("running"), 137, "failed", 137),
        (state("running", 2), 0, "failed", 2),
        (None, 2, "failed", 2),
        (state("preempted"), 130, "preempted", 130),
        (state("finished"), 1, "finished", 0),  # what counts is what the run says
    ],
)
def test_how_a_stage_ended(alone, text, status, ended, exit_status):
    alone.ends((text, status))
    got, _, error = alone.run("--prepared")
    assert (got, alone.stage("one")["status"]) == (exit_status, ended)
    assert read_state(alone.out)["state"] == ended
    assert ("run_state.json" in error) == (status == 0)
    if ended == "failed" and status:
        assert alone.stage("one")["last_line"] == "error: as asked"


def test_what_another_run_has_left_is_not_what_this_one_says(tmp_path):
    (tmp_path / "run_state.json").write_text(state("finished"))
    before = (tmp_path / "run_state.json").read_text()
    assert how_it_ended(tmp_path, before, 1, stopped=False) == "failed"
    assert how_it_ended(tmp_path, before, 143, stopped=True) == "preempted"
    assert how_it_ended(tmp_path, "", 1, stopped=False) == "finished"
    (tmp_path / "run_state.json").write_text('{"state": "fini')
    assert how_it_ended(tmp_path, before, 0, stopped=False) == "failed"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_reach_the_run_once(alone, name):
    alone.ends(("wait", 0))
    with running(alone.words("--prepared"), **alone.options) as process:
        wait_for(alone.folder / "ready", process)
        process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "the same command goes on" in said
    assert json.loads((alone.out / "one/run_state.json").read_text())["all"] == [name]
    assert alone.stage("one")["status"] == "preempted"
    assert alone.run("--prepared")[0] == 0 and alone.stage("one")["status"] == "finished"


def test_a_killed_recipe_leaves_nothing_running(alone):
    alone.ends(("wait", 0))
    with running(alone.words("--prepared"), **alone.options) as process:
        wait_for(alone.folder / "ready", process)
        process.kill()
        end = time.monotonic() + 60
        while not (alone.out / "one/run_state.json").exists():
            assert time.monotonic() < end, "what it started lives on"
            time.sleep(0.05)
    assert alone.stage("one")["status"] == "running"  # as nobody could say otherwise
    assert alone.run("--prepared")[0] == 0  # the folder's lock is of a process that is no more


def test_stopped_while_data_are_prepared(alone):
    code = f"import pathlib, time; pathlib.Path({str(alone.folder / 'ready')!r}).touch(); time.sleep(60)"
    alone.recipe["prepare"] = [["python", "-c", code]]
    with running(alone.words(), **alone.options) as process:
        wait_for(alone.folder / "ready", process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "the same command goes on" in said and not alone.launched


def test_what_cannot_be_prepared(alone):
    alone.recipe["prepare"] = [["python", "-c", "raise SystemExit('no digits here')"]]
    status, _, error = alone.run()
    assert status == 2 and "ended with status 1: no digits here" in error.splitlines()[-1] and not alone.launched
    alone.recipe["prepare"] = [["/no/such/program"]]
    status, _, error = alone.run()
    assert status == 2 and "/no/such/program: No such file" in error and not alone.launched


def test_other_settings_than_a_finished_stages(alone):
    assert alone.run("--prepared", "--save_steps", "5")[0] == 0
    status, _, error = alone.run("--prepared", "--max_steps", "4")
    assert status == 2 and error.count("\n") == 1 and "max_steps: 3, now 4" in error and not alone.launched
    assert alone.run("--prepared", "--save_steps", "9")[0] == 0 and not alone.launched  # it changes no number
    assert alone.run("--prepared", "--max_steps", "4", "--from", "one")[0] == 0 and len(alone.launched) == 1
    assert alone.run("--prepared", "--max_steps", "4")[0] == 0 and not alone.launched
    assert alone.run("--prepared", "--overwrite")[0] == 0 and len(alone.launched) == 1
    # an evaluation that is asked otherwise, or a comment, is no other training
    (alone.folder / "one.yaml").write_text("# words\n" + (alone.folder / "one.yaml").read_text())
    assert alone.run("--prepared")[0] == 0 and not alone.launched


def test_from_and_until(alone):
    alone.recipe["stages"] += [{"name": name, "config": f"{alone.folder}/two.yaml"} for name in ("two", "three")]
    (alone.folder / "mine").touch()
    assert alone.run("--prepared", "--until", "one")[0] == 0 and len(alone.launched) == 1
    status, _, error = alone.run("--prepared", "--from", "three")
    assert status == 2 and f"{alone.out}/two is not finished" in error
    assert alone.run("--prepared", "--until", "two")[1] == f"{alone.out}/one: finished before\ntrained two\n"
    status, _, error = alone.run("--prepared", "--until", "four")
    assert status == 2 and "expected one of one, two, three" in error


def test_what_is_built_on_is_needed_no_more(alone, monkeypatch):
    """A first stage that was removed is not trained again for a second one that is finished, which is never lost."""
    monkeypatch.setattr(recipe.RecipeRun, "check", lambda self, plan: None)
    alone.recipe["stages"].append({"name": "two", "config": f"{alone.folder}/two.yaml", "from": "one"})
    assert alone.run("--prepared")[0] == 0
    shutil.rmtree(alone.out / "one")
    assert alone.run("--prepared")[0] == 0 and not alone.launched
    assert alone.run("--prepared", "--until", "one")[0] == 0 and len(alone.launched) == 1
    (alone.out / "one/run_state.json").write_text(state("preempted"))
    shutil.rmtree(alone.out / "two")
    assert alone.run("--prepared")[0] == 0 and len(alone.launched) == 2


def test_a_folder_of_another_recipe(alone):
    assert alone.run("--prepared")[0] == 0
    alone.recipe["name"] = "other"
    status, _, error = alone.run("--prepared")
    assert (
        status == 2
        and error == f"error: output_dir: {alone.out} holds the recipe bench, expected other or a folder of its own\n"
    )


def test_an_earlier_versions_folder_counts(alone):
    (alone.out / "one").mkdir(parents=True)
    (alone.out / "one/trainer_state.json").write_text("{}")
    assert alone.run("--prepared")[0] == 0 and not alone.launched


def test_a_later_stages_settings_are_refused_before_the_first_trains(bench):
    bench.write("two.yaml", yaml.safe_load((bench.folder / "two.yaml").read_text()) | {"mm_tunable_parts": "eyes"})
    status, _, error = bench.run("--prepared")
    assert status == 2 and "eyes" in error and not bench.launched
    assert bench.stage("two")["status"] == "failed" and "eyes" in bench.stage("two")["last_line"]


def test_scripts_ask_for_the_folder(bench):
    assert bench.run("--print-folder")[:2] == (0, f"{bench.out}\n")
    assert bench.run("--output_dir", "other", "--max_steps", "3", "--print-folder")[:2] == (0, "other\n")
    code = f"source {ROOT}/scripts/common.sh; PYTHON={sys.executable}; folder_of recipe.yaml --max_steps 2"
    code += "; is_recipe one.yaml"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, **bench.options)
    assert (done.stdout, done.returncode) == (f"{bench.out}\n", 1)


def test_dry_run_touches_nothing(bench):
    status, said, _ = bench.run("--dry-run", "--seed", "3")
    assert status == 0 and not bench.out.exists() and not bench.launched and not (bench.folder / "prepared").exists()
    lines = said.splitlines()
    assert lines[0].endswith("write('3 ')") and lines[1].startswith("one (to be trained): ") and len(lines) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": []}, "stages: none given"),
        ({"stage": []}, "unknown key 'stage'; the nearest valid key is 'stages'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"stages": [{"name": "..", "config": "one.yaml"}]}, "name is '..'"),
        ({"stages": [{"name": "a", "config": "none.yaml"}]}, "config is 'none.yaml'"),
        ({"stages": [{"name": "a", "config": "one.yaml"}] * 2}, "a is the name of two parts"),
        ({"stages": [{"name": "a", "config": "one.yaml", "from": "b"}]}, "from is 'b', expected a stage before a"),
        ({"stages": [{"name": "a", "config": "one.yaml", "passes": "model"}]}, "as there is no `from`"),
        ({"stages": [{"name": "a", "config": "one.yaml", "set": {"lerning_rate": 1}}]}, "key is 'learning_rate'"),
        ({"stages": {"a": 1}}, "expected a list of mappings"),
        ({"evaluations": [{"name": "e", "kind": "bleu"}]}, "kind is 'bleu'"),
        ({"evaluations": [{"name": "e", "kind": "exact_match"}]}, "data_path is None"),
        ({"evaluations": [{"name": "e", "kind": "lmms_eval"}]}, "tasks is []"),
        ({"evaluations": [{"name": "e", "kind": "exact_match", "data_path": "x", "tasks": []}]}, "unknown key 'tasks'"),
        (
            {"evaluations": [{"name": "e", "kind": "exact_match", "data_path": "x", "args": {"batch": 1}}]},
            "nearest valid key is 'batch_size'",
        ),
        ({"prepare": ["rm -rf x"]}, "each a list of words"),
        ({"output_dir": None}, "output_dir is None"),
        ({"report": "maybe"}, "report is 'maybe'"),
    ],
)  # fmt: skip
def test_faults_of_a_recipe_are_one_line(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("max_steps: 3\n")
    content = {"name": "r", "output_dir": "out", "stages": [{"name": "s", "config": "one.yaml"}]} | change
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(LlavaError) as error:
        read_recipe("r.yaml")
    assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("r.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--three.max_steps", "1"], "has no part 'three', expected one of one, two"),
        (["--one.max_stebs", "1"], "'max_stebs'"),
        (["--max_steps", "many"], "max_steps"),
        (["word"], "'word' is no --key"),
    ],
)
def test_faults_of_a_command_line(bench, words, said):
    found = read_recipe(bench.write("recipe.yaml", bench.recipe))
    with pytest.raises(LlavaError, match=said):
        Overrides(found, words)


def test_what_stands_above_what(bench):
    bench.recipe["stages"][0]["set"] = {"max_steps": 5, "image_grid_pinpoints": [[28, 56], [56, 28]], "bf16": False}
    found = read_recipe(bench.write("recipe.yaml", bench.recipe))
    words = ["--max_steps", "7", "--one.max_steps=8", "--tower", "t.yaml"]
    one, two = found.stages
    line = parse_command_line(stage_argv(found, one, "out", words[:3]))
    assert line.values["max_steps"] == 8 and line.values["image_grid_pinpoints"] == "[[28, 56], [56, 28]]"
    assert line.values["bf16"] is False and line.values["output_dir"] == "out/one"
    assert parse_command_line(stage_argv(found, two, "out", words[:3])).values["max_steps"] == 7
    assert parse_command_line(stage_argv(found, one, "out", [])).values["max_steps"] == 5
    with pytest.raises(LlavaError, match=r"tower config t\.yaml does not exist"):
        stage_argv(found, one, "out", words)


def test_flags_are_read_as_they_were_meant():
    values = {"max_steps": 3, "learning_rate": 1e-5, "bf16": True, "deepspeed": None, "report_to": ["none", "wandb"]}
    values |= {"adaptive_patches": {"method": "budget", "alpha": [0.2, 1.0]}, "image_grid_pinpoints": "[[1, 2]]"}
    assert parse_command_line(flags(values)).values == values


def test_what_a_stage_passes_on(bench):
    second = bench.recipe["stages"][1]
    bench.recipe["stages"].append({"name": "three", "config": second["config"], "from": "two", "passes": "lora"})
    second["passes"] = "projector"
    found = read_recipe(bench.write("r.yaml", bench.recipe))
    plans = plan_stages(found, bench.out, Overrides(found, []))
    second, third = (parse_command_line(plan.argv).values for plan in plans[1:])
    assert second["pretrain_mm_mlp_adapter"] == f"{bench.out}/one" and "model_name_or_path" not in second
    assert third["lora_weight_path"] == f"{bench.out}/two" and third["model_name_or_path"] == "llm"
    # a change of the first stage is one of all that is built on it
    again = plan_stages(found, bench.out, Overrides(found, ["--one.max_steps", "4"]))
    assert all(a.fingerprint != b.fingerprint for a, b in zip(plans, again, strict=True))
    elsewhere = plan_stages(found, Path("elsewhere"), Overrides(found, ["--logging_steps", "4"]))
    assert [plan.fingerprint for plan in plans] == [plan.fingerprint for plan in elsewhere]


# --- evaluations ------------------------------------------------------------------------------------------------------


def plan_of(bench, **run):
    bench.recipe["stages"] = [bench.recipe["stages"][0] | {"set": run}]
    found = read_recipe(bench.write("recipe.yaml", bench.recipe))
    plan = plan_stages(found, bench.out, Overrides(found, []))[0]
    plan.folder.mkdir(parents=True)
    return plan


def test_the_command_of_an_exact_match(bench, monkeypatch):
    plan = plan_of(bench)
    (plan.folder / "model-00001-of-00002.safetensors").touch()
    args = {"selections": ["none", "v1"], "limit": 5, "trust_remote_code": False}
    one = Evaluation("held", "exact_match", "q.json", "images", True, args=args)
    words, env = command(one, {"limit": "3"}, plan, bench.out / "eval_held.json")
    said = " ".join(words[1:])
    expected = "--data-path q.json --image-folder images --blank-images --selections none v1 --limit 3"
    assert (
        said == f"-m llava.eval.exact_match --model-path {plan.folder} {expected} --output {bench.out}/eval_held.json"
    )
    assert words[0] == sys.executable and env == {}
    monkeypatch.setenv("EVAL_LIMIT", "7")  # where nothing else says it
    words, _ = command(Evaluation("held", "exact_match", "q.json"), {}, plan, bench.out / "eval_held.json")
    assert words[words.index("--limit") + 1] == "7"
    words, _ = command(one, {}, plan, bench.out / "eval_held.json")
    assert words[words.index("--limit") + 1] == "5"


@pytest.mark.parametrize("lora", [True, False])
def test_an_adapter_or_a_projector_is_read_over_its_base(bench, lora):
    plan = plan_of(bench, **({"lora_enable": True, "mm_tunable_parts": "mm_language_model"} if lora else {}))
    (plan.folder / ("adapter_model.safetensors" if lora else "mm_projector.safetensors")).touch()
    words, _ = command(Evaluation("held", "exact_match", "q.json"), {}, plan, bench.out / "e.json")
    assert words[words.index("--model-base") + 1] == "llm"
    words, _ = command(Evaluation("b", "lmms_eval", tasks=("mme", "gqa")), {}, plan, bench.out / "eval_b.json")
    assert words[2:4] == [f"{plan.folder},model_base=llm", "mme,gqa"]


def test_an_own_encoder_is_named_to_the_evaluation(bench):
    (bench.folder / "mine.py").write_text("class Mine: ...\n")
    plan = plan_of(bench, vision_tower=f"{bench.folder}/mine.py:Mine")
    words, _ = command(Evaluation("held", "exact_match", "q.json"), {}, plan, bench.out / "e.json")
    assert words[words.index("--vision-tower") + 1] == f"{bench.folder}/mine.py:Mine"
    words, _ = command(Evaluation("b", "lmms_eval", tasks=("mme",)), {}, plan, bench.out / "eval_b.json")
    assert words[2].endswith(f",vision_tower={bench.folder}/mine.py:Mine")


def test_what_lmms_eval_has_written(tmp_path):
    """Its 0.7.3's files, of which scripts/test_lmms_eval.sh makes real ones."""
    folder = tmp_path / "lmms_eval_b" / "model"
    folder.mkdir(parents=True)
    results = {"gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}}
    results["mme"] = {"alias": "mme", "mme_score,none": 1500.0, "mme_score_stderr,none": "N/A"}
    counts = {task: {"original": 9, "effective": 2} for task in results}
    (folder / "20260101_results.json").write_text(json.dumps({"results": results, "n-samples": counts}))
    rows = {"gqa": [{"doc_id": 0, "exact_match": 1.0, "doc": {"imageId": "n1"}}, {"doc_id": 1, "exact_match": 0.0}]}
    rows["mme"] = [{"doc_id": 0, "mme_score": {"category": "a", "score": 1}}] * 2
    for task, lines in rows.items():
        (folder / f"20260101_samples_{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = Evaluation("b", "lmms_eval", tasks=("gqa", "mme"))
    assert keep(one, None, tmp_path / "eval_b.json") == "gqa: exact_match 0.5, mme: mme_score 1500"
    assert json.loads((tmp_path / "eval_b.json").read_text()) == {
        "kind": "lmms_eval",
        "tasks": {
            "gqa": {"metric": "exact_match", "score": 0.5, "n": 2},
            "mme": {"metric": "mme_score", "score": 1500.0, "n": 2},
        },
        "samples": {"gqa": [{"id": "0", "image": "n1", "score": 1.0}, {"id": "1", "image": None, "score": 0.0}]},
    }
    with pytest.raises(LlavaError, match=r"found no results\.json"):
        read_lmms(tmp_path / "nothing")


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs/recipes").glob("*.yaml")))
def test_every_shipped_recipe_is_sound(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_recipe(f"configs/recipes/{name}")
    plans = plan_stages(found, Path(found.output_dir), Overrides(found, []))
    assert found.name == Path(name).stem and found.evaluations
    for stage, plan in zip(found.stages, plans, strict=True):
        assert stage.source or plan.settings["model_name_or_path"]
        if name.startswith("demo"):  # run alone, a demo's stage finds its files where its recipe has them
            assert yaml.safe_load(Path(stage.config).read_text())["output_dir"] == str(plan.folder)


def test_two_stages_and_their_evaluation(kit, tmp_path):
    """Nothing stands in for anything: a projector is trained, then all, and the model is asked."""
    data = Path(kit.records("iiii"))
    first = dict(zip(*[iter(word.removeprefix("--") for word in kit.flags(tmp_path / "x", "iiii"))] * 2, strict=False))
    values = {key: yaml.safe_load(value) for key, value in first.items() if key not in ("output_dir", "max_steps")}
    values |= {"max_steps": 2, "save_strategy": "no", "report_to": "none"}
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump(values | {"version": "plain", "mm_tunable_parts": "mm_mlp_adapter"})
    )
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    content = {"name": "tiny", "output_dir": str(tmp_path / "out"), "stages": [
        {"name": "one", "config": str(tmp_path / "one.yaml")},
        {"name": "two", "config": str(tmp_path / "two.yaml"), "from": "one", "passes": "projector"},
    ]}  # fmt: skip
    content["evaluations"] = [{"name": "held", "kind": "exact_match", "data_path": str(data)}]
    content["evaluations"][0] |= {
        "image_folder": str(data.parent / "images"),
        "args": {"limit": 3, "max_new_tokens": 2},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    words = [sys.executable, "-m", "llava.train.recipe", str(tmp_path / "r.yaml")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    out = tmp_path / "out"
    result = json.loads((out / "eval_held.json").read_text())
    assert done.stdout.splitlines()[-1] == f"held-out exact match: {result['exact_match']:.3f} (n=3)"
    assert json.loads((out / "two/eval.json").read_text()) == result
    assert (out / "one/mm_projector.safetensors").is_file() and (out / "two/model.safetensors").is_file()
    taken_up = [line for line in done.stdout.splitlines() if line.startswith("mm_mlp_adapter: ")]
    assert len(taken_up) == 2 and f"{out}/one" in taken_up[1]
    assert (out / "report.png").is_file() and (out / "two/report.png").is_file()
    content = read_recipe_state(out)
    assert [entry["status"] for entry in content["stages"] + content["evaluations"]] == ["finished"] * 3
    assert content["evaluations"][0]["file"] == "eval_held.json" and content["stages"][0]["steps"] == 2
