"""The standard scores of visual question answering: each takes a prediction and what is true, and gives 0 to 1."""

import math
import re
import string
from functools import lru_cache

from llava.errors import LlavaError
from llava.eval.choices import chosen_letter

# --- exact match ------------------------------------------------------------------------------------------------------


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same but for blanks at the ends."""
    return float(prediction.strip() == answer.strip())


# --- VQA accuracy -----------------------------------------------------------------------------------------------------

_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBER_WORDS)}}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")  # a decimal point stays
_PERIODS = 32  # the published code hands re.UNICODE, which is 32, where the number of replacements belongs
# The words whose apostrophes are mended. The published table has a key for each of their spellings with one
# apostrophe left out, but for "let's" and "she's" (those would be words of their own).
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


@lru_cache(maxsize=1)
def _contractions() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # as published, the wrong way round
    for word in _APOSTROPHES.split():
        for at, character in enumerate(word):
            if character == "'":
                table[word[:at] + word[at + 1 :]] = word
    return table


def normalize_vqa(text: str) -> str:
    """An answer as VQA compares it: lower case, number words as digits, without punctuation and articles.

    A punctuation mark becomes a blank, or nothing where it stands beside a blank anywhere in the text or the text has a
    number with a comma.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    clean = text
    number = _NUMBER_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        gone = number or f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if gone else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", clean, count=_PERIODS).lower().split()]
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """VQA accuracy: min(people who said it / 3, 1), averaged over the subsets that leave one person out.

    Source: Antol et al., "VQA: Visual Question Answering" (arXiv 1505.00468), and the evaluation code of VQA v2 with
    its normalisation; like the benchmark's later users (TextVQA's evaluation server, lmms-eval) it normalises the
    reference answers always, not only where they differ.

    Args:
        answers: of the ten people asked; of n people at most (n - 1) / 3 can be reached. A single answer, which leaves
            nobody to agree with, scores 1 where it is the same and 0 where it is not.
    """
    return _agreement(normalize_vqa(prediction), [normalize_vqa(answer) for answer in answers])


def textvqa_accuracy(prediction: str, answers: list[str]) -> float:
    """`vqa_accuracy` as TextVQA's evaluation server and lmms-eval's `textvqa` compute it.

    Commas and question marks vanish before other marks are looked at, and an 's is a word of its own ("10,000-2" is
    "10000 2", where VQA has "100002").
    """
    return _agreement(normalize_textvqa(prediction), [normalize_textvqa(answer) for answer in answers])


def normalize_textvqa(text: str) -> str:
    """An answer as TextVQA compares it; see `textvqa_accuracy`."""
    return normalize_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def _agreement(said: str, answers: list[str]) -> float:
    if not answers:
        raise LlavaError("answers: the list is empty, expected those of ten people, or one")
    same = [answer == said for answer in answers]
    if len(same) == 1:
        return float(same[0])
    return sum(min((sum(same) - left_out) / 3, 1.0) for left_out in same) / len(same)


# --- ANLS -------------------------------------------------------------------------------------------------------------


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(prediction: str, answers: list[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer; below the threshold it counts nothing.

    Lower case, blanks at the ends and repeated ones aside; they count in the length that the distance is divided by, as
    in the published evaluation of DocVQA. Source: Biten et al., "Scene Text Visual Question Answering"
    (arXiv 1905.13648): 1 - NL where the normalised distance NL < threshold, else 0. DocVQA and InfographicVQA, which
    score by it, keep a similarity of exactly one half; so does this.
    """
    if not answers:
        raise LlavaError("answers: the list is empty, expected at least one")
    said = " ".join(prediction.lower().split())
    similarities = []
    for answer in answers:
        true = " ".join(answer.lower().split())
        length = max(len(prediction.upper()), len(answer.upper()), 1)
        similarities.append(1 - edit_distance(said, true) / length)
    return max(similarities) if max(similarities) >= threshold else 0.0


# --- relaxed accuracy -------------------------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    """A number, per cent as its hundredth; None where the text is none, or none that is finite ("nan", "1e999")."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def relaxed_accuracy(prediction: str, answer: str, tolerance: float = 0.05) -> float:
    """ChartQA's score: numbers within 5% of the true one, other answers the same but for case.

    Source: Masry et al., "ChartQA" (arXiv 2203.10244), section 5.1, after Methani et al., "PlotQA" (arXiv 1909.00997);
    per cent signs as in Pix2Struct's and Qwen-VL's evaluation: "5%" is 0.05. To a true value of zero no relative
    distance is defined; there the texts are compared, and so are "1,000", "nan", "inf" and "−5" with a typographic
    sign, which are no numbers here.
    """
    said, true = prediction.strip(), answer.strip()
    value, target = _number(said), _number(true)
    if value is not None and target:
        return float(abs(value - target) / abs(target) <= tolerance)
    return float(said.lower() == true.lower())


# --- multiple choice --------------------------------------------------------------------------------------------------


def multiple_choice(prediction: str, answer: str, options: list[str]) -> float:
    """1 where the prediction chooses the true option (see `chosen_letter`).

    Args:
        answer: the letter of the true option, or its text.
        options: texts of the options, A first.
    """
    if not 0 < len(options) <= len(string.ascii_uppercase):
        raise LlavaError(f"options: found {len(options)}, expected 1 to {len(string.ascii_uppercase)}")
    letters = string.ascii_uppercase[: len(options)]
    true = answer.strip()
    if len(true) != 1 or true.upper() not in letters:
        if true not in options:
            raise LlavaError(f"answer: found {answer!r}, expected a letter up to {letters[-1]} or an option's text")
        true = letters[options.index(true)]
    return float(chosen_letter(prediction, options) == true.upper())
