"""Snippets of the documentation, run as they stand."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a Markdown text in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The command lines `python ...` of indented blocks, continued ones joined, without their comments."""
    joined = re.sub(r"\\\n +", " ", text)
    found = re.findall(r"^    (python .*)$", joined, re.MULTILINE)
    return [re.sub(r" +# .*", "", line).strip() for line in found]


def run_snippets(text: str, replaced: dict[str, str], namespace: dict | None = None) -> dict:
    """Run the Python blocks of a page one after the other in one namespace; what each prints is what it says.

    A line `print(...)  # WORDS` is to print these words; other lines print nothing.

    Args:
        replaced: names on the page, of models that are not here, and what stands for them.
        namespace: names that the page takes for granted.
    """
    namespace = {} if namespace is None else namespace
    for block in blocks(text):
        said = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert len(said) == len(re.findall(r"^ *print\(", block, re.MULTILINE)), block
        for name, value in replaced.items():
            block = block.replace(name, value)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "<page>", "exec"), namespace)
        lines = printed.getvalue().splitlines()
        assert [line for line in lines if not line.startswith("loading vision tower")] == said, block
    return namespace
