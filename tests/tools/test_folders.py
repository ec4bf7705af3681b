"""A folder that is there whole or not at all."""

import pytest

from llava.errors import LlavaError
from llava.tools.folders import new_folder


def fill(out, source, text, **options):
    with new_folder(str(out), str(source), **options) as folder:
        assert not folder.startswith(str(out) + "/")
        with open(f"{folder}/config.json", "w") as file:
            file.write(text)
        if text == "broken":
            raise RuntimeError(text)


def test_a_folder_is_there_whole_or_as_it_was(tmp_path):
    out = tmp_path / "deep" / "out"
    fill(out, tmp_path / "in", "first")
    assert (out / "config.json").read_text() == "first"
    with pytest.raises(LlavaError, match=f"{out}: is there already; --overwrite replaces it"):
        fill(out, tmp_path / "in", "second")
    with pytest.raises(RuntimeError):
        fill(out, tmp_path / "in", "broken", overwrite=True)
    assert (out / "config.json").read_text() == "first"
    fill(out, tmp_path / "in", "second", overwrite=True)
    assert (out / "config.json").read_text() == "second"
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # and no temporary folder


@pytest.mark.parametrize("source", [".", "weights", "weights/model.safetensors"])
def test_what_is_read_is_not_replaced(tmp_path, source):
    with pytest.raises(LlavaError, match="holds the weights that are read"):
        fill(tmp_path, tmp_path / source, "", overwrite=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "link").symlink_to(tmp_path / "model")
    (tmp_path / "model").mkdir()
    for out, link in (("model", "else/link"), ("else/link", "model")):
        with pytest.raises(LlavaError, match="holds the weights that are read"):
            fill(tmp_path / out, tmp_path / link / source, "", overwrite=True)
