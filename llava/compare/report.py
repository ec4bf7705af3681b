"""The report of a comparison: Markdown, one HTML page, a table of numbers, a paper's table, and two pictures."""

import csv
import io
import os
from pathlib import Path

from llava.compare import report_content, report_html, report_markdown, report_pictures, report_questions, report_tex
from llava.compare.report_numbers import evaluations, finite, score


def write_report(folder, results: dict, details: dict) -> list[Path]:
    """Write report.md, report.html, results.csv, table.tex, accuracy_vs_tokens.png and by_kind.png.

    The same input gives the same text; each file is replaced as a whole.

    Args:
        folder: made where it is missing.
        results: the content of `results.json`.
        details: {evaluation: {"image_folder", "questions"}} of the evaluations whose answers are known, as
            `report_content.build` says.

    Returns: the files, in the order above.

    Raises:
        LlavaError: matplotlib is not installed.
    """
    pictures = {
        "accuracy_vs_tokens.png": report_pictures.accuracy_vs_tokens(results),
        "by_kind.png": report_pictures.by_kind(results),
    }
    title, sections = report_content.build(results, details)
    questions = report_questions.embedded(details, [tower["name"] for tower in results["towers"]])
    texts = {
        "report.md": report_markdown.markdown(title, sections),
        "report.html": report_html.page(title, sections, pictures, questions),
        "results.csv": table(results, details),
        "table.tex": report_tex.tex(results),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # what UTF-8 has no form for (half of a pair of surrogates) becomes a question mark
    contents = {name: text.encode("utf-8", "replace") for name, text in texts.items()} | pictures
    return [_replace(folder / name, content) for name, content in contents.items()]


def _replace(path: Path, content: bytes) -> Path:
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
    return path


def table(results: dict, details: dict) -> str:
    """The content of `results.csv`: a row for each tower, seed and evaluation (kind `all`), and for each kind.

    Where the answers of single questions are not known, a kind has its mean over seeds alone, and no seed.
    """
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["tower", "seed", "evaluation", "kind", "score", "n"])
    for tower in results["towers"]:
        for name in evaluations(results):
            found, known = score(tower, name), by_seed_and_kind(details.get(name), tower["name"])
            for seed, value in (found.get("per_seed") or {}).items():
                rows.writerow([tower["name"], seed, name, "all", known_or_empty(value), found.get("n")])
                for kind, answers in known.get(str(seed), {}).items():
                    if kind is None:
                        continue
                    rows.writerow([tower["name"], seed, name, kind, sum(answers) / len(answers), len(answers)])
            if not known:
                for kind, row in (found.get("by_kind") or {}).items():
                    rows.writerow([tower["name"], "", name, kind, known_or_empty(row.get("mean")), row.get("n")])
    return file.getvalue()


def known_or_empty(value):
    return value if finite(value) else ""


def by_seed_and_kind(content: dict | None, tower: str) -> dict[str, dict[str, list[bool]]]:
    """{seed: {kind: whether each answer is correct}} of a tower, of what is known of single questions."""
    found: dict[str, dict[str, list[bool]]] = {}
    for question in content["questions"] if content else ():
        for seed, correct in (question["correct"].get(tower) or {}).items():
            found.setdefault(str(seed), {}).setdefault(question.get("kind"), []).append(bool(correct))
    return found
