"""The report: what it shows, its size, its colours, and what bad input says."""

import json

import pytest
from PIL import Image

from llava.drawing import page
from llava.errors import LlavaError
from llava.eval import report


def question(number: int, kind: str, correct: bool, image: str | None = "a.png") -> dict:
    prediction = "7" if correct else "3"
    return {
        "id": f"q{number}",
        "kind": kind,
        "image": image,
        "question": "Which digit is at the far left of this picture, if there is one?",
        "answer": "7",
        "prediction": prediction,
        "correct": correct,
    }


@pytest.fixture
def run(tmp_path):
    """A finished run's folder: the evaluation, a picture, two stages."""
    Image.new("RGB", (60, 40), (122, 116, 104)).save(tmp_path / "a.png")
    questions = [question(i, ("left", "right")[i % 2], i % 3 > 0) for i in range(50)]
    questions += [question(90, "text", True, None)]
    kinds = {kind: {"exact_match": 0.6, "n": 25} for kind in ("left", "right", "text")}
    result = {"exact_match": 0.667, "n": 51, "by_kind": kinds, "questions": questions, "image_folder": str(tmp_path)}
    for stage, steps in (("pretrain", 400), ("finetune", 30)):
        (tmp_path / stage).mkdir()
        history = [{"step": step, "loss": 5 / step**0.5} for step in range(1, steps + 1)] + [{"step": steps}]
        (tmp_path / stage / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "finetune" / "eval.json").write_text(json.dumps(result))
    return tmp_path


def colours(path) -> tuple[tuple[int, int], set[tuple[int, int, int]]]:
    with Image.open(path) as image:
        return image.size, {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_report_of_a_run_folder(run):
    report.main(["--model-path", str(run / "finetune")])
    size, found = colours(run / "finetune" / "report.png")
    rows_height = report.HEADER + report.ROWS * report.CELL_HEIGHT
    assert size[0] == page.WIDTH and size[1] > rows_height + report.PANEL_HEIGHT
    assert {page.GREEN, page.RED, page.BLUE, (122, 116, 104)} <= found


def test_report_of_named_files(run):
    arguments = ["--eval-json", str(run / "finetune" / "eval.json"), "--output", str(run / "deep" / "r.png")]
    report.main(arguments)
    without, found = colours(run / "deep" / "r.png")
    assert page.BLUE not in found
    report.main([*arguments, "--stage", str(run / "pretrain" / "trainer_state.json")])
    size, found = colours(run / "deep" / "r.png")
    assert page.BLUE in found and size[1] > without[1]


def test_the_sample_is_fair():
    questions = [question(i, "many", True) for i in range(100)] + [question(i, "few", False) for i in range(100, 103)]
    chosen = report.choose(questions, 12)
    assert len({each["id"] for each in chosen}) == len(chosen) == 12
    assert sum(each["kind"] == "few" for each in chosen) == 3
    assert [each["id"] for each in chosen if each["kind"] == "many"][-1] == "q88"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("{", "other than JSON"), ('{"log_history": [{"step": 1}]}', "no loss")],
)
def test_a_bad_state_is_named(tmp_path, content, said):
    path = tmp_path / "trainer_state.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LlavaError, match=said) as caught:
        report.loss_curve(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
