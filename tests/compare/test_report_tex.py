"""The table for a paper: its structure, what is bold, what is escaped, and that LaTeX takes it."""

import re
import shutil
import subprocess

import pytest

from llava.compare.report_tex import escape, tex
from tests.compare.fake_comparison import TOWERS, comparison, failed_tower

SPECIAL = r"a&b%c$d#e_f{g}h~i^j\k<l>m|n" + '"oé塔–'
DOCUMENT = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n\\input{table}\n\\end{document}\n"


@pytest.fixture
def results(tmp_path):
    found = comparison(tmp_path / "pictures", pictures=20)[0]
    found["name"] = f"demo {SPECIAL}"
    found["towers"].append(failed_tower(SPECIAL))
    found["towers"][2]["name"] = SPECIAL
    found["towers"][1]["cost"]["tower_params"] = 1.234567e9
    found["towers"][3]["scores"]["heldout"] |= {"low": None, "high": None}
    found["towers"][4]["scores"][SPECIAL] = {"mean": 1512.3, "low": 1500.0, "high": 1530.0}
    return found


def body(text: str) -> list[list[str]]:
    """Cells of each row between the rules, headings first."""
    inside = text[text.index("\\toprule") : text.index("\\bottomrule")]
    rows = [line for line in inside.splitlines() if line.endswith("\\\\")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix("\\\\"))] for row in rows]


def test_structure(results):
    text = tex(results)
    assert text.startswith("% Needs \\usepackage{booktabs}.\n")
    plain = re.sub(r"\\[\\{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    rules = [text.index(f"\\{name}rule") for name in ("top", "mid", "bottom")]
    assert rules == sorted(rules)
    columns = re.search(r"\\begin\{tabular\}\{(l r*|lr*)\}", text)[1]
    assert {len(row) for row in body(text)} == {len(columns)} and len(body(text)) == 1 + len(TOWERS)
    assert all(line.startswith("% Not in the table: a") for line in text.splitlines()[1:2])


def test_numbers_are_the_results(results):
    rows = body(tex(results))
    assert rows[0] == ["Tower", "Tokens", "Params (M)", "TTFT (ms)", "heldout, \\%", escape(SPECIAL)]
    for row, tower in zip(rows[1:], results["towers"], strict=False):
        found = tower["scores"]["heldout"]
        mean = f"{100 * found['mean']:.1f}"
        half = f" \\pm {50 * (found['high'] - found['low']):.1f}" if found["low"] is not None else ""
        assert row[4] == f"${mean}{half}$"
    assert rows[2][2] == "1{,}235" and rows[5][5] == "$1512.3 \\pm 15.0$" and rows[1][5] == "--"


def test_bold_only_where_it_differs_from_all(results):
    assert "\\mathbf" not in tex(results)
    means = {tower["name"]: tower["scores"]["heldout"]["mean"] for tower in results["towers"][:-1]}
    first = max(means, key=means.get)
    for pair in results["pairs"]:
        pair |= {"a": SPECIAL} if pair["a"] == "hevc_vit" else {}
        pair |= {"b": SPECIAL} if pair["b"] == "hevc_vit" else {}
        pair |= {"significant": first in (pair["a"], pair["b"])}
        pair |= {"difference": means[pair["a"]] - means[pair["b"]]}
    text = tex(results)
    assert text.count("\\mathbf") == 1
    assert next(row for row in body(text) if "\\mathbf" in row[4])[0] == escape(first)
    next(pair for pair in results["pairs"] if pair["significant"])["significant"] = False
    assert "\\mathbf" not in tex(results)


def test_one_seed_says_so(tmp_path):
    results = comparison(tmp_path, dict(list(TOWERS.items())[:2]), seeds=(3,), pictures=4)[0]
    assert "One seed: seed noise unmeasured." in tex(results) and "\\mathbf" not in tex(results)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH; the structure is tested above")
@pytest.mark.parametrize("kind", ["special", "nothing"])
def test_latex_takes_it(results, tmp_path, kind):
    if kind == "nothing":
        results["towers"] = results["towers"][-1:]
    (tmp_path / "table.tex").write_text(tex(results))
    (tmp_path / "main.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-3000:]
    assert (tmp_path / "main.pdf").stat().st_size > 5000
