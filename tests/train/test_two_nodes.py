"""A run on two nodes, each with a network of its own, takes the same steps as one process on the same global batch."""

import shutil

import pytest

from tests import tiny
from tests.support import nodes

WHY_NOT = nodes.why_not()
KINDS = "iittimti" + "miittiti" + "ttiittim"


@pytest.mark.skipif(WHY_NOT is not None, reason=f"two nodes: {WHY_NOT}")
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles an extension at first use: no C++ compiler")
def test_two_nodes_equal_one_process(kit, tmp_path):
    """ZeRO-3, started by scripts/finetune.sh on each node; no node's name leads to the other."""
    expected = tiny.history(kit.run(tmp_path / "one", KINDS, per_device_train_batch_size=8))
    config = tmp_path / "run.yaml"
    config.write_text(f"deepspeed: {nodes.ROOT}/scripts/zero3.json\nuse_cpu: true\n")
    flags = [str(config), *kit.flags(tmp_path / "two", KINDS)]
    log = tmp_path / "log"
    with nodes.Nodes() as pair:
        running = [nodes.launch(pair, node, flags, log) for node in (0, 1)]
        ended = [process.wait(timeout=600) for process in running]
    assert ended == [0, 0], log.read_text()[-6000:]
    found = tiny.history(tmp_path / "two")
    assert len(found) == len(expected) == 3
    for got, want in zip(found, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], abs=1e-5)
