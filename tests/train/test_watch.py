"""What a rank finds out about the others, over a real store that both use from one process."""

import json
import time

import pytest

from llava.errors import LlavaError
from llava.train import phases, watch


@pytest.fixture
def store(monkeypatch):
    """One that every rank of this process is connected to."""
    from torch.distributed import HashStore

    made = HashStore()
    monkeypatch.setattr(watch, "_own_connection", lambda: made)
    return made


def rank_of(store, number, timeout=1000):
    found = watch.Watch(timeout, number, 3)
    found.key = found.teller.key = "llava/test"
    found.teller.store = store
    return found


def tell(store, rank, **beat):
    told = {
        "phase": "forward pass",
        "step": 3,
        "seconds": 0.0,
        "time": 0.0,
        "host": "elsewhere",
        "pid": 1,
        "start": "1",
    }
    store.set(f"llava/test/{rank}", json.dumps(told | beat))


def culprits(one, store, silent_for=100):
    one.teller.looking = True
    one.teller._beat(store)
    return one._culprits(silent_for)


def test_who_is_to_blame(store):
    one = rank_of(store, 0)
    phases.enter("counting of labels over all ranks", 4)
    tell(store, 1), tell(store, 2)
    assert culprits(one, store) == ""
    time.sleep(0.2)
    tell(store, 1, time=1.0)
    assert (
        culprits(one, store, 0.1)
        == "rank 2 (pid 1 on elsewhere) no longer answers, last heard in the forward pass of step 3"
    )
    tell(store, 2, phase=watch._END)  # one that has ended well is waited for by nobody
    assert culprits(one, store, 0.1) == ""
    one.timeout = 0.1  # from here on it has waited
    tell(store, 1, phase="reading of data", step=4, seconds=77.0)
    assert culprits(one, store) == "rank 1 (pid 1 on elsewhere) has been for 77 s in the reading of data of step 4"
    tell(store, 1, phase="counting of labels over all ranks", step=4, seconds=77.0)
    assert culprits(one, store) == ""  # it waits as well
    tell(store, 2, host=one.teller.owner["host"], pid=2**22 + 1)
    assert "rank 2 (pid 4194305 on " in culprits(one, store) and "is gone" in culprits(one, store)


def test_the_first_that_fails_is_the_reason_of_all(store):
    one, other = rank_of(store, 0), rank_of(store, 1)
    phases.enter("forward pass", 3)
    one.teller.start(), other.teller.start()
    one.fail(KeyError("x"))
    other._blame("rank 2 is gone")
    lost = "[/x/gloo/pair.cc:1] Connection closed by peer"
    line = other.explain(RuntimeError(lost))
    assert line.startswith("rank 0 failed in the forward pass of step 3 (KeyError: 'x'); rank 1 waited for it in the ")
    assert other.first_to_tell() is False
    for own in (LlavaError("timeout"), KeyError("gloo"), RuntimeError("shapes differ")):
        assert other.explain(own) is None
    one.stop(), other.stop()


def test_an_error_that_no_rank_explains_stays(store):
    one = rank_of(store, 0)
    one.teller.every = 0.1
    phases.enter("forward pass", 3)
    one.teller.start()
    assert one.explain(RuntimeError("DataLoader timed out after 3 seconds")) is None
    one.timeout = 0.1
    assert "no rank is known to stand still: Application timeout" in one.explain(
        RuntimeError("Application timeout caused pair closure")
    )
    one.stop()


def test_a_store_that_does_not_answer_is_told(store, monkeypatch):
    one = rank_of(store, 1)
    one.teller.asked_at = time.monotonic() - 50
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert one._culprits(10) == "rank 0, which holds the run's store, no longer answers"
    assert one._culprits(100) == ""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "head")
    assert one._culprits(10).startswith("the launcher on head, which holds")
