"""Parts made once for all runs of this folder, and a look into a run that takes place in this process."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.model import own_encoders
from tests.support.garbage import leave_imported_alone


class Kit:
    """Tiny parts on disk; `run` trains in this process and gives the folder of the result."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.llm = tiny.llm(folder / "llm")
        self.clip = tiny.tower(folder / "clip")
        self.clip_other = tiny.tower(folder / "clip_other", seed=7)
        self.clip_fine = tiny.tower(folder / "clip_fine", side=56)  # 4 x 4 tokens
        self.siglip = tiny.tower(folder / "siglip", kind="siglip")
        self.hevc_vit = tiny.tower(folder / "hevc_vit", kind="hevc_vit")
        # without dropout, whose draws differ with the number of processes
        (folder / "mine.py").write_text(own_encoders.FILE.replace("48, batch_first", "48, dropout=0.0, batch_first"))
        self.own = f"{folder}/mine.py:Plain"
        self.projector = tiny.projector(folder / "mm_projector.safetensors")
        self.data: dict[str, str] = {}

    def records(self, kinds: str) -> str:
        if kinds not in self.data:
            self.data[kinds] = tiny.records(self.folder / f"data_{kinds}", kinds)
        return self.data[kinds]

    def flags(self, out: Path, kinds: str = "iitiittiiiti", **changes) -> list[str]:
        parts = {"model_name_or_path": self.llm, "vision_tower": self.clip, "output_dir": out}
        if "data_path" not in changes:
            changes["data_path"] = self.records(kinds)
        parts["image_folder"] = Path(changes["data_path"]).parent / "images"
        return tiny.train_flags(self.folder, kinds, **(parts | changes))

    def run(self, out: Path, kinds: str = "iitiittiiiti", **changes) -> Path:
        from llava.train.train import train

        leave_imported_alone()
        train(self.flags(out, kinds, **changes))
        return out


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    return Kit(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def spy(monkeypatch):
    """What a run in this process did: `before` (the parameters it began with) and `trainer`, as of its end."""
    from llava.train import parts, train

    seen = SimpleNamespace(before={}, trainer=None)

    def moved() -> set[str]:
        after = dict(seen.trainer.model.named_parameters())
        assert after.keys() == seen.before.keys()
        return {name for name, value in seen.before.items() if not value.equal(after[name].detach())}

    seen.moved = moved
    seen.moved_parts = lambda: {seen.trainer.family.part_of(name) for name in moved()}
    set_trainable, save = parts.set_trainable, train.save

    def watched_set_trainable(model, *rest):
        seen.before = {name: value.detach().clone() for name, value in model.named_parameters()}
        set_trainable(model, *rest)

    def watched_save(trainer, out):
        seen.trainer = trainer
        save(trainer, out)

    monkeypatch.setattr(parts, "set_trainable", watched_set_trainable)
    monkeypatch.setattr(train, "save", watched_save)
    return seen
