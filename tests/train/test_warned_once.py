"""Warnings of libraries: once, of all ranks and workers, and none lost."""

import logging
import multiprocessing
import sys
import warnings

import pytest

from llava.train.warned_once import Once, warned_once


def library(number=0):
    warnings.warn(f"old way {number} at 0x{number:x}", FutureWarning, stacklevel=1)


@pytest.fixture(autouse=True)
def shown_always():
    """As where no pytest collects them."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def test_once_in_place_of_once_each_step(capsys):
    show = warnings.showwarning
    logger = logging.getLogger("transformers.of_a_test")
    with warned_once():
        for step in range(3):
            library(step)
            warnings.warn("of our own", UserWarning, stacklevel=1)
            logger.warning("the same")
        logger.error("bad"), logger.error("bad")
    said = capsys.readouterr().err
    assert said.count("FutureWarning: old way 0") == 1 and said.count("old way") == 2  # its line of code is shown too
    assert said.count("UserWarning: of our own") == 1
    assert warnings.showwarning is show
    library()
    assert "old way" in capsys.readouterr().err


def test_workers_of_one_process_share_what_was_said(capfd):
    with warned_once():
        for _ in range(3):
            worker = multiprocessing.get_context("fork").Process(target=library)
            worker.start()
            worker.join()
    assert capfd.readouterr().err.count("FutureWarning: old way") == 1


def test_of_several_ranks_the_first_shows_it(monkeypatch):
    claimed = []

    def claim(text):
        claimed.append(text)
        return claimed.count(text) == 1

    shown = []
    first, other = Once(), Once()
    assert first.is_new("while importing", lambda: shown.append("first"))  # of rank 0, before the ranks have met
    monkeypatch.setenv("RANK", "1")
    assert not other.is_new("while importing", lambda: shown.append("other"))
    assert not other.is_new("rank 1 alone", lambda: shown.append("alone"))
    first.meet(claim)
    other.meet(claim)
    assert other.is_new("in step 1") and not first.is_new("in step 2")  # the numbers alone differ
    other.tell_held()
    assert shown == ["alone"]
