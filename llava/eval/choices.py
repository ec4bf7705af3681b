"""Which option an answer chooses, in the ways people and models write it.

Letters are found first ("mentions": "(B)", "B.", "option B", a bare B that is no word), those that are joined make a
group ("A or B"), and of each group the clause around it says whether it is denied. An option is chosen by what is said
plainly, or by nothing: with every rule below, none is better than another option than the one that is meant.
"""

import re
import string
from dataclasses import dataclass

from llava.eval import choice_words as words


@dataclass
class _Group:
    """Letters that are joined.

    Attributes:
        letters: which; "?" where the answer goes on to others.
        sure: their form is an option's alone, not that of a word.
        boxed: one of them is in a box.
        start, end: where they are.
        asserted: nothing denies them, and they are no question or condition.
        denied: their clause says that it is not these.
        cued: it is said that they are the answer.
    """

    letters: set[str]
    sure: bool
    boxed: bool
    start: int
    end: int
    asserted: bool = True
    denied: bool = False
    cued: bool = False


def chosen_letter(prediction: str, options: list[str]) -> str | None:
    """The letter (A, B, ...) that an answer chooses; None where it chooses none or more than one, or may mean another.

    The first of these rules that speaks decides; nothing is guessed. Of a letter that is denied ("not B", "B is wrong",
    "neither A nor B") or asked for ("B?"), none speaks.

    1. what is in \\boxed{} or <answer></answer>
    2. the whole answer is a letter: "A", "a", "(A)", "**A**."
    3. the whole answer is the text of one option, or a letter and its text: "A. cat", "cat (A)"
    4. one letter is said to be the answer: "the answer is A", "Answer: (A)", "I choose A", "so A", "A is correct"
    5. one letter stands alone, as a line or a sentence: "A\\nIt meows.", "...\\nA", "A. It meows"
    6. the answer begins with a letter, and has no other: "A, because", "A - cat", "A is the cat"; or ends with one that
       is a clause of its own: "Sure, A."
    7. one letter has a form that only options have: "(A)", "option A"
    8. no letter is there, and the text of one option is, as words; an option in the text of another found one does not
       count, nor does one in a clause that denies something

    An A or I that goes on as a sentence is a word ("A cat sits"). A letter with another option's text behind it
    ("A. dog", where B is dog) chooses none, nor does a bare letter that is another option's text.

    Rules in the manner of MMBench's and MMMU's answer matching (arXiv 2307.06281, 2311.16502), which in the end ask a
    model or draw a random letter; this does neither.
    """
    text = prediction.rsplit("</think>", 1)[-1].translate(words.WIDE).strip()
    boxes = [next(filter(None, found.groups()), "") for found in words.FINAL.finditer(text)]
    single = [words.WHOLE.fullmatch(_without_markup(box)) for box in boxes]
    if all(single):  # the text around them is read too: it may deny one
        letters = iter(single)
        text = words.FINAL.sub(lambda _: f"{words.BOXED}({next(letters)[1]})", text)
        return _letter(text, options)
    final = {_letter(box, options) for box in boxes}
    return final.pop() if len(final) == 1 else None


def _letter(text: str, options: list[str]) -> str | None:
    letters = string.ascii_uppercase[: len(options)]
    plain = [_plain(option) for option in options]
    text = _without_markup(text)
    whole = words.WHOLE.fullmatch(text.removeprefix(words.BOXED))
    if whole:
        return _checked(whole[1].upper(), text[0] in f"([{{<{words.BOXED}", "", letters, plain)
    same = [letter for letter, option in zip(letters, plain, strict=True) if option and option == _plain(text)]
    if same:
        return same[0] if len(same) == 1 else None
    text = _without_own_texts(text, letters, plain)
    with_text = re.fullmatch(rf"[(\[]?([A-Z])[)\]]?[.:,]? {words.ITS_TEXT}[.!]?", text)
    if with_text:
        return with_text[1]
    marked = _mark(text, letters)
    groups = _groups(marked)
    if len(groups) == 1 and len(groups[0].letters) == 1:
        (letter,), rest = groups[0].letters, re.sub(rf"{words.TOKEN}|[()=-]", " ", marked)
        said = [name for name, option in zip(letters, plain, strict=True) if option and option == _plain(rest)]
        if said:  # "dog (B)"
            return letter if letter in said else None
    if any(group.letters & set(letters) or group.sure or group.cued for group in groups):
        group = _deciding(marked, groups)
        return group and _checked(*group.letters, group.sure, marked[group.end :], letters, plain)
    return _by_text(text, letters, plain)


def _without_markup(text: str) -> str:
    while (bare := words.COMMANDS.sub(r"\1", text)) != text:
        text = bare
    text = words.MARKUP.sub("", text).strip()
    return words.ALL_BUT.sub("except", words.QUOTED.sub(r"(\2)\3", text))


def _without_own_texts(text: str, letters: str, plain: list[str]) -> str:
    """An option's text behind its own letter says nothing more, whatever words are in it."""
    for letter, option in zip(letters, plain, strict=True):
        own = r"\s+".join(map(re.escape, option.split()))
        behind = rf"(?<![0-9A-Za-z_])({letter}[)\]]?[.:,]?)\s*[\"']?(?i:{own})[\"']?(?!\w)"
        text = re.sub(behind, rf"\1 {words.ITS_TEXT}", text) if option else text
    return text


def _checked(letter: str, sure: bool, rest: str, letters: str, plain: list[str]) -> str | None:
    """The letter, unless there is no such option, or it may be another's text or stands in front of another's text."""
    if letter not in letters:
        return None
    at = letters.index(letter)
    if not sure and letter.lower() in plain[:at] + plain[at + 1 :]:
        return None
    behind = _plain(re.split(r"[.,;:!\n]", rest.lstrip(" .:),;-"), maxsplit=1)[0])
    others = {option for option in plain if option and option != plain[at]}
    return None if behind in others or re.sub(r"^(?:an?|the) ", "", behind) in others else letter


# --- by letters ---


def _mark(text: str, letters: str) -> str:
    """The text with every letter that stands for an option between marks."""

    def put(found: re.Match) -> str:
        kind = found.lastgroup
        letter = next(part for part in found.groups() if part and len(part) == 1)
        before, after = text[: found.start()], text[found.end() :]
        if _is_word(kind, letter, before, after) or (
            kind != "bracketed"
            and (kind == "small" or letter.upper() not in letters)
            and before.strip()
            and not words.CUE.search(before[-120:])
        ):
            return found[0]
        sure = "!" if kind in ("bracketed", "named") or after.startswith((")", "选项")) else ""
        boxed = "*" if words.BOXED in found[0] else ""
        return f"{words.OPEN}{letter.upper()}{sure}{boxed}{words.CLOSE}"

    return words.MENTION.sub(put, text)


def _is_word(kind: str, letter: str, before: str, after: str) -> bool:
    """Whether a letter is an article, a pronoun, part of a name, or a copyright sign."""
    if kind == "bracketed":
        return letter in "cC" and re.match(r"\s*(?:19|20)\d\d\b", after) is not None
    if kind == "bare" and (words.ABBREVIATED.search(before[-6:]) or (letter == "I" and re.match(r"\s+\w", after))):
        return True
    if kind == "small" and letter == "a" and not after and before.strip() and not before.rstrip().endswith(":"):
        return True  # an answer that was cut short
    return kind in ("bare", "named") and letter.upper() in "AI" and not words.NO_NOUN.match(after)


def _groups(marked: str) -> list[_Group]:
    groups = []
    for found in words.GROUP.finditer(marked):
        names = re.findall(rf"{words.OPEN}([A-Z])(!?)", found[0])
        letters, sure = {name for name, _ in names}, all(mark for _, mark in names)
        group = _Group(letters, sure, "*" in found[0], *found.span())
        before, after = words.NO_DENIAL.sub("", marked[max(group.start - 400, 0) : group.start]), marked[group.end :]
        clause = words.CLAUSE.split(before.rstrip(" \n").removesuffix(":"))[-1]  # "Wrong: B"
        behind = words.CLAUSE.split(words.NOT_THE_NEXT.split(after.lstrip(")"), maxsplit=1)[0], maxsplit=1)[0]
        denials = len(words.DENIED.findall(clause)) + len(words.DENIED.findall(behind))
        group.denied = denials == 1 or re.search(r"(?i:\bneither)\s*$", clause) is not None
        group.asserted = not (
            denials  # twice: it may be meant after all
            or re.match(r"[^.!?\n]*([.!?\n]?)", after)[1] == "?"
            or words.OPEN_QUESTION.search(clause)
            or words.UNREAL.search(re.split(r"[.!?\n]", before)[-1])
        )
        but = groups and groups[-1].denied and words.BUT.search(before)
        group.cued = bool(but or words.CUE.search(before[-120:]) or words.PREDICATE.match(after))
        if words.GOES_ON.match(after):
            group.letters.add("?")
        groups.append(group)
    return groups


def _deciding(marked: str, groups: list[_Group]) -> _Group | None:
    """The group of one letter that says what is chosen."""
    asserted = [group for group in groups if group.asserted]
    boxed = [group for group in asserted if group.boxed]
    if boxed:
        return _only(boxed)
    alone = [group for group in asserted if _is_line(marked, group)]
    cued = [group for group in asserted if group.cued]
    if cued:
        thoughts = list(words.SECOND_THOUGHTS.finditer(marked, cued[0].end))
        if thoughts:
            return _only([group for group in [*cued, *alone] if group.start > thoughts[-1].start()])
        last = [group for group in asserted if group.start > cued[0].start and _ends(marked, group)]
        return _only([*cued, *alone, *last])
    if alone:
        return _only(alone)
    if any(_is_sentence(marked, group) for group in asserted):
        tests = (_is_sentence, _heads, _ends)
        return _only([group for group in asserted if any(test(marked, group) for test in tests)])
    if not asserted:
        return None
    first, last = asserted[0], asserted[-1]
    leads = not marked[: first.start].strip(" (") and words.LEADS.match(marked[first.end :])
    closes = _ends(marked, last) and marked[: last.start].rstrip(" (").endswith((",", ":", ";"))
    return _only(asserted) if leads or closes or any(group.sure for group in asserted) else None


def _only(groups: list[_Group]) -> _Group | None:
    """The first, where they all name the same single letter."""
    return groups[0] if groups and len(set().union(*(group.letters for group in groups))) == 1 else None


def _is_line(marked: str, group: _Group) -> bool:
    line_before = marked[: group.start].rsplit("\n", 1)[-1]
    line_after = marked[group.end :].split("\n", 1)[0]
    return not line_before.strip(" (") and not line_after.strip(" ).:,")


def _is_sentence(marked: str, group: _Group) -> bool:
    before, after = marked[: group.start].rstrip(" ("), marked[group.end :].lstrip(")")
    return (not before or before[-1] in ".!?\n;") and re.match(r"[.:)](?=\s|$)|\s*$", after) is not None


def _ends(marked: str, group: _Group) -> bool:
    """The text or a line ends with it."""
    return re.match(r"\)?\s*[.!]?\s*(?:\n|$)", marked[group.end :]) is not None


def _heads(marked: str, group: _Group) -> bool:
    """It stands in front of something, as in a list of the options."""
    return re.match(rf"\)?\s?[.:)]\s*[\w{words.ITS_TEXT}]", marked[group.end :]) is not None


# --- by an option's text ---


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def _holds(text: str, part: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def _by_text(text: str, letters: str, plain: list[str]) -> str | None:
    said = _plain(text)
    yes_or_no = re.match(r"(?:yes|no|true|false)(?=[.,;:!\n])", said)
    if yes_or_no and plain.count(yes_or_no[0]) == 1:
        return letters[plain.index(yes_or_no[0])]
    found = [i for i, option in enumerate(plain) if option and _holds(said, option)]
    found = [i for i in found if not any(i != j and _holds(plain[j], plain[i]) for j in found)]
    if len(found) != 1:
        return None
    for place in re.finditer(rf"(?<!\w){re.escape(plain[found[0]])}(?!\w)", said):
        before, after = words.NO_DENIAL.sub("", said[: place.start()]), said[place.end() :]
        clause = f"{words.CLAUSE.split(before)[-1]} {words.CLAUSE.split(after, maxsplit=1)[0]}"
        if words.DENIED.search(clause) or words.OPEN_QUESTION.search(clause):
            return None
    return letters[found[0]]
