"""A run on two nodes goes on from its checkpoint when one of them is lost (scripts/test_long.sh)."""

import json
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.support import nodes

WHY_NOT = nodes.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"two nodes: {WHY_NOT}")

STEPS = 16
# how soon a lost node is missed, and how long the others wait for one more
SOON = {"RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=5"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "run.yaml").write_text("use_cpu: true\n")
    return dict(
        model_name_or_path=tiny.llm(folder / "llm"),
        vision_tower=tiny.tower(folder / "clip"),
        data_path=tiny.records(folder, "iitimtimiitittitittiittt" * 4),
        image_folder=folder / "images",
    )


def flags(parts: dict, out: Path, stage: int | None) -> list[str]:
    own = dict(output_dir=out, per_device_train_batch_size=2, max_steps=STEPS, save_strategy="steps", save_steps=2)
    own["deepspeed"] = None if stage is None else nodes.ROOT / f"scripts/zero{stage}.json"
    return [str(Path(parts["data_path"]).with_name("run.yaml")), *tiny.train_flags(out.parent, **parts, **own)]


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory):
    """A function: the losses of the run of two nodes of which none is lost."""
    made = {}

    def of(stage):
        if stage not in made:
            folder = tmp_path_factory.mktemp("whole")
            with nodes.Nodes() as pair:
                words = flags(parts, folder / "out", stage)
                running = [nodes.launch(pair, node, words, folder / "log") for node in (0, 1)]
                assert [process.wait(timeout=900) for process in running] == [0, 0], tail(folder / "log")
            made[stage] = losses(folder / "out")
        return made[stage]

    return of


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in tiny.history(out)]


def tail(log: Path) -> str:
    return log.read_text()[-6000:]


def wait_for_step(out: Path, step: int, log: Path) -> None:
    """Until there is a checkpoint of that step, or of a later one."""
    end = time.monotonic() + 900
    while not any(step <= int(path.parent.name[11:]) for path in out.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < end, tail(log)
        time.sleep(0.1)


@pytest.mark.parametrize("stage", [None, 3], ids=["plain", "zero3"])
@pytest.mark.parametrize("lost", [1, 0], ids=["node1", "head"])
def test_a_node_that_is_lost_and_started_again(parts, undisturbed, tmp_path, lost, stage):
    """All that runs on a node is killed; its command is typed again, and the other node's run waits for it."""
    words, log = flags(parts, tmp_path / "out", stage), tmp_path / "log"
    with nodes.Nodes() as pair:
        running = [nodes.launch(pair, node, words, log, MAX_RESTARTS="3", **SOON) for node in (0, 1)]
        wait_for_step(tmp_path / "out", 4, log)
        pair.kill(running[lost])
        assert not (tmp_path / "out/trainer_state.json").exists(), "the run was over before the node was lost"
        running[lost] = nodes.launch(pair, lost, words, log, MAX_RESTARTS="3", **SOON)
        assert [process.wait(timeout=900) for process in running] == [0, 0], tail(log)
    assert f"resuming from {tmp_path}/out/checkpoint-" in log.read_text()
    assert losses(tmp_path / "out") == undisturbed(stage)


@pytest.mark.parametrize("stage", [None, 3], ids=["plain", "zero3"])
def test_a_node_that_stays_away(parts, undisturbed, tmp_path, stage):
    """With NNODES=1:2 the other node goes on alone."""
    words, log = flags(parts, tmp_path / "out", stage), tmp_path / "log"
    with nodes.Nodes() as pair:
        running = [nodes.launch(pair, node, words, log, NNODES="1:2", **SOON) for node in (0, 1)]
        wait_for_step(tmp_path / "out", 4, log)
        pair.kill(running[1])
        assert running[0].wait(timeout=900) == 0, tail(log)
    assert f"resuming from {tmp_path}/out/checkpoint-" in log.read_text()
    steps = tiny.history(tmp_path / "out")
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "out")[:4] == undisturbed(stage)[:4]
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == STEPS


def test_a_cable_that_is_taken_out(parts, undisturbed, tmp_path):
    """Nobody is told of it: `ddp_timeout` ends the wait, and the node that is left goes on alone."""
    words, log = [*flags(parts, tmp_path / "out", None), "--ddp_timeout", "20"], tmp_path / "log"
    with nodes.Nodes() as pair:
        running = [nodes.launch(pair, node, words, log, NNODES="1:2", **SOON) for node in (0, 1)]
        wait_for_step(tmp_path / "out", 4, log)
        pair.unplug(1)
        assert running[0].wait(timeout=900) == 0, tail(log)
    assert len(losses(tmp_path / "out")) == STEPS
