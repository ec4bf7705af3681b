"""What the guides in docs/ say can be typed: every snippet is run, and every command."""

import importlib
import re
import runpy
import shlex
import sys

import pytest
from PIL import Image

from tests import tiny
from tests.support.pages import ROOT, commands, run_snippets

PAGES = ("packed_tower", "patch_selection_quick_reference", "patch_selection_usage")
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page, tmp_path):
    replaced = {"small_hevc_vit_packing": str(tmp_path / "hevc_vit_packing")}
    if "Qwen/Qwen2-VL-7B-Instruct" in TEXTS[page]:
        replaced["Qwen/Qwen2-VL-7B-Instruct"] = tiny.qwen2_vl(tmp_path / "qwen2_vl")
    run_snippets(TEXTS[page], replaced)


def run_command(line: str) -> None:
    """A command line in this process, `configs/` and `playground/` being the project's."""
    _, *words = shlex.split(re.sub(r"\b(configs|playground)/", rf"{ROOT}/\1/", line))
    if words[0] == "-m":
        status = importlib.import_module(words[1]).main(words[2:])
        assert not status
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("line", sorted({line for text in TEXTS.values() for line in commands(text)}))
def test_commands(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((160, 120), 60).convert("RGB").save("photo.jpg")
    if " DIR " in line:
        tiny.qwen2_vl(tmp_path / "DIR")
        path = tiny.records(tmp_path, "i")
        line = line.replace("F.json", path).replace(" D ", f" {tmp_path / 'images'} ")
    before = set(tmp_path.rglob("*"))
    run_command(line)
    left = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before}
    named = re.findall(r"(?<=--output )\S+|(?<=--output-dir )\S+", line)
    assert left and left.issuperset(named), left


def test_every_command_is_found():
    found = {name: len(commands(text)) for name, text in TEXTS.items()}
    assert found == {
        name: len(re.findall(r"^    (?=\w)", text, re.MULTILINE)) - in_blocks(text) for name, text in TEXTS.items()
    }
    assert sum(found.values()) >= 8


def in_blocks(text: str) -> int:
    """Indented lines of fenced blocks."""
    blocks = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    return sum(len(re.findall(r"^    (?=\w)", block, re.MULTILINE)) for block in blocks)


LINKS = sorted({(name, link) for name, text in TEXTS.items() for link in re.findall(r"\]\(([^)]+)\)", text)})


@pytest.mark.parametrize("page, link", LINKS)
def test_links(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / "docs" / path).resolve()
    assert target.is_file()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]


PATHS = {
    path
    for text in TEXTS.values()
    for path in re.findall(r"\b(?:benchmarks|configs|llava|playground)/[\w./]+\.\w+", text)
}


def test_files_exist():
    assert PATHS and all((ROOT / path).is_file() for path in PATHS)
