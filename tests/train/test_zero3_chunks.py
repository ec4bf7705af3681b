"""Under ZeRO-3 ranks with unlike numbers of chunks make the same calls, and have one process's gradients."""

import pytest

from tests.model import small


def test_ranks_with_unlike_chunks(forks, tmp_path):
    pytest.importorskip("deepspeed")
    tower = small.tower(tmp_path / "clip", side=28)
    status, said = forks.ranks(2, [tower], tmp_path / "log", "tests.support.zero3_step:main")
    assert status == 0, said[-6000:]
