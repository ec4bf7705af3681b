"""From evaluation files of runs to a comparison's scores and pairs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from llava.compare.answers import read_answers
from llava.compare.scores import image_groups, read_scores
from llava.compare.statistics import estimate, share_interval, summarise
from llava.errors import LlavaError

IMAGES = [f"{at // 3}.png" for at in range(36)] + [None] * 4  # three questions an image, and four without one
KINDS = ["one", "two", "three"] * 12 + ["text"] * 4


def exact_match(seed: int, share: float, blank: float | None = 0.1) -> dict:
    """An evaluation file with made-up answers, as llava.eval.exact_match writes it."""
    correct = np.random.default_rng(seed).random(40) < share
    questions = [
        {
            "id": f"r{at // 3}",
            "kind": KINDS[at],
            "image": IMAGES[at],
            "question": f"what is {at}?",
            "answer": "yes",
            "prediction": "yes" if right else "no",
            "correct": bool(right),
        }
        for at, right in enumerate(correct)
    ]
    content = {"exact_match": float(correct.mean()), "n": 40, "questions": questions, "image_folder": "pictures"}
    if blank is not None:
        by_kind = {"one": {"exact_match": blank, "n": 12, "chance": 0.1}}
        content["blank_images"] = {"exact_match": blank, "n": 36, "by_kind": by_kind}
    return content


def write(folder, name: str, content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"eval_{name}.json").write_text(text)


@pytest.fixture
def runs(tmp_path):
    """Three towers of 2, 3 and 2 seeds."""
    found = {}
    for number, (name, seeds) in enumerate({"clip": (0, 1), "siglip": (0, 1, 2), "vit": (0, 5)}.items()):
        for seed in seeds:
            folder = tmp_path / name / f"seed_{seed}"
            write(folder, "heldout", exact_match(10 * number + seed, 0.9 - 0.3 * number))
            found.setdefault(name, {})[seed] = folder
    return found


def load(runs, tower: str, seed: int, name: str = "heldout") -> dict:
    return json.loads((runs[tower][seed] / f"eval_{name}.json").read_text())


def change(runs, tower: str, seed: int, edit, name: str = "heldout") -> None:
    content = load(runs, tower, seed, name)
    edit(content)
    write(runs[tower][seed], name, content)


# --- exact match ------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_files(runs):
    found = read_scores(runs, [SimpleNamespace(name="heldout")])
    for tower, seeds in runs.items():
        row = found.scores[tower]["heldout"]
        files = [load(runs, tower, seed) for seed in seeds]
        assert row["per_seed"] == {str(seed): file["exact_match"] for seed, file in zip(seeds, files, strict=True)}
        assert row["mean"] == pytest.approx(np.mean([file["exact_match"] for file in files]))
        assert row["n"] == 40 and 0 <= row["low"] < row["mean"] < row["high"] <= 1
        ones = [q["correct"] for file in files for q in file["questions"] if q["kind"] == "one"]
        assert row["by_kind"]["one"] == {"mean": pytest.approx(np.mean(ones)), "n": 12}
        assert row["by_kind"]["text"]["n"] == 4
        assert row["blank"] == {
            "mean": pytest.approx(0.1),
            "by_kind": {"one": {"mean": pytest.approx(0.1), "chance": 0.1}},
        }
    assert found.notes == []
    json.dumps([found.scores, found.pairs, found.detectable, found.groups], allow_nan=False)


def test_pairs_are_compared_over_images(runs):
    """The numbers are those of the statistics with questions of one image in one group, adjusted over all pairs."""
    found = read_scores(runs, ["heldout"])
    groups = [at // 3 for at in range(36)] + [12, 13, 14, 15]
    sizes = np.bincount(groups)
    summaries = {
        tower: summarise(
            [np.bincount(groups, [q["correct"] for q in load(runs, tower, seed)["questions"]]) for seed in seeds], sizes
        )
        for tower, seeds in runs.items()
    }
    assert [(pair["a"], pair["b"]) for pair in found.pairs] == [("clip", "siglip"), ("clip", "vit"), ("siglip", "vit")]
    for pair in found.pairs:
        expected = estimate(summaries[pair["a"]], summaries[pair["b"]], sizes)
        assert pair["difference"] == pytest.approx(float(expected.value))
        assert (pair["low"], pair["high"]) == pytest.approx(
            (max(-1, float(expected.low)), min(1, float(expected.high)))
        )
        assert pair["p"] == float(expected.p) and pair["p_holm"] >= pair["p"]
        assert pair["significant"] is (pair["p_holm"] < 0.05)
    smallest = min(found.pairs, key=lambda pair: pair["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 3 * smallest["p"]))
    assert found.detectable["heldout"] > 0
    low, high = share_interval(estimate(summaries["vit"], None, sizes), len(sizes))
    row = found.scores["vit"]["heldout"]
    assert (row["low"], row["high"]) == (float(low), float(high))


def test_holm_is_over_the_pairs_of_all_evaluations(runs):
    for seeds in runs.values():
        for seed, folder in seeds.items():
            write(folder, "other", exact_match(100 + seed, 0.5))
    found = read_scores(runs, ["heldout", "other"])
    assert len(found.pairs) == 6
    smallest = min(found.pairs, key=lambda pair: pair["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 6 * smallest["p"]))


def test_a_clear_difference_is_marked(tmp_path):
    runs = {}
    for tower, share in (("good", 0.97), ("bad", 0.02)):
        for seed in range(4):
            runs.setdefault(tower, {})[seed] = tmp_path / tower / str(seed)
            write(runs[tower][seed], "heldout", exact_match(seed, share))
    pair = read_scores(runs, ["heldout"]).pairs[0]
    assert pair["significant"] is True and pair["low"] > 0.5


def test_one_seed_has_no_p_value_and_says_so(runs):
    single = {tower: dict(list(seeds.items())[:1]) for tower, seeds in runs.items()}
    found = read_scores(single, ["heldout"])
    assert all(pair["p"] is None and pair["p_holm"] is None and pair["significant"] is False for pair in found.pairs)
    assert all(pair["low"] < pair["difference"] < pair["high"] for pair in found.pairs)  # over images
    assert found.detectable == {"heldout": None}
    assert found.notes == [
        "one seed: seed noise unmeasured; intervals are over images alone, and no difference is marked as significant"
    ]
    mixed = read_scores(runs | {"clip": {0: runs["clip"][0]}}, ["heldout"])
    assert [pair["p"] is None for pair in mixed.pairs] == [True, True, False]
    assert "one seed of clip: seed noise unmeasured" in mixed.notes[0] and mixed.detectable["heldout"] > 0


def test_a_run_without_the_file_has_no_part(runs):
    (runs["siglip"][2] / "eval_heldout.json").unlink()
    (runs["clip"][0] / "eval_heldout.json").unlink()
    (runs["clip"][1] / "eval_heldout.json").unlink()
    found = read_scores(runs, ["heldout"])
    assert found.scores["clip"] == {} and len(found.pairs) == 1
    assert list(found.scores["siglip"]["heldout"]["per_seed"]) == ["0", "1"]
    assert read_scores({"none": {}}, ["heldout"]).pairs == []


def test_all_right_in_every_run_is_not_certain(tmp_path):
    runs = {"best": {seed: tmp_path / str(seed) for seed in (0, 1)}}
    for folder in runs["best"].values():
        write(folder, "heldout", exact_match(0, 2.0))
    row = read_scores(runs, ["heldout"]).scores["best"]["heldout"]
    assert (row["mean"], row["high"]) == (1, 1) and row["low"] == pytest.approx(0.025 ** (1 / 16))


def test_details_and_rows(runs):
    found = read_scores(runs, ["heldout"])
    details = found.details["heldout"]
    assert details["image_folder"] == "pictures" and len(details["questions"]) == 40
    for at, question in enumerate(details["questions"]):
        told = load(runs, "siglip", 2)["questions"][at]
        assert question["key"] == at and question["image"] == told["image"] and question["answer"] == "yes"
        assert question["predictions"]["siglip"]["2"] == told["prediction"]
        assert question["correct"]["siglip"]["2"] is told["correct"]
    rows = [row for row in found.rows if row[:2] == ("vit", 5)]
    assert [row[2:4] for row in rows] == [("heldout", kind) for kind in ("all", "one", "two", "three", "text")]
    assert rows[0][4:] == (load(runs, "vit", 5)["exact_match"], 40)
    texts = [q["correct"] for q in load(runs, "vit", 5)["questions"] if q["kind"] == "text"]
    assert rows[-1][4:] == (np.mean(texts), 4)


def test_image_groups():
    assert image_groups(["a", "b", "a", None, None, ["c"], "c"]) == [0, 1, 0, 2, 3, 4, 4]
    # two lists that share an image, and what is asked about either
    assert image_groups([["a", "b"], "c", ["b", "c"], "d", "a", []]) == [0, 0, 0, 1, 0, 2]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["questions"].pop(), "has 39 questions, expected the 40 of"),
        (lambda c: c["questions"][7].update(id="x"), r"question 7 \(id x\): id is 'x', expected 'r2' as in"),
        (lambda c: c["questions"][7].update(question="why?"), r"question 7 \(id r2\): question is 'why\?', expected"),
        (lambda c: c["questions"][7].update(answer="no"), "answer is 'no', expected 'yes'"),
        (lambda c: c["questions"][7].update(image="9.png"), "image is '9.png', expected '2.png'"),
        (lambda c: c["questions"][7].pop("correct"), "a question lacks 'correct'"),
        (lambda c: c["questions"].clear(), "has no questions"),
        (lambda c: c.pop("questions"), "has no questions"),
        (lambda c: c.update(kind="lmms_eval", tasks={}), "are of kinds"),
    ],
)
def test_runs_that_were_not_asked_the_same_are_refused(runs, edit, message):
    change(runs, "siglip", 1, edit)
    with pytest.raises(LlavaError, match=message) as error:
        read_scores(runs, ["heldout"])
    assert "eval_heldout.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"questions": [', "[]", '{"kind": "other", "questions": []}'])
def test_a_file_that_is_none(runs, text):
    write(runs["vit"][5], "heldout", text)
    with pytest.raises(LlavaError, match=r"vit.seed_5.eval_heldout.json: .*expected"):
        read_scores(runs, ["heldout"])


# --- lmms-eval --------------------------------------------------------------------------------------------------------


def lmms(seed: int, share: float, factor: float = 1, samples: bool = True, images: bool = False) -> dict:
    values = (np.random.default_rng(seed).random(30) < share).astype(float)
    rows = [{"id": str(at), "image": f"{at // 2}.png" if images else None, "score": v} for at, v in enumerate(values)]
    if seed % 2:
        rows = rows[::-1]  # another order, as several processes may write it
    tasks = {"gqa": {"metric": "exact", "score": factor * values.mean(), "n": 30}}
    tasks["mme"] = {"metric": "sum", "score": 1200.0 + seed, "n": 30}
    return {"kind": "lmms_eval", "tasks": tasks} | ({"samples": {"gqa": rows}} if samples else {})


@pytest.fixture
def tasks(tmp_path):
    found = {}
    for number, tower in enumerate(("clip", "siglip")):
        for seed in (0, 1):
            found.setdefault(tower, {})[seed] = tmp_path / tower / str(seed)
            write(found[tower][seed], "bench", lmms(10 * number + seed, 0.8 - 0.4 * number))
    return found


def test_a_task_with_scores_of_single_questions_is_compared(tasks):
    found = read_scores(tasks, ["bench"])
    pair = next(pair for pair in found.pairs if pair["evaluation"] == "gqa")
    assert pair["low"] < pair["difference"] < pair["high"] and 0 < pair["p"] <= pair["p_holm"] < 1
    row = found.scores["clip"]["gqa"]
    assert row["per_seed"] == {
        str(seed): load(tasks, "clip", seed, "bench")["tasks"]["gqa"]["score"] for seed in (0, 1)
    }
    assert row["by_kind"] == {} and "blank" not in row and found.details == {}
    assert ("clip", 1, "gqa", "all", row["per_seed"]["1"], 30) in found.rows
    assert any(note.startswith("gqa: which questions share an image is not known") for note in found.notes)
    json.dumps([found.scores, found.pairs, found.detectable], allow_nan=False)


def test_questions_of_a_task_are_told_apart_by_their_ids(tasks):
    """Runs that write them in another order are compared question by question: the pair is that of one order."""
    mixed = read_scores(tasks, ["bench"]).pairs[0]
    for seeds in tasks.values():
        for folder in seeds.values():
            content = json.loads((folder / "eval_bench.json").read_text())
            content["samples"]["gqa"].sort(key=lambda row: int(row["id"]))
            write(folder, "bench", content)
    assert read_scores(tasks, ["bench"]).pairs[0] == mixed


def test_a_task_in_per_cent(tasks):
    plain = read_scores(tasks, ["bench"]).pairs[0]
    for number, seeds in enumerate(tasks.values()):
        for seed, folder in seeds.items():
            write(folder, "bench", lmms(10 * number + seed, 0.8 - 0.4 * number, factor=100))
    pair = read_scores(tasks, ["bench"]).pairs[0]
    assert pair["p"] == pytest.approx(plain["p"])
    for key in ("difference", "low", "high"):
        assert pair[key] == pytest.approx(100 * plain[key])


def test_a_task_of_questions_on_images(tasks):
    for number, seeds in enumerate(tasks.values()):
        for seed, folder in seeds.items():
            write(folder, "bench", lmms(10 * number + seed, 0.8 - 0.4 * number, images=True))
    assert not any("share an image" in note for note in read_scores(tasks, ["bench"]).notes)


def test_a_task_without_scores_of_single_questions_has_no_p_value(tasks):
    found = read_scores(tasks, ["bench"])
    pair = next(pair for pair in found.pairs if pair["evaluation"] == "mme")
    assert pair["difference"] == -10 and pair["significant"] is False
    assert {pair[key] for key in ("low", "high", "p", "p_holm")} == {None}
    row = found.scores["siglip"]["mme"]
    assert row["mean"] == 1210.5 and row["low"] is None and found.detectable["mme"] is None
    assert "mme: no scores of single questions (--log_samples): no intervals and no p values" in found.notes


def test_a_score_that_is_no_mean_of_its_questions(tasks):
    change(tasks, "clip", 0, lambda c: c["tasks"]["gqa"].update(score=0.123), "bench")
    found = read_scores(tasks, ["bench"])
    assert found.scores["clip"]["gqa"]["per_seed"]["0"] == 0.123 and found.pairs[0]["p"] is None
    assert any("gqa: the score is not the mean of its questions' scores" in note for note in found.notes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["tasks"]["gqa"].update(metric="other"), "task gqa: metric is 'other', expected 'exact'"),
        (lambda c: c["tasks"]["gqa"].update(n=29), "task gqa: n is 29, expected 30"),
        (lambda c: c["tasks"]["mme"].update(score=None), "task mme: score is None, expected a number"),
        (lambda c: c["samples"]["gqa"].pop(), "task gqa: has 29 questions, expected the 30"),
        (lambda c: c["samples"]["gqa"][0].update(score=float("nan")), "score of a question is nan, expected a number"),
        (lambda c: c["samples"]["gqa"][0].update(id="99"), "task gqa: question 0"),
    ],
)
def test_tasks_that_do_not_compare_are_refused(tasks, edit, message):
    change(tasks, "siglip", 0, edit, "bench")
    with pytest.raises(LlavaError, match=message):
        read_scores(tasks, ["bench"])


def test_two_evaluations_of_one_name(tasks):
    for seeds in tasks.values():
        for folder in seeds.values():
            write(folder, "gqa", exact_match(0, 0.5))
    with pytest.raises(LlavaError, match="gqa: two evaluations or tasks have this name"):
        read_scores(tasks, ["bench", "gqa"])


def test_groups_are_means_where_all_members_are_there(tasks):
    change(tasks, "siglip", 0, lambda c: c["tasks"].pop("mme"), "bench")
    change(tasks, "siglip", 1, lambda c: c["tasks"].pop("mme"), "bench")
    found = read_scores(tasks, ["bench"], {"General": ["gqa", "mme"], "Alone": ["gqa"], "Never": ["x"]})
    rows = found.scores["clip"]
    assert found.groups["clip"]["General"] == pytest.approx((rows["gqa"]["mean"] + rows["mme"]["mean"]) / 2)
    assert found.groups["siglip"] == {"General": None, "Alone": found.scores["siglip"]["gqa"]["mean"], "Never": None}
    assert "siglip: no mean of General, since mme is missing" in found.notes


def test_answers_come_in_the_order_of_the_evaluations(tasks):
    for seeds in tasks.values():
        for folder in seeds.values():
            write(folder, "heldout", exact_match(0, 0.5))
    assert [answers.name for answers in read_answers(tasks, ["heldout", "bench"])] == ["heldout", "gqa", "mme"]
