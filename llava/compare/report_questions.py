"""Questions on which towers disagree: which ones there are, which ones a report shows, and their pictures."""

import base64
import io
import itertools

from llava.data.paths import resolve_path
from llava.errors import LlavaError

LIMIT = 200  # questions of a page
SIDE = 224  # pixels, the longest side of a picture in the page
PICTURES = 3  # of one question
LONGEST = 600  # characters of a text in the page


def verdict(correct: dict) -> bool | None:
    """Whether more than half of a tower's seeds ({seed: bool}) are right, or wrong; None: neither."""
    right, all_of_them = sum(map(bool, correct.values())), len(correct)
    if 2 * right > all_of_them:
        return True
    return False if 2 * right < all_of_them else None


def verdicts(question: dict) -> dict[str, bool | None]:
    return {tower: verdict(seeds) for tower, seeds in question["correct"].items() if seeds}


def reads_where_not(questions: list[dict], towers: list[str]) -> dict[tuple[str, str], int]:
    """How many questions the first tower of each ordered pair gets right and the second one wrong."""
    counts = dict.fromkeys(itertools.product(towers, towers), 0)
    for question in questions:
        found = verdicts(question)
        right = [tower for tower in towers if found.get(tower) is True]
        wrong = [tower for tower in towers if found.get(tower) is False]
        for pair in itertools.product(right, wrong):
            counts[pair] += 1
    return counts


def disagreements(details: dict) -> list[tuple[str, dict]]:
    """(evaluation, question) of all that one tower gets right and another wrong."""
    every = ((name, question) for name, content in details.items() for question in content["questions"])
    return [(name, question) for name, question in every if {True, False} <= set(verdicts(question).values())]


def choose(found: list[tuple[str, dict]], limit: int = LIMIT) -> list[tuple[str, dict]]:
    """At most `limit` of the disagreements, in their order: each evaluation and ordered pair of towers in turn gives
    one, evenly spaced over its own, so that no pair is left without."""
    if len(found) <= limit:
        return found
    buckets: dict[tuple, list[int]] = {}
    for place, (name, question) in enumerate(found):
        known = verdicts(question)
        right = [tower for tower, value in known.items() if value is True]
        wrong = [tower for tower, value in known.items() if value is False]
        for pair in itertools.product(right, wrong):
            buckets.setdefault((name, *pair), []).append(place)
    queues, taken = [iter(_spread(bucket)) for bucket in buckets.values()], set()
    while len(taken) < limit:
        for queue in queues:
            place = next((place for place in queue if place not in taken), None)
            if place is not None and len(taken) < limit:
                taken.add(place)
    return [found[place] for place in sorted(taken)]


def _spread(places: list[int]) -> list[int]:
    """The same places, so ordered that any first few of them are spread over the list (van der Corput's sequence)."""
    width = max(1, (len(places) - 1).bit_length())
    order = (int(f"{number:0{width}b}"[::-1], 2) for number in range(1 << width))
    return [places[at] for at in order if at < len(places)]


def embedded(details: dict, towers: list[str], limit: int = LIMIT) -> dict:
    """What the page knows of the questions it shows: JSON of texts and pictures.

    Returns: {"total": disagreements, "towers", "evaluations", "pictures": [{"name", "data": URI or null}], "questions":
        [{"evaluation", "id", "kind", "question", "answer", "pictures": places in pictures, "more": pictures not shown,
        "said": {tower: [[seed, prediction, correct]]}}]}.
    """
    found = disagreements(details)
    pictures: dict[tuple, int] = {}
    questions = []
    for name, question in choose(found, limit):
        names = question.get("image") or []
        names = [str(image) for image in (names if isinstance(names, list) else [names])]
        folder = details[name].get("image_folder")
        places = [pictures.setdefault((folder, image), len(pictures)) for image in names[:PICTURES]]
        said = {tower: _said(question, tower) for tower in towers if question["correct"].get(tower)}
        row = {key: _short(question.get(key)) for key in ("id", "kind", "question", "answer")}
        row |= {"evaluation": name, "pictures": places, "more": len(names) - len(places), "said": said}
        questions.append(row)
    shown = [{"name": image, "data": picture_uri(folder, image)} for folder, image in pictures]
    names = [name for name in details if any(row["evaluation"] == name for row in questions)]
    return {"total": len(found), "towers": towers, "evaluations": names, "pictures": shown, "questions": questions}


def _said(question: dict, tower: str) -> list[list]:
    texts = question.get("predictions", {}).get(tower) or {}
    return [[str(seed), _short(texts.get(seed)), bool(ok)] for seed, ok in question["correct"][tower].items()]


def _short(value) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def picture_uri(folder: str | None, name: str, side: int = SIDE) -> str | None:
    """A picture as a data URI of at most `side` pixels a side, in JPEG or PNG, whichever is shorter.

    None: there is no such picture, or it cannot be read.
    """
    from PIL import Image

    from llava.images.reading import load_image

    try:
        picture = load_image(resolve_path(folder, name))
    except LlavaError:
        return None  # the page has a frame with its name in its place
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    found = []
    for form, options in (("JPEG", {"quality": 80, "optimize": True}), ("PNG", {"optimize": True})):
        file = io.BytesIO()
        picture.save(file, form, **options)
        found.append((len(file.getvalue()), f"data:image/{form.lower()};base64,{_base64(file.getvalue())}"))
    return min(found)[1]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
