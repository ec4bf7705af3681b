"""Which option an answer chooses, in the ways people and models write it.

Letters are found first ("mentions": "(B)", "B.", "option B", a bare B that is no word), those that are joined make a group
("A or B"), and of each group the clause around it says whether it is denied. An option is chosen by what is said last
and plainly, or by nothing: of every rule below it is better to find none than another option than the one that is meant.
"""

import re
import string
from dataclasses import dataclass

# --- what an answer is wrapped in ---

_WIDE = str.maketrans("（）［］【】．：，、。；！？—–", "()[][].:,,.;!?--") | dict.fromkeys(
    map(ord, "「」『』“”《》〈〉"), '"'
)
_WIDE |= str.maketrans("‘’", "''")
_WIDE |= {ord("Ａ") + i: ord("A") + i for i in range(26)} | {ord("ａ") + i: ord("a") + i for i in range(26)}
_FINAL = re.compile(
    r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|$)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)",
    re.DOTALL | re.IGNORECASE,
)
_COMMANDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
_MARKUP = re.compile(
    r"\*+|`+|\$+|(?<!\w)_+|_+(?!\w)|\\[()\[\]]|^[ \t]*(?:#+|>|[-•])[ \t]+|</?[a-z][a-z0-9]*>", re.MULTILINE
)
_QUOTED = re.compile(r"(?<!\w)([\"'])\s*\(?([A-Za-z])\)?([.,:]?)\s*\1(?!\w)")

# --- letters ---

_OPEN, _CLOSE = "\ue000", "\ue001"  # around a mention: B, or B! where it can be nothing but an option
_WORDS_BEFORE = r"(?:options?|choices?|letters?|选项)\s*:?\s*"
_BRACKETED = rf"[(\[{{]\s*(?:{_WORDS_BEFORE})?([A-Za-z])\s*[.:]?\s*[)\]}}]"
_NAMED = rf"(?i:(?<![a-z]){_WORDS_BEFORE})(?:\(\s*)?([A-Za-z])(?![0-9A-Za-z_'+#-])"
_BARE = r"(?<![0-9A-Za-z_À-ɏ.'°+#/-])(?<!\d )(?<!° )(?<![A-Z]\. )([A-Z])(?![0-9A-Za-z_'°+#-])(?!\.\w)"
_SMALL = r"(?<![0-9A-Za-z_.'-])([a-z])(?=\)|[.:]?\s*$|[.:]?\s*\n)"
_MENTION = re.compile(rf"(?P<bracketed>{_BRACKETED})|(?P<named>{_NAMED})|(?P<bare>{_BARE})|(?P<small>{_SMALL})")
# after which an A is no article
_NO_NOUN = re.compile(
    r"\s+(?:is|isn't|are|aren't|was|and|or|nor|because|since|seems|looks|appears|would|could|should|cannot|can't|but|"
    r"shows|does|doesn't|while|whereas)\b|\s*[^\w\s]|\s*$|\s*\n|\s*[\u3040-\u9fff]|\s+" + _OPEN
)
_TOKEN = rf"{_OPEN}[A-Z]!?{_CLOSE}"
_JOINED = r"[ \t]*(?:,|/|&|;|、|and/or)?[ \t]*(?:and|or|nor|as well as|或者?|和|与|及)?[ \t]*(?:maybe|perhaps|possibly|also|even)?[ \t]*"
_GROUP = re.compile(rf"{_TOKEN}(?:{_JOINED}{_TOKEN})*")

# --- what is said of them ---

_CLAUSE = r"[.,;:!?\n]|-\s|\b(?:but|so|therefore|thus|hence|because|since|while|whereas|although|though|then)\b|而是|所以|因此|但"
_DENIED = re.compile(
    r"\b(?:not|never|no|nor|neither|none|cannot|without|except|excluding|exclud\w*|eliminat\w*|rul(?:e|es|ed|ing) out|"
    r"discard\w*|reject\w*|rather than|instead of|unlike|unlikely|other than|apart from|doubt\w*|impossible|wrong|"
    r"incorrect|false|invalid|mistaken)\b|n't\b|不|非|排除|除了|错",
    re.IGNORECASE,
)
# after a letter: what is denied is what comes next
_NOT_THE_NEXT = re.compile(
    rf"\b(?:rather than|instead of|unlike|other than|apart from|except)\b|\b(?:(?:and |but )?not(?=\s+(?:{_WORDS_BEFORE})?{_OPEN}))",
    re.IGNORECASE,
)
_ALL_BUT = re.compile(r"\b(?:anything|everything|all|any)\s+but\b", re.IGNORECASE)
_NO_DENIAL = re.compile(r"\b(?:no|without|beyond)\s+(?:a\s+|any\s+)?(?:doubt|question)\b", re.IGNORECASE)
_OPEN_QUESTION = re.compile(r"\b(?:if|whether|unless|suppos\w+|assum\w+|either|between)\b|如果|是否", re.IGNORECASE)
_GOES_ON = re.compile(r"\s*,?\s*(?:or|if|unless|when|in case|otherwise)\b", re.IGNORECASE)
_HOW = r"(?:(?:clearly|definitely|probably|most likely|likely|indeed|simply|obviously|certainly|perhaps|maybe|actually|the|an?|most)\s+)*"
_BE = r"(?:is|was|'s|are|(?:would|must|should|will|has to|may|might|could|can)(?:\s+also)?(?:\s+only)?\s+be|seems to be|being)"
_CUE = re.compile(
    r"(?:"
    rf"\b(?:answers?|solution|selection|conclusion|choice|option|pick|guess|(?:correct|right|best|true|only)(?:\s+\w+)?)\b"
    rf"[^.;:!?\n]{{0,60}}?(?:\b{_BE}|'s|:|=|->|→)"
    r"|\b(?:final\s+)?answer\b"
    rf"|\b(?:it|this|that|which|one)\s*{_BE}"
    r"|\b(?:say|think|believe|guess|suppose|claim|argue|choos|chose|pick|select|prefer|go with|opt for|vote for)(?:e|s|es|ed|ing)?"
    r"(?:\s+that)?"
    r"|\b(?:so|thus|therefore|hence|leav(?:es|ing)(?:\s+us\s+with)?|left with|remaining|only|conclude(?:\s+that)?|"
    r"probably|likely|definitely|maybe|perhaps|certainly|clearly|obviously|must be|should be)"
    r"|=>|->|[→⇒]"
    r"|(?:答案|选择|应选|应该选|选|而是|所以|因此)(?:是|为|应为|应该是|[:：])?"
    rf")\s*,?\s*:?\s*{_HOW}:?\s*(?i:{_WORDS_BEFORE})?$",
    re.IGNORECASE,
)
_PREDICATE = re.compile(
    rf"\s*(?:(?:is|was|seems|looks|appears)(?:\s+to\s+be)?\s+(?:my\s+|the\s+|more\s+|{_HOW})*(?:correct|right|best|true|accurate|"
    r"answer|appropriate|one|choice|option|solution|left)\b|remains\b|fits\b|是正确|正确|是对)",
    re.IGNORECASE,
)
_SECOND_THOUGHTS = re.compile(
    r"\b(?:wait|actually|correction|sorry|on second thought|hmm|scratch that|no,)", re.IGNORECASE
)


@dataclass
class _Group:
    """Letters that are joined.

    Attributes:
        letters: which.
        sure: their form is an option's alone, not that of a word.
        start, end: where they are.
        denied: its clause says that it is not these.
        unclear: it is a question or a condition, or denied twice.
        cued: it is said to be the answer.
    """

    letters: set[str]
    sure: bool
    start: int
    end: int
    denied: bool = False
    unclear: bool = False
    cued: bool = False

    @property
    def asserted(self) -> bool:
        return not self.denied and not self.unclear


def chosen_letter(prediction: str, options: list[str]) -> str | None:
    """The letter (A, B, ...) that an answer chooses; None where it chooses none or more than one, or may mean another.

    The first of these rules that speaks decides; nothing is guessed. Of a letter that is denied ("not B", "B is wrong",
    "neither A nor B") or asked for ("B?"), none speaks.

    1. what is in \\boxed{} or <answer></answer>, by the rules below
    2. the whole answer is a letter: "A", "a", "(A)", "**A**."
    3. the whole answer is the text of one option
    4. one letter is said to be the answer: "the answer is A", "Answer: (A)", "I choose A", "so A", "A is correct", "选A"
    5. one letter stands alone, as a line or a sentence: "A\\nIt barks.", "...\\nA", "A. cat"
    6. the answer begins with a letter, and has no other: "A, because", "A) cat", "A - cat", "A is the cat"
    7. one letter has a form that only options have: "(A)", "option A"
    8. no letter is there, and the text of one option is, as words; an option in the text of another found one does not
       count, nor does one in a clause that denies something

    An A or I that goes on as a sentence is a word ("A cat sits"). A letter with another option's text behind it ("A. dog",
    where B is dog) chooses none, nor does a bare letter that is another option's text.

    Rules in the manner of MMBench's and MMMU's answer matching (arXiv 2307.06281, 2311.16502), which in the end ask a
    model or draw a random letter; this does neither.
    """
    text = prediction.rsplit("</think>", 1)[-1].translate(_WIDE).strip()
    final = {_letter(next(filter(None, found), ""), options) for found in _FINAL.findall(text)}
    if final:
        return final.pop() if len(final) == 1 else None
    return _letter(text, options)


def _letter(text: str, options: list[str]) -> str | None:
    letters = string.ascii_uppercase[: len(options)]
    plain = [_plain(option) for option in options]
    text = _without_markup(text)
    whole = re.fullmatch(r"[(\[{<\"']?\s*([A-Za-z])\s*[)\]}>\"']?[.:,;!]?[)\"']?", text)
    if whole:
        return _checked(whole[1].upper(), text[0] in "([{<", "", letters, plain)
    same = [letter for letter, option in zip(letters, plain, strict=True) if option and option == _plain(text)]
    if same:
        return same[0] if len(same) == 1 else None
    with_text = re.match(r"([A-Z])\s", text)
    if with_text and with_text[1] in letters and plain[letters.index(with_text[1])] == _plain(text[2:]):
        return with_text[1]
    marked = _mark(text, letters)
    groups = _groups(marked)
    if any(group.letters & set(letters) or group.sure or group.cued for group in groups):
        group = _deciding(marked, groups)
        if group is None:
            return None
        return _checked(*group.letters, group.sure, marked[group.end :], letters, plain)
    return _by_text(text, letters, plain)


def _without_markup(text: str) -> str:
    while (bare := _COMMANDS.sub(r"\1", text)) != text:
        text = bare
    text = _MARKUP.sub("", text).strip()
    return _ALL_BUT.sub("except", _QUOTED.sub(r"(\2)\3", text))


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
        letter = next(part for part in found.groups()[:] if part and len(part) == 1)
        before, after = text[: found.start()], text[found.end() :]
        if kind in ("bare", "named") and letter.upper() in "AI" and not _NO_NOUN.match(after):
            return found[0]
        if kind == "named" and letter.islower() and re.match(r"\s+\w", after) and letter in "ai":
            return found[0]
        if kind == "bare" and letter == "I" and re.match(r"\s+\w", after):
            return found[0]
        if kind == "small" and before.strip() and not _CUE.search(before[-120:]):
            return found[0]
        if kind == "bare" and letter not in letters and not _CUE.search(before[-120:]):
            return found[0]
        sure = "!" if kind in ("bracketed", "named") or after.startswith(")") else ""
        return f"{_OPEN}{letter.upper()}{sure}{_CLOSE}"

    return _MENTION.sub(put, text)


def _groups(marked: str) -> list[_Group]:
    groups = []
    for found in _GROUP.finditer(marked):
        names = re.findall(rf"{_OPEN}([A-Z])(!?)", found[0])
        group = _Group({name for name, _ in names}, all(sure for _, sure in names), *found.span())
        before, after = _NO_DENIAL.sub("", marked[max(group.start - 400, 0) : group.start]), marked[group.end :]
        clause_before = re.split(_CLAUSE, before)[-1]
        clause_after = re.split(_CLAUSE, _NOT_THE_NEXT.split(after.lstrip(")"), maxsplit=1)[0], maxsplit=1)[0]
        sentence_before = re.split(r"[.!?\n]", before)[-1]
        sentence_after = re.match(r"[^.!?\n]*([.!?\n]?)", after)[1]
        denials = len(_DENIED.findall(clause_before)) + len(_DENIED.findall(clause_after))
        group.denied = denials == 1 or re.search(r"(?i:\bneither)\s*$", clause_before) is not None
        group.unclear = (
            (denials > 1 and not group.denied)
            or sentence_after == "?"
            or _OPEN_QUESTION.search(clause_before) is not None
            or re.search(r"(?i:\b(?:if|suppos\w+|assum\w+)\b.*\bwould\b)", sentence_before) is not None
        )
        if _GOES_ON.match(after):
            group.letters.add("?")  # another is named further on, or a condition
        but = groups and groups[-1].denied and re.search(r"(?:\bbut|而是)\s*(?:rather\s*)?$", before)
        group.cued = bool(but or _CUE.search(before[-120:]) or _PREDICATE.match(after))
        groups.append(group)
    return groups


def _deciding(marked: str, groups: list[_Group]) -> _Group | None:
    """The group of one letter that says what is chosen."""
    asserted = [group for group in groups if group.asserted]
    alone = [group for group in asserted if _is_line(marked, group)]
    cued = [group for group in asserted if group.cued]
    if cued:
        first = cued[0]
        thoughts = list(_SECOND_THOUGHTS.finditer(marked, first.end))
        if thoughts:
            cued = alone = [group for group in [*cued, *alone] if group.start > thoughts[-1].start()]
        return _only([*cued, *alone])
    if alone:
        return _only(alone)
    if any(_is_sentence(marked, group) for group in asserted):
        return _only([group for group in asserted if _is_sentence(marked, group) or _heads(marked, group)])
    if asserted and not marked[: asserted[0].start].strip(" (") and _leads(marked[asserted[0].end :]):
        return _only(asserted)
    return _only(asserted) if any(group.sure for group in asserted) else None


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


def _heads(marked: str, group: _Group) -> bool:
    """It stands in front of something, as in a list of the options."""
    return re.match(r"\)?\s?[.:)]\s*\w", marked[group.end :]) is not None


def _leads(after: str) -> bool:
    """What follows the letter that an answer begins with goes on about it."""
    return (
        re.match(
            r"\)|\s*[.,:;)-](?=\s|\w|$)|\s+(?:is|was|because|since|as|seems|looks|appears|shows|rather than|instead of|(?:and )?not)\b|\n",
            after,
        )
        is not None
    )


# --- by an option's text ---


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def _holds(text: str, part: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def _by_text(text: str, letters: str, plain: list[str]) -> str | None:
    words = _plain(text)
    yes_or_no = re.match(r"(?:yes|no|true|false)(?=[.,;:!\n])", words)
    if yes_or_no and plain.count(yes_or_no[0]) == 1:
        return letters[plain.index(yes_or_no[0])]
    found = [i for i, option in enumerate(plain) if option and _holds(words, option)]
    found = [i for i in found if not any(i != j and _holds(plain[j], plain[i]) for j in found)]
    if len(found) != 1:
        return None
    option = plain[found[0]]
    for place in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", words):
        before, after = _NO_DENIAL.sub("", words[: place.start()]), words[place.end() :]
        clause = re.split(_CLAUSE, before)[-1] + " " + re.split(_CLAUSE, after, maxsplit=1)[0]
        if _DENIED.search(clause) or _OPEN_QUESTION.search(clause):
            return None
    return letters[found[0]]
