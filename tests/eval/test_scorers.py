"""Scorers against values worked out by hand, and the command that applies them to files."""

import json
import re
from pathlib import Path

import pytest

from llava.errors import LlavaError
from llava.eval import scorers
from llava.eval.score import evaluate, main


def ten(**counts) -> list[str]:
    """The answers of ten people: each text as often as its number says."""
    answers = [text for text, count in counts.items() for _ in range(count)]
    assert len(answers) == 10
    return answers


def test_exact_match_is_blind_to_blanks_at_the_ends_only():
    assert scorers.exact_match(" 7\n", "7") == 1.0
    assert scorers.exact_match("Yes", "yes") == 0.0
    assert scorers.exact_match("7.", "7") == 0.0


@pytest.mark.parametrize(
    ("said", "score"),
    [
        # of ten subsets of nine, those that leave one of the matching people out have one match less
        (0, 0.0),
        (1, 0.3),  # (9 * 1/3 + 1 * 0) / 10
        (2, 0.6),  # (8 * 2/3 + 2 * 1/3) / 10
        (3, 0.9),  # (7 * 1 + 3 * 2/3) / 10
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_over_the_ten_subsets(said, score):
    answers = ["red"] * said + [f"other{i}" for i in range(10 - said)]
    assert scorers.vqa_accuracy("red", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("a red, blue", "red blue"),
        ("Two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Im", "im"),  # the table's "Im" never meets a word in lower case
        ("lets", "lets"),
        ("shes", "shes"),
        ("hes here", "he's here"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),  # a comma in a number: marks vanish
        ("1,000-2", "10002"),
        ("red/blue", "red blue"),  # between letters a mark becomes a blank
        ("red / blue", "red blue"),
        ("red/ blue/green", "red bluegreen"),  # beside a blank somewhere: it vanishes everywhere
        ("it's", "it's"),
        ("yes\nit is", "yes it is"),
        ("  (left)  ", "left"),
    ],
)
def test_vqa_normalisation(text, normal):
    assert scorers.normalize_vqa(text) == normal


@pytest.mark.parametrize(
    ("text", "vqa", "textvqa"),  # lmms-eval 0.7.3's EvalAIAnswerProcessor: without its word_tokenize, and with it
    [
        ("1,000-2", "10002", "1000 2"),
        ("10,000?", "10000", "10000"),
        ("the cat's tail", "cat's tail", "cat 's tail"),
        ("A red/blue t-shirt?", "red blue t shirt", "red blue t shirt"),
        ("1,,000-2", "10002", "1000 2"),
        ("dont know, Im here", "don't know im here", "don't know im here"),
        ("x" + "." * 40 + "y", "x" + "." * 8 + "y", "x" + "." * 8 + "y"),
    ],
)
def test_the_two_normalisations_of_lmms_eval(text, vqa, textvqa):
    assert (scorers.normalize_vqa(text), scorers.normalize_textvqa(text)) == (vqa, textvqa)
    assert scorers.textvqa_accuracy(text, ["x"] * 6 + [text] * 4) == 1.0


def test_vqa_accuracy_normalises_both_sides():
    assert scorers.vqa_accuracy("The two.", ten(two=2, **{"2": 2, "three": 6})) == 1.0
    with pytest.raises(LlavaError, match="ten people"):
        scorers.vqa_accuracy("two", [])


def test_vqa_accuracy_of_other_numbers_of_people():
    assert scorers.vqa_accuracy("The two.", ["2"]) == 1.0 and scorers.vqa_accuracy("three", ["2"]) == 0.0
    assert scorers.vqa_accuracy("2", ["2", "two"]) == pytest.approx(1 / 3)  # each time one other agrees
    assert scorers.vqa_accuracy("2", ["2", "two", "3"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert scorers.vqa_accuracy("2", ["2"] * 4) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("gumbo", "gambol", 2),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(a, b, distance):
    assert scorers.edit_distance(a, b) == scorers.edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("Sunset Blvd", ["sunset  blvd "], 1.0),
        ("sunset bivd", ["sunset blvd"], 1 - 1 / 11),
        ("12", ["13"], 0.5),  # a similarity of exactly one half counts
        ("123", ["199"], 0.0),  # 1/3 does not
        ("kitten", ["dog", "sitting"], 1 - 3 / 7),  # the nearest answer
        ("", ["a"], 0.0),
        # lmms-eval 0.7.3's: blanks count in the length, and so does what upper case makes longer
        ("a c", ["a  b"], 0.75),
        ("abce   ", ["abcd"], 6 / 7),
        ("STRASSE 5", ["straße 5"], 7 / 9),
        ("", [""], 1.0),
    ],
)
def test_anls(said, answers, score):
    assert scorers.anls(said, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("105.1", "100", 0.0),
        ("94.9", "100", 0.0),
        ("-10.4", "-10", 1.0),
        ("10", "-10", 0.0),
        ("5%", "0.05", 1.0),
        ("5%", "5", 0.0),
        ("41%", "40%", 1.0),
        ("0", "0", 1.0),
        ("0.001", "0", 0.0),  # no relative distance to zero
        ("0.0", "0", 0.0),
        ("Blue", "blue", 1.0),
        ("blue.", "blue", 0.0),
        ("about 100", "100", 0.0),
        # lmms-eval 0.7.3's, of numbers as Python reads them
        ("1.05", "1", 0.0),  # in floating point it is more than 5% away
        ("5%%", "0.05", 1.0),
        ("1_000", "1000", 1.0),
        ("５", "5", 1.0),
        ("1,000", "1000", 0.0),
        ("−5", "-5", 0.0),
        ("-0", "0", 0.0),
        # what is not finite is text
        ("nan", "nan", 1.0),
        ("NaN", "nan", 1.0),
        ("inf", "infinity", 0.0),
        ("1e999", "inf", 0.0),
        ("1e999", "1e999", 1.0),
        ("nan%", "nan", 0.0),
        ("5", "nan", 0.0),
        ("nan", "5", 0.0),
        ("5", "inf", 0.0),
        ("-inf", "inf", 0.0),
    ],
)
def test_relaxed_accuracy(said, answer, score):
    assert scorers.relaxed_accuracy(said, answer) == score


OPTIONS = ["cat", "dog", "black cat", "It is a bird."]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("E", None),  # there are four options
        ("A. cat", "A"),
        ("(B) dog", "B"),
        ("B) because it barks", "B"),
        ("C: black", "C"),
        ("The answer is A", "A"),
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("I thought of (A), but the answer is B because it barks.", "B"),
        ("The answer is C or the answer is B", None),
        ("The answer is B or C", None),
        ("The answer is (A) or (C)", None),
        ("The answer is A dog", "B"),  # an article, then the text of an option
        ("A dog", "B"),
        ("dog", "B"),
        ("Cat.", "A"),
        ("it is a bird", "D"),
        ("I see a black cat", "C"),  # "cat" is part of it
        ("I see (B) there", "B"),
        ("(A) or (B)?", None),
        ("Maybe (A), maybe (B)", None),
        ("a cat and a dog", None),
        ("dogs", None),  # another word
        ("", None),
        ("nothing of these", None),
    ],
)
def test_chosen_letter(said, letter):
    assert scorers.chosen_letter(said, OPTIONS) == letter


def test_multiple_choice_takes_letter_or_text_as_the_truth():
    assert scorers.multiple_choice("(B)", "B", OPTIONS) == scorers.multiple_choice("(B)", "dog", OPTIONS) == 1.0
    assert scorers.multiple_choice("A", "b", OPTIONS) == 0.0
    with pytest.raises(LlavaError, match="'fish'"):
        scorers.multiple_choice("A", "fish", OPTIONS)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_are_scored(tmp_path, capsys):
    answers = write(
        tmp_path / "a.jsonl",
        [
            {"question_id": 1, "prompt": "What colour?", "text": "red"},
            {"question_id": 2, "prompt": "How many?", "text": "two"},
        ],
    )
    people = [{"answer": "red", "answer_id": i} for i in range(3)] + [{"answer": "blue"}] * 7
    references = tmp_path / "r.json"
    references.write_text(
        json.dumps(
            [
                {"question_id": 2, "answers": ["2"] * 10, "category": "count"},
                {"question_id": 1, "answers": people, "category": "colour"},
                {"question_id": 3, "answers": ["x"] * 10, "category": "colour"},
            ]
        )
    )
    with pytest.raises(SystemExit) as caught:
        main(["--answers", answers, "--references", str(references), "--metric", "vqa", "--output", f"{tmp_path}/o"])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "vqa: 0.6333 (n=3, 1 without an answer)"  # (1 + 0.9 + 0) / 3
    errors = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert caught.value.code == 1 and len(errors) == 1
    assert "1 of 3 references have no answer (first: question 3)" in errors[0]
    result = json.loads((tmp_path / "o").read_text())
    assert [row["score"] for row in result["rows"]] == pytest.approx([1.0, 0.9, 0.0])
    assert result["by_category"] == {"colour": {"score": pytest.approx(0.45), "n": 2}, "count": {"score": 1.0, "n": 1}}


@pytest.mark.parametrize(
    ("metric", "row", "score"),
    [
        ("exact", {"answers": ["two", "red"]}, 1.0),
        ("vqa", {"answer": "The red"}, 1.0),
        ("vqa", {"answers": ["red"]}, 1.0),
        ("vqa", {"answers": [{"answer": "red"}] * 3 + [{"answer": "blue"}] * 7}, 0.9),
        ("textvqa", {"answers": ["red?"] * 10}, 1.0),
        ("anls", {"answer": "rod"}, 1 - 1 / 3),
        ("relaxed", {"answer": 3}, 0.0),
        ("choice", {"answer": "B", "options": ["blue", "red"]}, 1.0),
    ],
)
def test_every_metric_reads_its_rows(tmp_path, metric, row, score):
    answers = write(tmp_path / "a.jsonl", [{"question_id": "q", "text": "red"}])
    references = write(tmp_path / "r.jsonl", [{"question_id": "q", **row}])
    assert evaluate(metric, answers, references)["score"] == pytest.approx(score)


def test_a_conversation_has_an_id_for_each_question(tmp_path):
    turns = [("human", "<image>\nA?"), ("gpt", "yes"), ("human", "B?"), ("gpt", "no")]
    record = {"id": "r", "image": "0.png", "kind": "k", "conversations": [{"from": w, "value": v} for w, v in turns]}
    one = {"id": 7, "conversations": [{"from": "human", "value": "C?"}, {"from": "gpt", "value": "red"}]}
    said = [("r#1", "A?", "yes"), ("r#2", "B?", "yes"), (7, "C?", "red")]
    answers = [{"question_id": name, "prompt": prompt, "text": text} for name, prompt, text in said]
    references = write(tmp_path / "r.jsonl", [record, one])
    result = evaluate("exact", write(tmp_path / "a.jsonl", answers), references)
    assert [(row["question_id"], row["score"]) for row in result["rows"]] == [("r#1", 1.0), ("r#2", 0.0), (7, 1.0)]
    assert result["by_category"] == {"all": {"score": 1.0, "n": 1}, "k": {"score": 0.5, "n": 2}}
    spelled_out = [{"question_id": name, "question": prompt, "answer": text} for name, prompt, text in said]
    result = evaluate("exact", str(tmp_path / "a.jsonl"), write(tmp_path / "s.jsonl", spelled_out))
    assert result["score"] == 1.0


def test_questions_that_share_an_id_are_told_apart(tmp_path):
    asked = [{"question_id": "p.png", "text": text, "answer": answer} for text, answer in (("A?", "yes"), ("B?", "no"))]
    said = [{"question_id": "p.png", "prompt": text, "text": "no"} for text in ("B?", "A?")]
    result = evaluate("exact", write(tmp_path / "a.jsonl", said), write(tmp_path / "r.jsonl", asked))
    assert [row["score"] for row in result["rows"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("answers", "references", "said"),
    [
        ([{"question_id": 9, "text": "x"}], [{"question_id": 1, "answer": "x"}], "question 9: found no reference"),
        ([{"question_id": 1, "text": "x"}] * 2, [{"question_id": 1, "answer": "x"}], "question 1: found 2 answers"),
        ([{"question_id": 1}], [{"question_id": 1, "answer": "x"}], "row 1: text: found None"),
        ([{"question_id": 1, "text": "x"}], [{"question_id": 1}], "question 1: answer: found None"),
        ([{"question_id": 1, "text": "x"}], [], "found no row"),
        (
            [{"question_id": 1, "prompt": "How many?", "text": "x"}],
            [{"question_id": 1, "question": "What colour?", "answer": "x"}],
            "question 1: found the answer to 'How many\\?', expected one to 'What colour\\?'",
        ),
        ([{"question_id": 1, "text": "x"}], [{"id": 1, "conversations": []}], "question 1: answer: found None"),
        ([{"question_id": 1, "text": "x"}], [{"id": 1, "conversations": [3]}], r"row 1 \(question 1\): turn 0"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, answers, references, said):
    paths = write(tmp_path / "a.jsonl", answers), write(tmp_path / "r.jsonl", references)
    with pytest.raises(LlavaError, match=said) as caught:
        evaluate("exact", *paths)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_prompt_may_say_more_than_the_question(tmp_path):
    prompt = "<image>\nWhat  Colour?\nAnswer the question using a single word."
    answers = write(tmp_path / "a.jsonl", [{"question_id": 1, "prompt": prompt, "text": "red"}])
    for question in ("what colour?", prompt, None, ""):
        row = {"question_id": 1, "question": question, "answer": "red"}
        assert evaluate("exact", answers, write(tmp_path / "r.jsonl", [row]))["score"] == 1.0


def documented() -> list[tuple[str, dict, str, float]]:
    """(metric, reference, answer, score) of each row of the table in docs/answers.md."""
    text = (Path(__file__).parents[2] / "docs" / "answers.md").read_text(encoding="utf-8")
    row = re.compile(r"\| `(\w+)` \| `(\{.*?\})` \| `(.*?)` \| ([\d.]+): .* \|")
    return [(m[1], json.loads(m[2]), m[3], float(m[4])) for m in map(row.fullmatch, text.splitlines()) if m]


def test_the_documented_references_score_as_documented(tmp_path):
    found = documented()
    assert {metric for metric, *_ in found} == {"exact", "vqa", "textvqa", "anls", "relaxed", "choice"}
    for metric, reference, answer, score in found:
        answers = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": answer}])
        result = evaluate(metric, answers, write(tmp_path / "r.jsonl", [reference]))
        assert result["score"] == pytest.approx(score, abs=5e-5), (metric, answer)
