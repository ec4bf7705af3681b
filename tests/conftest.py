import os
import sys

import pytest

from tests.support.garbage import leave_imported_alone

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# as scripts/common.sh has it: DeepSpeed compiles with the ninja beside this Python, and anew where another one did last
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


FIRST = (  # those that take longest, so that the processes that share the files end together
    "test_two_nodes",
    "test_world_size",
    "test_readme",
    "test_hangs",
    "test_distributed",
    "test_precision",
    "test_gpu_suite",
    "test_finite",
)


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    leave_imported_alone()


@pytest.fixture(scope="session")
def forks():
    """Runs of one rank or several that start at once (see `tests.support.forks`)."""
    from tests.support.forks import Forks

    with Forks() as process:
        yield process
