"""Under ZeRO-3 ranks with unlike numbers of chunks make the same calls, and have one process's gradients."""

import pytest

from tests.model import small
from tests.train.test_distributed import run_two


def test_ranks_with_unlike_chunks(tmp_path):
    pytest.importorskip("deepspeed")
    run_two([small.tower(tmp_path / "clip", side=28)], ["-m", "tests.support.zero3_step"])
