"""Peak memory of this process, against what is taken."""

import pytest
import torch

from llava.train.peak_memory import PeakMemory, given_back


def test_what_is_held_at_once_is_the_peak():
    size = 64 * 2**20
    before = torch.zeros(size // 8)  # 32 MiB that were there before
    with given_back(), PeakMemory("cpu") as peak:
        if peak._begun is None:
            pytest.skip("this kernel does not let the peak be reset (/proc/self/clear_refs)")
        for _ in range(3):  # one after the other
            block = torch.ones(size // 4)
            del block
        block = torch.ones(size // 16)
        del block
    assert peak.grown == pytest.approx(size, rel=0.1)
    assert peak.bytes >= peak.grown + before.nbytes and peak.gib == round(peak.bytes / 2**30, 3)


def test_where_it_cannot_be_measured(monkeypatch):
    monkeypatch.setattr("llava.train.peak_memory._reset_peak_resident", lambda: False)
    with PeakMemory("cpu") as peak:
        pass
    assert peak.bytes is None and peak.grown is None and peak.gib is None
