"""The table of a comparison for a paper, in LaTeX."""

import re

from llava.compare import report_numbers as numbers
from llava.compare.report_numbers import Unit, count, digits, evaluations, plain, score, unit

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}


def escape(text) -> str:
    """Text on one line that LaTeX sets as it is; what its fonts have no letter for is a question mark."""
    words = " ".join("".join(mark if mark.isprintable() else " " for mark in str(text)).split())
    return "".join(_SPECIAL.get(mark, mark if ord(mark) < 0x180 else "?") for mark in words)


def interval(shown: Unit, row: dict, bold: bool) -> str:
    """Mean plus or minus half of the interval's width."""
    if not numbers.finite(row.get("mean")):
        return "--"
    mean = f"\\mathbf{{{shown.show(row['mean'])}}}" if bold else shown.show(row["mean"])
    if not (numbers.finite(row.get("low")) and numbers.finite(row.get("high"))):
        return f"${mean}$"
    return f"${mean} \\pm {shown.show((row['high'] - row['low']) / 2)}$"


# (title, key, how it is written, divisor)
COSTS = [
    ("Tokens", "visual_tokens", count, 1),
    ("Params (M)", "tower_params", digits, 1e6),
    ("TTFT (ms)", "ttft_ms", digits, 1),
]


def columns(results: dict, towers: list[dict]) -> list[tuple[str, list[str]]]:
    """(title, cells) of each column."""
    found = [("Tower", [escape(tower["name"]) for tower in towers])]
    for title, key, show, divisor in COSTS:
        values = [numbers.cost(tower, key) for tower in towers]
        if any(value is not None for value in values):
            found.append((title, ["--" if v is None else show(v / divisor).replace(",", "{,}") for v in values]))
    for name in evaluations(results):
        shown, first = unit(results, name), numbers.best(results, name)
        cells = [interval(shown, score(tower, name), tower["name"] == first) for tower in towers]
        found.append((escape(shown.title(name)), cells))
    return found


def tex(results: dict) -> str:
    """The whole of `table.tex`; towers without a score are left out, and named in a comment."""
    towers = [tower for tower in results["towers"] if tower.get("scores")]
    titles, cells = zip(*columns(results, towers), strict=True)
    label = re.sub(r"[^A-Za-z0-9-]+", "-", str(results["name"])).strip("-")
    several = any("\\pm" in cell for column in cells for cell in column)
    words = f"Comparison of vision towers ({escape(results['name'])}): "
    words += "mean $\\pm$ half of the width of the 95\\% interval. " if several else "means. "
    if numbers.several_seeds(results):
        words += "Bold: differs from every other tower after Holm's correction."
    else:
        words += "One seed: seed noise unmeasured."
    lines = ["% Needs \\usepackage{booktabs}."]
    for tower in results["towers"]:
        if tower not in towers:
            lines.append(f"% Not in the table: {escape(tower['name'])} ({escape(plain(tower['status']))}).")
    lines += ["\\begin{table}[t]", "\\centering", "\\small", "\\setlength{\\tabcolsep}{4pt}", f"\\caption{{{words}}}"]
    lines += [f"\\label{{tab:{label}}}", f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", "\\toprule"]
    lines += [f"{' & '.join(titles)} \\\\", "\\midrule"]
    lines += [f"{' & '.join(row)} \\\\" for row in zip(*cells, strict=True)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"
