import pytest


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The files of a comparison of tiny towers."""
    from tests.compare.small import Small

    return Small(tmp_path_factory.mktemp("small"))
