import pytest

from tests.tools.hf.checkpoints import make


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Name of a case in `hf.checkpoints` -> (LLaVA folder, transformers' folder, what `export` returned), made once."""
    from llava.tools.export_hf import export

    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = make(folder, name)
            made[name] = source, folder / "hf", export(str(source), str(folder / "hf"))
        return made[name]

    return get


@pytest.fixture
def no_collection(monkeypatch):
    """Without the garbage collection between two models, which takes half of the time of a comparison this small."""
    from llava.tools.hf import verify

    monkeypatch.setattr(verify, "free", lambda: None)
