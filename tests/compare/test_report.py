"""What a comparison's report says: the numbers of its results, of whatever there is, and never a "nan"."""

import csv
import io
import itertools
import math
import random
import re
import sys

import pytest
from PIL import Image

from llava.compare import report_numbers as numbers
from llava.compare import report_questions
from llava.compare.report import write_report
from llava.compare.report_content import Strong, build
from llava.compare.report_markdown import markdown
from llava.errors import LlavaError
from tests.compare.fake_comparison import KINDS, TOWERS, comparison, failed_tower

FILES = [
    "report.md",
    "report.html",
    "results.csv",
    "table.tex",
    "accuracy_vs_tokens.png",
    "by_kind.png",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the report, results, details)."""
    folder = tmp_path_factory.mktemp("report")
    results, details = comparison(folder / "pictures")
    results["towers"].append(failed_tower("pixtral"))
    assert sorted(write_report(folder / "out", results, details)) == sorted(folder / "out" / name for name in FILES)
    return folder / "out", results, details


def text_of(results: dict, details: dict | None = None) -> str:
    return markdown(*build(results, details or {}))


def table(text: str, caption: str) -> list[dict[str, str]]:
    """Rows of a Markdown table as {heading: cell}."""
    lines = text[text.index(f"**{caption}**") :].split("\n\n")[1].splitlines()
    head, _, *rows = [[cell.strip().strip("*") for cell in line[2:-2].split(" | ")] for line in lines]
    assert all(len(row) == len(head) for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_main_tables_numbers_are_the_results(made):
    rows = table((made[0] / "report.md").read_text(), "Each tower's scores and costs")
    for row, tower in zip(rows[:-1], made[1]["towers"], strict=False):
        found, cost = tower["scores"]["heldout"], tower["cost"]
        assert row["tower"] == tower["name"] and row["status"] == "finished" and row["seeds"] == "2 of 2"
        expected = [f"{100 * found[key]:.1f}" for key in ("mean", "low", "high")]
        assert re.findall(r"[\d.]+", row["heldout, % (n 120)"]) == expected
        assert row["heldout, blank pictures, %"] == f"{100 * found['blank']['mean']:.1f}"
        assert float(row["visual tokens"]) == cost["visual_tokens"]
        millions = {"tower": "tower_params", "all": "total_params", "trained": "trained_params"}
        for title, key in millions.items():
            assert float(row[f"{title}, M parameters"]) == pytest.approx(cost[key] / 1e6, rel=5e-3)
        assert float(row["tower GFLOPs"]) == pytest.approx(cost["tower_gflops"], rel=5e-3)
        spreads = {"time to first token, ms": "ttft_ms", "training samples/s": "train_samples_per_s"}
        for title, key in (spreads | {"peak memory, MB": "peak_memory_mb"}).items():
            shown = [float(value) for value in re.findall(r"[\d.]+", row[title])]
            assert shown == pytest.approx([cost[key][part] for part in ("median", "p25", "p75")], rel=5e-3)
    assert set(rows[-1].values()) == {"pixtral", "failed", "0 of 2", "–"}


def test_the_pairs_numbers_are_the_results(made):
    text = (made[0] / "report.md").read_text()
    rows = table(text, "Pairs of towers in heldout")
    marks = 0
    for row, pair in zip(rows, made[1]["pairs"], strict=True):
        assert row["pair"] == f"{pair['a']} minus {pair['b']}"
        expected = [f"{100 * pair[key]:+.1f}" for key in ("difference", "low", "high")]
        assert re.findall(r"[-+][\d.]+", row["difference in points [95% interval]"]) == expected
        for title, key in (("p", "p"), ("p after Holm", "p_holm")):
            assert row[title] == (f"{pair[key]:.3f}" if pair[key] >= 0.001 else "&lt;0.001")
        better = pair["a"] if pair["difference"] > 0 else pair["b"]
        assert row["verdict"] == (f"{better} is better" if pair["significant"] else "no difference shown")
        marks += pair["significant"]
    assert 0 < marks < len(rows)
    assert "could have shown in heldout: 3.4 points." in text


def test_the_other_tables_numbers_are_the_results(made):
    folder, results, _ = made
    text, towers = (folder / "report.md").read_text(), {tower["name"]: tower for tower in results["towers"]}
    rows = table(text, "Mean per kind of question in heldout, %")
    for row, kind in itertools.product(rows[:-2], KINDS):
        mean = towers[row["tower"]]["scores"]["heldout"]["by_kind"][kind]["mean"]
        assert row[f"{kind} (n 60)"] == f"{100 * mean:.1f} (11.0)"
    assert rows[-1] == {"tower": "chance", "left digit (n 60)": "10.3", "right digit (n 60)": "10.3"}
    for row in table(text, "Accuracy of probes on frozen features"):
        probe = towers[row["tower"]]["probe"]
        for title, key in (("linear probe", "linear"), ("attentive probe", "attentive"), ("k-NN", "knn")):
            expected = [f"{100 * value:.1f}" for value in (probe[key], *probe["intervals"][key])]
            assert re.findall(r"[\d.]+", row[f"{title}, %"]) == expected
    assert "(7 towers): Spearman 0.86 [0.20, 0.98]; too few to say." in text
    for row in table(text, "heldout: towers on the Pareto fronts"):
        assert row["heldout, %"] == f"{100 * towers[row['tower']]['scores']['heldout']['mean']:.1f}"
        assert float(row["time to first token, ms"]) == towers[row["tower"]]["cost"]["ttft_ms"]["median"]
    row = table(text, "What differs between the towers' runs")[0]
    assert {name: row[name] for name in TOWERS} == {name: f"{facts[2]:g}" for name, facts in TOWERS.items()}
    assert "](report.html)" in text and "](by_kind.png)" in text
    assert "9f2c51d07ab3" in text and "409ac5d" in text and "measured while another run was active" in text


def test_both_reports_say_the_same(made):
    """Every cell and paragraph of the content is in the page, too."""
    page = (made[0] / "report.html").read_text().replace("<wbr>", "")
    for section in build(made[1], made[2])[1]:
        assert section.title in page
        for part in section.parts:
            for row in getattr(part, "rows", ()):
                for cell in row:
                    words = cell.replace("<", "&lt;").replace("'", "&#x27;")
                    assert (f"<strong>{words}</strong>" if isinstance(cell, Strong) else f">{words}<") in page


def test_the_csv_file_has_every_seeds_score(made):
    rows = list(csv.DictReader(io.StringIO((made[0] / "results.csv").read_text())))
    assert list(rows[0]) == ["tower", "seed", "evaluation", "kind", "score", "n"]
    for tower in made[1]["towers"][:-1]:
        found = tower["scores"]["heldout"]
        mine = [row for row in rows if row["tower"] == tower["name"]]
        assert {row["seed"]: float(row["score"]) for row in mine if row["kind"] == "all"} == found["per_seed"]
        assert len(mine) == 2 * 3
        for kind in KINDS:
            scores = [float(row["score"]) for row in mine if row["kind"] == kind]
            assert sum(scores) / 2 == pytest.approx(found["by_kind"][kind]["mean"])
    without = list(csv.DictReader(io.StringIO(report_csv(made[1]))))
    assert {row["seed"] for row in without if row["kind"] == "left digit"} == {""}


def report_csv(results: dict) -> str:
    from llava.compare.report import table as written

    return written(results, {})


def test_the_same_input_gives_the_same_files(made, tmp_path):
    written = write_report(tmp_path / "again", made[1], made[2])
    for path in written:
        assert path.read_bytes() == (made[0] / path.name).read_bytes(), path.name
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(FILES)


def test_one_seed_marks_nothing(tmp_path):
    results, details = comparison(tmp_path / "pictures", seeds=(0,), pictures=20)
    for pair in results["pairs"]:
        pair["significant"] = True  # whatever is claimed
    text = text_of(results, details)
    assert "seed noise unmeasured" in text and "is better" not in text and "verdict" not in text
    assert "bold where" not in text and not any("**" in line for line in text.splitlines() if line.startswith("|"))
    assert numbers.best(results, "heldout") is None
    for pair in results["pairs"]:
        pair |= {"p": None, "p_holm": None}
    assert list(table(text_of(results), "Pairs of towers in heldout")[0])[2:] == []


def test_a_pair_without_p_is_not_tested(tmp_path):
    """As those of a tower with one seed, or of a task without scores of single questions."""
    results, _ = comparison(tmp_path / "pictures", pictures=6)
    results["pairs"][0] |= {"p": None, "p_holm": None, "significant": False}
    rows = table(text_of(results), "Pairs of towers in heldout")
    assert [rows[0][name] for name in ("p", "p after Holm", "verdict")] == ["–", "–", "not tested"]
    assert "not tested" not in {row["verdict"] for row in rows[1:]}


def test_failed_missing_and_partial_towers(tmp_path):
    results, _ = comparison(tmp_path / "pictures", pictures=10)
    results["towers"][1] |= {"status": "partial", "n_seeds": 1, "error": "seed 1: killed\nby signal 9"}
    results["towers"] += [failed_tower("lost", "missing", None), failed_tower("burnt", error="loss is | not finite")]
    text = text_of(results)
    assert "9 towers: 6 finished, 1 partial, 1 missing, 1 failed." in text
    section = text[text.index("## Runs that failed or are missing") :].split("## ")[1]
    assert "| siglip | partial | 1 of 2 | seed 1: killed by signal 9 |" in section
    assert "| lost | missing | 0 of 2 | – |" in section and r"| loss is \| not finite |" in section
    assert "clip | failed" not in section and "| clip |" not in section


@pytest.mark.parametrize("without", ["towers", "one", "cost", "probe", "scores", "optional"])
def test_less_than_everything(tmp_path, without):
    """A report is written of what there is."""
    towers = {"clip": TOWERS["clip"]} if without == "one" else dict(list(TOWERS.items())[:3])
    results, details = comparison(tmp_path / "pictures", towers, pictures=12)
    if without == "towers":
        results |= {"towers": [], "pairs": []}
        details = {}
    for tower in results["towers"]:
        if without == "cost":
            tower["cost"] = None
        elif without == "probe":
            tower["probe"] = results["probe_agreement"] = None
        elif without == "scores":
            tower |= failed_tower(tower["name"])
            results["pairs"], details = [], {}
    if without == "optional":
        wanted = ("schema", "name", "commit", "host", "match", "seeds", "towers", "pairs")
        results = {key: results[key] for key in wanted}
        for tower in results["towers"]:
            tower["scores"]["heldout"] = {"mean": 0.5, "per_seed": {"0": 0.5}}
    write_report(tmp_path / "out", results, details)
    text = (tmp_path / "out" / "report.md").read_text()
    assert ("## Accuracy against cost\n\n![" in text) is (without not in ("towers", "cost", "scores"))
    assert ("time to first token" in text) is (without not in ("towers", "cost", "scores"))
    assert ("## Probes" in text) is (without not in ("towers", "probe", "scores"))
    assert ("## Which differences hold up" in text) is (without not in ("towers", "one", "scores"))
    assert not re.search(r"\b(None|nan|inf)\b", text)
    for name in ("accuracy_vs_tokens.png", "by_kind.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 1000


def test_what_is_not_a_number_is_a_dash(tmp_path):
    results, details = comparison(tmp_path / "pictures", dict(list(TOWERS.items())[:2]), pictures=6)
    nan, (one, other) = math.nan, results["towers"]
    one["scores"]["heldout"] |= {"mean": nan, "low": nan, "high": math.inf, "per_seed": {"0": nan}}
    one["cost"] |= {"visual_tokens": nan, "ttft_ms": {"median": nan, "p25": nan, "p75": nan}, "tower_gflops": None}
    other["scores"]["heldout"] |= {"low": None, "high": None}
    results["pairs"][0] |= {"difference": nan, "low": None, "high": None, "p": None, "p_holm": None}
    results["pairs"][0] |= {"significant": False, "note": "no scores of single questions"}
    results["probe_agreement"] |= {"spearman": nan, "low": None}
    results["detectable_difference"] = {"heldout": nan}
    write_report(tmp_path / "out", results, details)
    for name in ("report.md", "report.html", "table.tex", "results.csv"):
        words = re.sub('<script>.*|data:[^"]*', "", (tmp_path / "out" / name).read_text(), flags=re.S)
        assert not re.search(r"\b(None|nan|NaN|inf)\b", words), name
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| clip minus siglip | – | not tested: no scores of single questions |" in text


def test_scores_that_are_no_shares_stay_as_they_are(tmp_path):
    results, _ = comparison(tmp_path / "pictures", dict(list(TOWERS.items())[:2]), pictures=6)
    for tower, points in zip(results["towers"], (1523.4, 1498.0), strict=True):
        tower["scores"]["mme"] = {"mean": points, "low": points - 9, "high": points + 9, "per_seed": {}, "n": 2374}
    results["pairs"].append(results["pairs"][0] | {"evaluation": "mme", "difference": 25.4, "low": 7, "high": 43.5})
    results["groups"] = {"clip": {"General": None}, "siglip": {"General": None}}
    assert "Groups of" not in text_of(results) and "mme: towers on the Pareto fronts" in text_of(results)
    results["groups"] = {"clip": {"General": 0.51}, "siglip": {"General": 0.4375}}
    text = text_of(results)
    assert table(text, "Each tower's scores and costs")[1]["mme (n 2,374)"] == "1498.0 [1489.0, 1507.0]"
    assert "| clip minus siglip | +25.4 [+7.0, +43.5] |" in text
    assert [row["General, %"] for row in table(text, "Means over the evaluations of each group")] == ["51.0", "43.8"]


def test_best_is_who_differs_from_every_other():
    towers = [
        {"name": name, "n_seeds": 2, "scores": {"e": {"mean": mean}}}
        for name, mean in zip("abc", (0.9, 0.8, 0.7), strict=True)
    ]
    pairs = [
        {"evaluation": "e", "a": "a", "b": "b", "difference": 0.1, "significant": True},
        {"evaluation": "e", "a": "c", "b": "a", "difference": -0.2, "significant": True},
        {"evaluation": "f", "a": "a", "b": "c", "difference": 0.2, "significant": True},
    ]
    results = {"towers": towers, "pairs": pairs}
    assert numbers.best(results, "e") == "a"
    for missing in pairs[:2]:
        missing["significant"] = False
        assert numbers.best(results, "e") is None
        missing["significant"] = True
    assert numbers.best(results | {"towers": towers[:1]}, "e") is None


def test_the_front_is_what_no_other_beats():
    rng = random.Random(1)
    for _ in range(200):
        points = {str(i): (rng.randrange(6), rng.randrange(6)) for i in range(rng.randrange(9))}
        expected = set()
        for name, (x, y) in points.items():
            better = [(a, b) for a, b in points.values() if (a <= x and b > y) or (a < x and b >= y)]
            expected |= set() if better else {name}
        found = numbers.front(points)
        assert set(found) == expected and [points[name][0] for name in found] == sorted(
            points[name][0] for name in found
        )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hevc_vit a_b", "hevc_vit a_b"),
        ("_emphasis_ *strong* `code`", r"\_emphasis\_ \*strong\* \`code\`"),
        ("a|b\nc", r"a\|b c"),
        ("<img src=x> & co", "&lt;img src=x&gt; &amp; co"),
        ("[x](http://y) [0.1, 0.2]", r"[x\](http://y) [0.1, 0.2]"),
        ("# no heading", r"\# no heading"),
        ("-2.5 $x$", r"-2.5 \$x\$"),
    ],
)
def test_markdown_shows_text_as_it_is(text, expected):
    from llava.compare.report_markdown import escape

    assert escape(text) == expected


def test_digits_are_honest():
    assert [numbers.digits(x) for x in (0.01234, 1.234, 12.34, 123.4, 1234.5, 49, 0, 26.0)] == [
        "0.0123", "1.23", "12.3", "123", "1,234", "49", "0", "26.0",
    ]  # fmt: skip
    assert numbers.count(49.0) == "49" and numbers.count(27.43) == "27.4"
    assert numbers.probability(0.0004) == "<0.001" and numbers.probability(1.0) == "1.000"


def test_who_reads_what(made):
    towers, questions = list(TOWERS), made[2]["heldout"]["questions"]
    found = report_questions.reads_where_not(questions, towers)
    for a, b in itertools.permutations(towers, 2):
        shares = [[sum(q["correct"][t].values()) / len(q["correct"][t]) for t in (a, b)] for q in questions]
        assert found[a, b] == sum(x > 0.5 > y for x, y in shares)
    row = table(
        (made[0] / "report.md").read_text(),
        "Questions of heldout that the row's tower gets right and the column's wrong",
    )
    assert row[0]["dinov2"] == str(found["clip", "dinov2"]) and found["clip", "dinov2"] > 5


def test_a_page_shows_some_of_every_pair(tmp_path):
    _, details = comparison(tmp_path / "pictures", pictures=300)
    found = report_questions.disagreements(details)
    chosen = report_questions.choose(found, 60)
    keys = [question["key"] for _, question in chosen]
    assert len(found) > 90 and len(keys) == 60 and keys == sorted(set(keys))
    assert max(keys) > 400  # not the first ones of the file
    before = report_questions.reads_where_not([question for _, question in found], list(TOWERS))
    after = report_questions.reads_where_not([question for _, question in chosen], list(TOWERS))
    assert all(after[pair] for pair, count in before.items() if count)
    assert report_questions.choose(found[:60], 60) == found[:60]
    data = report_questions.embedded(details, list(TOWERS), 60)
    assert (data["total"], len(data["questions"])) == (len(found), 60)


def test_pictures_in_a_page_are_small(tmp_path):
    Image.linear_gradient("L").resize((2000, 1000)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_text("no picture")
    for name in ("broken.png", "gone.png", "../large.png"):
        assert report_questions.picture_uri(str(tmp_path / "in" if ".." in name else tmp_path), name) is None
    uri = report_questions.picture_uri(str(tmp_path), "large.png")
    import base64

    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as picture:
        assert picture.size == (224, 112)
    assert len(uri) < 12_000


def test_without_matplotlib(tmp_path, monkeypatch):
    results, details = comparison(tmp_path / "pictures", dict(list(TOWERS.items())[:2]), pictures=4)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LlavaError, match="pip install matplotlib"):
        write_report(tmp_path / "out", results, details)
    assert not (tmp_path / "out").exists()
