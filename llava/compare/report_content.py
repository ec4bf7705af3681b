"""What the report of a comparison says, part by part; `report_markdown` and `report_html` write it down."""

from typing import NamedTuple

from llava.compare import report_numbers as numbers
from llava.compare.report_numbers import NONE, count, digits, evaluations, plain, probability, score, spread, unit
from llava.compare.report_questions import reads_where_not

READS = "What one tower reads and another does not"  # report_html puts its pictures below this title


class Strong(str):
    """A cell that is set in bold."""


class Table(NamedTuple):
    """The first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]

    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, which are set to the right."""
        cells = ([row[at] for row in self.rows] for at in range(len(self.columns)))
        return [
            at > 0 and all(not c or c[0] in "+-<.0123456789" + NONE for c in column) for at, column in enumerate(cells)
        ]


class Bullets(NamedTuple):
    lines: list[str]


class Picture(NamedTuple):
    """A file beside the report, and what it shows in words."""

    file: str
    words: str


class Section(NamedTuple):
    """Parts are paragraphs (str), tables, bullets and pictures."""

    title: str
    parts: list


def build(results: dict, details: dict) -> tuple[str, list[Section]]:
    """(title, sections) of the report; sections without anything to say are left out.

    Args:
        results: the content of `results.json`.
        details: {evaluation: {"image_folder", "questions": [{"key", "id", "kind", "image", "question", "answer",
            "predictions": {tower: {seed: text}}, "correct": {tower: {seed: bool}}}]}}.
    """
    found = [
        Section("", opening(results)),
        Section("What is the same and what differs", settings(results)),
        Section("Scores and costs", main_table(results)),
        Section("Runs that failed or are missing", failures(results)),
        Section("Which differences hold up", pairs(results)),
        Section("Kinds of questions", kinds(results)),
        Section("Groups of evaluations", groups(results)),
        Section("Accuracy against cost", against_cost(results)),
        Section("Probes of the frozen towers", probes(results)),
        Section(READS, reads(results, details)),
    ]
    return f"Comparison of vision towers: {results['name']}", [section for section in found if section.parts]


def opening(results: dict) -> list:
    states = [tower["status"] for tower in results["towers"]]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    seeds = results.get("seeds") or []
    lines = [
        f"{len(states)} tower{'s' if len(states) != 1 else ''}: {counted}." if states else "No towers.",
        f"Seeds: {plain(seeds)}. Matched: {plain(results.get('match'))}. "
        f"Commit: {plain(results.get('commit'))}. Host: {plain(results.get('host'))}.",
    ]
    notes = [plain(note) for note in results.get("notes") or ()]
    return [*lines, *([Bullets(notes)] if notes else [])]


def settings(results: dict) -> list:
    parts, names = [], [tower["name"] for tower in results["towers"]]
    differences = results.get("differences") or []
    if differences:
        rows = [
            [plain(row["what"]), *(plain((row.get("values") or {}).get(name)) for name in names)] for row in differences
        ]
        parts.append(Table("What differs between the towers' runs", ["what", *names], rows))
    if results.get("fixed"):
        rows = [[plain(what), plain(value)] for what, value in results["fixed"].items()]
        parts.append(Table("What is the same in all runs", ["what", "value"], rows))
    if results.get("fixed_hash"):
        parts.append(f"Hash of what is the same in all runs: {plain(results['fixed_hash'])}")
    return parts


# (title, key, how it is written, divisor)
COSTS = [
    ("visual tokens", "visual_tokens", count, 1),
    ("tower, M parameters", "tower_params", digits, 1e6),
    ("all, M parameters", "total_params", digits, 1e6),
    ("trained, M parameters", "trained_params", digits, 1e6),
    ("tower GFLOPs", "tower_gflops", digits, 1),
    ("time to first token, ms", "ttft_ms", spread, 1),
    ("training samples/s", "train_samples_per_s", spread, 1),
    ("peak memory, MB", "peak_memory_mb", spread, 1),
]


def cost_cell(tower: dict, key: str, show, divisor: float) -> str:
    value = (tower.get("cost") or {}).get(key)
    return show(value / divisor if numbers.finite(value) else value)


def score_columns(results: dict) -> list[tuple[str, list[str]]]:
    """(title, cell of each tower) of each evaluation, and of its control with blank pictures."""
    columns = []
    for name in evaluations(results):
        shown, first = unit(results, name), numbers.best(results, name)
        found = [score(tower, name) for tower in results["towers"]]
        cells = [shown.interval(row, "mean") for row in found]
        rows = zip(results["towers"], cells, strict=True)
        cells = [Strong(cell) if tower["name"] == first else cell for tower, cell in rows]
        many = numbers.amount(row.get("n") for row in found)
        columns.append((f"{shown.title(name)}{f' ({many})' if many else ''}", cells))
        blank = [(row.get("blank") or {}).get("mean") for row in found]
        if any(numbers.finite(value) for value in blank):
            columns.append((shown.title(f"{name}, blank pictures"), [shown.show(value) for value in blank]))
    return columns


def main_table(results: dict) -> list:
    towers, planned = results["towers"], len(results.get("seeds") or ())
    columns = [("tower", [tower["name"] for tower in towers]), ("status", [tower["status"] for tower in towers])]
    columns.append(("seeds", [f"{tower.get('n_seeds') or 0} of {planned}" for tower in towers]))
    if any(tower.get("learning_rate") is not None for tower in towers):
        columns.append(("learning rate", [plain(tower.get("learning_rate")) for tower in towers]))
    columns += score_columns(results)
    measured = [row for row in COSTS if any((tower.get("cost") or {}).get(row[1]) is not None for tower in towers)]
    columns += [(title, [cost_cell(tower, *how) for tower in towers]) for title, *how in measured]
    titles, cells = zip(*columns, strict=True)
    words = "Scores are means over seeds"
    if any(numbers.finite(row.get("low")) for tower in towers for row in (tower.get("scores") or {}).values()):
        words += " with 95% intervals in brackets"
    if numbers.several_seeds(results):
        words += "; bold where, after Holm's correction, the best tower of an evaluation differs from every other one"
    words += ". "
    if measured:
        words += "Costs are medians, with quartiles in brackets. Visual tokens are those of one picture. "
    words += f"{NONE} stands for what was not measured."
    rows = [list(row) for row in zip(*cells, strict=True)]
    return [Table("Each tower's scores and costs", list(titles), rows), words]


def failures(results: dict) -> list:
    bad = [tower for tower in results["towers"] if tower["status"] != "finished" or tower.get("error")]
    planned = len(results.get("seeds") or ())
    rows = [
        [tower["name"], tower["status"], f"{tower.get('n_seeds') or 0} of {planned}", plain(tower.get("error"))]
        for tower in bad
    ]
    table = Table("Towers without all of their runs", ["tower", "status", "seeds finished", "last line"], rows)
    return [table] if rows else []


def verdict(pair: dict) -> str:
    if not pair.get("significant"):
        said = "no difference shown" if numbers.finite(pair.get("p_holm")) else "not tested"
        return f"{said}: {plain(pair['note'])}" if pair.get("note") else said
    return f"{pair['a'] if pair['difference'] > 0 else pair['b']} is better"


def pairs(results: dict) -> list:
    parts, marks = [], numbers.several_seeds(results)
    detectable = results.get("detectable_difference") or {}
    for name in dict.fromkeys(pair["evaluation"] for pair in results.get("pairs") or ()):
        shown, mine = unit(results, name), [pair for pair in results["pairs"] if pair["evaluation"] == name]
        parts.append(pair_table(f"Pairs of towers in {name}", mine, shown, marks))
        if numbers.finite(detectable.get(name)):
            value = f"{shown.show(detectable[name])}{' points' if shown.sign else ''}"
            parts.append(f"The smallest difference that this design could have shown in {name}: {value}.")
    if parts and marks:
        words = (
            "A row is the first tower's score minus the second's, with an interval that takes in the noise of seeds "
        )
        words += "and of pictures; a tower is called better where p stays below 0.05 after Holm's correction over all "
        parts.insert(
            0, f"{words}pairs, and where it does not, the towers may still differ by less than could be shown."
        )
    elif parts:
        words = (
            "One seed: seed noise unmeasured. Intervals are over pictures alone: training again may move a score by "
        )
        parts.insert(0, f"{words}more, so no difference is marked.")
    return parts


def pair_table(caption: str, mine: list[dict], shown: numbers.Unit, marks: bool) -> Table:
    """Without p where none is known, and without a verdict where nothing may be marked."""
    columns = [("pair", [f"{pair['a']} minus {pair['b']}" for pair in mine])]
    title = f"difference{' in points' if shown.sign else ''} [95% interval]"
    columns.append((title, [shown.interval(pair, "difference") for pair in mine]))
    if any(numbers.finite(pair.get("p")) for pair in mine):
        columns.append(("p", [probability(pair.get("p")) for pair in mine]))
        columns.append(("p after Holm", [probability(pair.get("p_holm")) for pair in mine]))
    if marks:
        said = [Strong(verdict(pair)) if pair.get("significant") else verdict(pair) for pair in mine]
        columns.append(("verdict", said))
    titles, cells = zip(*columns, strict=True)
    return Table(caption, list(titles), [list(row) for row in zip(*cells, strict=True)])


def kinds(results: dict) -> list:
    parts = []
    for name in evaluations(results):
        table = kind_table(results, name)
        parts += [table] if table else []
    if parts and any("(" in cell for table in parts for row in table.rows for cell in row[1:]):
        parts.append("In brackets: the same questions asked with blank pictures, which shows what can be guessed.")
    if evaluations(results):
        words = "Each tower's mean score per kind of question, a panel for each kind"
        parts.append(Picture("by_kind.png", f"{words}; the tables of this report have the same numbers."))
    return parts


def kind_table(results: dict, evaluation: str) -> Table | None:
    names, shown = numbers.kinds(results, evaluation), unit(results, evaluation)
    if not names:
        return None
    columns, chances = ["tower"], ["chance"]
    found = [score(tower, evaluation) for tower in results["towers"]]
    for kind in names:
        many = numbers.amount((row.get("by_kind") or {}).get(kind, {}).get("n") for row in found)
        columns.append(f"{kind}{f' ({many})' if many else ''}")
        known = [blank_of(row, kind).get("chance") for row in found]
        chances.append(shown.show(next((value for value in known if numbers.finite(value)), None)))
    rows = []
    for tower, row in zip(results["towers"], found, strict=True):
        cells = [tower["name"]]
        for kind in names:
            cell, blank = shown.show((row.get("by_kind") or {}).get(kind, {}).get("mean")), blank_of(row, kind)
            cells.append(f"{cell} ({shown.show(blank['mean'])})" if numbers.finite(blank.get("mean")) else cell)
        rows.append(cells)
    rows += [chances] if any(cell != NONE for cell in chances[1:]) else []
    return Table(f"Mean per kind of question in {shown.title(evaluation)}", columns, rows)


def blank_of(row: dict, kind: str) -> dict:
    return ((row.get("blank") or {}).get("by_kind") or {}).get(kind) or {}


def groups(results: dict) -> list:
    found = results.get("groups") or {}
    names = list(dict.fromkeys(name for row in found.values() for name in row or ()))
    if not any(numbers.finite(value) for row in found.values() for value in (row or {}).values()):
        return []
    shown = {name: numbers.unit_of([(row or {}).get(name) for row in found.values()]) for name in names}
    rows = []
    for tower in results["towers"]:
        row = found.get(tower["name"]) or {}
        rows.append([tower["name"], *(shown[name].show(row.get(name)) for name in names)])
    columns = ["tower", *(shown[name].title(name) for name in names)]
    return [Table("Means over the evaluations of each group", columns, rows)]


def against_cost(results: dict) -> list:
    parts = []
    for title, points, shown in frontiers(results):
        rows, sides = [], [{name: row for name, row in side.items() if row} for side in points]
        fronts = [numbers.front(side) for side in sides]
        for tower in results["towers"]:
            name, cells = tower["name"], []
            for side, names, show in zip(sides, fronts, (count, digits), strict=True):
                cells += [show(side[name][0]) if name in side else NONE, "yes" if name in names else ""]
            if any(name in side for side in sides):
                mean = next(side[name][1] for side in sides if name in side)
                rows.append([name, shown.show(mean), *cells])
        columns = ["tower", shown.title(title), "visual tokens", "on the front", "time to first token, ms"]
        parts.append(Table(f"{title}: towers on the Pareto fronts", [*columns, "on the front"], rows))
    if not parts:
        return ["Costs and scores of the same tower are not both known."] if evaluations(results) else []
    words = "Scores over visual tokens and over the time to the first token, with the Pareto front of each"
    words = f"{words}: the towers that no other one beats in both."
    return [Picture("accuracy_vs_tokens.png", words), *parts]


def frontiers(results: dict) -> list[tuple[str, list[dict[str, tuple[float, float] | None]], numbers.Unit]]:
    """(title, [{tower: (visual tokens, score)}, {tower: (ms to the first token, score)}], unit) of each group, or where
    there are none of each evaluation; those alone where a cost and a score of one tower are known."""
    grouped = results.get("groups") or {}
    known = ((name, value) for row in grouped.values() for name, value in (row or {}).items())
    titles = list(dict.fromkeys(name for name, value in known if numbers.finite(value)))
    found = []
    for title in titles or evaluations(results):
        sides = []
        for key in ("visual_tokens", "ttft_ms"):
            side = {}
            for tower in results["towers"]:
                name = tower["name"]
                y = (grouped.get(name) or {}).get(title) if titles else score(tower, title).get("mean")
                x = numbers.cost(tower, key)
                if x is not None and numbers.finite(y):
                    side[name] = (x, y)
            sides.append(side)
        shown = numbers.unit_of(y for side in sides for _, y in side.values()) if titles else unit(results, title)
        found += [(title, sides, shown)] if any(sides) else []
    return found


PROBES = [("linear probe", "linear"), ("attentive probe", "attentive"), ("k-NN", "knn")]


def probes(results: dict) -> list:
    towers = [tower for tower in results["towers"] if tower.get("probe")]
    used = [row for row in PROBES if any(tower["probe"].get(row[1]) is not None for tower in towers)]
    parts = []
    if used:
        rows = [[tower["name"], *(probe_cell(tower["probe"], key) for _, key in used)] for tower in towers]
        columns = ["tower", *(f"{title}, %" for title, _ in used)]
        parts.append(Table("Accuracy of probes on frozen features", columns, rows))
    said = [(tower["name"], tower["probe"].get("error") or tower["probe"].get("note")) for tower in towers]
    parts += [Bullets([f"{name}: {plain(words)}" for name, words in said if words])] if any(w for _, w in said) else []
    agreement = results.get("probe_agreement") or {}
    if agreement and used:
        many = agreement.get("n_towers", 0)
        words = f"Agreement of the probes' ranking with the trained models' ({many} tower{'s' * (many != 1)})"
        if numbers.finite(agreement.get("spearman")):
            words += f": Spearman {agreement['spearman']:.2f}"
            if numbers.finite(agreement.get("low")) and numbers.finite(agreement.get("high")):
                words += f" [{agreement['low']:.2f}, {agreement['high']:.2f}]"
        note = plain(agreement.get("note") or "").split(": ")[-1]  # how many towers has been said
        words += f"; {note}" if agreement.get("note") else ""
        parts.append(f"{words}.")
    return parts


def probe_cell(probe: dict, key: str) -> str:
    low, high = (probe.get("intervals") or {}).get(key) or (None, None)
    return numbers.PERCENT.interval({"mean": probe.get(key), "low": low, "high": high}, "mean")


def reads(results: dict, details: dict) -> list:
    parts = []
    for name, content in details.items():
        towers = [t["name"] for t in results["towers"] if any(t["name"] in q["correct"] for q in content["questions"])]
        if len(towers) < 2:
            continue
        counts = reads_where_not(content["questions"], towers)
        rows = [[a, *("" if a == b else f"{counts[a, b]:,}" for b in towers)] for a in towers]
        caption = f"Questions of {name} that the row's tower gets right and the column's wrong"
        parts.append(Table(caption, ["tower", *towers], rows))
    if parts:
        parts.append("Right or wrong is what more than half of a tower's seeds are.")
    return parts
