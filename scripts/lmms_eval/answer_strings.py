"""Generated answers: short texts and numbers as datasets have them, and choices whose meaning is known."""

import random

_WORDS = (
    *(
        "red",
        "Blue",
        "two",
        "none",
        "ten",
        "the",
        "a",
        "An",
        "dont",
        "couldnt've",
        "it's",
        "Im",
        "lets",
        "who's",
        "hes",
    ),
    *(
        "street",
        "Main St.",
        "U.S.A.",
        "left/right",
        "t-shirt",
        "yes",
        "no",
        "10:30",
        "3.5",
        "1,000",
        "1,,000",
        "12,5",
        "5.",
    ),
    *(
        "café",
        "straße",
        "İstanbul",
        "ＡＢ",
        "$5",
        "#7",
        "50%",
        "p. 3",
        "(left)",
        '"stop"',
        "rock&roll",
        "x_y",
        "a=b",
        "...",
    ),
)
_NUMBERS = (
    *(
        "0",
        "-0",
        "0.0",
        "5",
        "05",
        "-5",
        "+5",
        "−5",
        "5.25",
        "5.0",
        "1e3",
        "1E-3",
        "1e999",
        "-1e999",
        "nan",
        "NaN",
        "inf",
    ),
    *(
        "-inf",
        "Infinity",
        "infinity",
        "1,000",
        "1_000",
        "1000",
        "950",
        "1050",
        "1051",
        "40%",
        "41%",
        "0.4",
        "40 %",
        "5%%",
    ),
    *(
        "%",
        "$5",
        "5 kg",
        "½",
        "５",
        " 5",
        "5\n",
        "100",
        "95",
        "105",
        "105.1",
        "",
        ".5",
        "5.",
        "nan%",
        "inf%",
        "yes",
        "Yes",
    ),
)
OPTIONS = (
    ("cat", "dog", "a bird", "none of the above"),
    ("yes", "no"),
    ("3", "5", "7", "12", "30"),
    ("on the table", "under the table", "beside the red chair", "cannot be seen"),
    ("Mercury", "vitamin C", "Plan B", "iron"),
    ("stripes", "dots", "no pattern", "both stripes and dots", "checks", "plaid"),
)


def text(rng: random.Random) -> str:
    """Words, marks and blanks as answers have them."""
    parts = rng.choices(_WORDS, k=rng.randint(1, 4))
    joins = rng.choices((" ", " ", " ", "  ", ", ", ",", "-", " / ", "? ", "\n", "\t", ""), k=len(parts))
    whole = "".join(part + join for part, join in zip(parts, joins, strict=True))
    return whole if rng.random() < 0.2 else whole.strip()


def altered(rng: random.Random, words: str) -> str:
    """The same text, or one with a few characters changed, or in other case."""
    characters = list(words)
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        at = rng.randrange(len(characters) + 1)
        characters[at : at + rng.randint(0, 1)] = rng.choice(("", "x", " ", ".", "'"))
    return rng.choice((str, str.upper, str.lower))("".join(characters))


def number(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(_NUMBERS)
    written = f"{rng.choice((1, 10, 1000)) * rng.uniform(-1, 2):.{rng.randint(0, 3)}f}"
    return written + rng.choice(("", "", "%", " "))


def near(rng: random.Random, written: str) -> str:
    """A number about 5% away, or the same, or any."""
    try:
        value = float(written)
    except ValueError:
        return rng.choice((written, written.upper(), number(rng)))
    factor = rng.choice((1, 0.95, 1.05, 0.949, 1.051, 1.01, 2))
    return rng.choice((written, number(rng), repr(value * factor), f"{value * factor:.2f}"))


# --- choices ---

_SHAPES = (
    *(
        "{}",
        "{}",
        "({})",
        "**{}**",
        "**({})**",
        '"{}"',
        "'{}'",
        "[{}]",
        "`{}`",
        "${}$",
        "*{}*",
        "“{}”",
        "\\boxed{{{}}}",
    ),
    *("option {}", "Option {}", "choice {}", "option ({})", "\\text{{{}}}"),
)
_CHOOSING = (
    *(
        "{}",
        "{}.",
        "Answer: {}",
        "answer: {}.",
        "**Answer:** {}",
        "Answer:\n{}",
        "The answer is {}",
        "The answer is: {}.",
    ),
    *(
        "The correct answer is {}.",
        "Final answer: {}",
        "I think it's {}.",
        "I would choose {}.",
        "It is {}.",
        "So, {}.",
    ),
    *(
        "Therefore, the answer is {}.",
        "The best choice is {}.",
        "{} is correct.",
        "{} is the right answer.",
        "Probably {}.",
    ),
    *("答案：{}", "答案是{}。", "选{}", "My answer would be {}.", "I'll go with {}.", "The answer should be {}!"),
    *("The answer to the question is {}.", "Hence {}", "{} is the best answer.", "That leaves {}.", "It must be {}."),
)
_NOT = (
    *(
        "{} is wrong.",
        "{} is not correct.",
        "It is not {}.",
        "It isn't {}.",
        "We can rule out {}.",
        "The answer is not {}.",
    ),
    *(
        "I don't think it's {}.",
        "{} can be excluded.",
        "The answer cannot be {}.",
        "{} is unlikely.",
        "不是{}。",
        "Not {}.",
    ),
    *("I doubt that it is {}.", "{} is incorrect because it does not fit.", "Anything but {}.", "{} does not fit."),
)
_OTHERS = (
    *("A quick look helps.", "I see a picture.", "It is not easy.", "A thing like this, I guess.", "As an AI, I look."),
    *("Let me think step by step.", "There are several options.", "I am not sure.", "Look at the image", "A big one."),
)


def _options_told(options) -> str:
    return "\n".join(f"{chr(65 + at)}. {option}" for at, option in enumerate(options))


def choice(rng: random.Random) -> tuple[str, tuple[str, ...], str | None, str]:
    """(answer, options, the letter that is meant, None where none or more than one is, the form of the answer)."""
    options = rng.choice(OPTIONS)
    letters = [chr(65 + at) for at in range(len(options))]
    meant, other, *_ = rng.sample(letters, 2)

    def shaped(letter: str) -> str:
        return rng.choice(_SHAPES).format(letter)

    def chosen(letter: str) -> str:
        return rng.choice(_CHOOSING).format(shaped(letter))

    def denied(letter: str) -> str:
        return rng.choice(_NOT).format(shaped(letter))

    own, more, told = options[letters.index(meant)], rng.choice(_OTHERS), _options_told(options)
    in_a_line = " ".join(f"({letter}) {option}" for letter, option in zip(letters, options, strict=True))
    forms = {
        "the letter, chosen in words": ((chosen(meant),), meant),
        "the letter, and other sentences": (
            (f"{more} {chosen(meant)}", f"{more}\n\n{chosen(meant)}", f"{shaped(meant)}\n{more}"),
            meant,
        ),
        "another is denied": (
            (
                f"{chosen(meant)}\n{denied(other)}",
                f"{denied(other)}\n{chosen(meant)}",
                f"{denied(other)} {chosen(meant)}",
                f"Not {other} but {meant}",
                f"{shaped(other)} is wrong, so {shaped(meant)}",
            ),
            meant,
        ),
        "the letter and its text": (
            (
                *(f"{shaped(meant)}. {own}", f"({meant}) {own}", f"{meant}) {own}", f"{meant}: {own}"),
                f"The answer is {meant}: {own}.",
            ),
            meant,
        ),
        "all options, then the letter": ((f"{told}\n{chosen(meant)}",), meant),
        "the text alone": ((own, f"{own.capitalize()}."), meant),
        "all is denied": (
            (
                *(denied(other), f"{denied(meant)} {denied(other)}"),
                f"The answer is neither {shaped(meant)} nor {shaped(other)}",
            ),
            None,
        ),
        "two letters": (
            (
                *(f"{shaped(meant)} or {shaped(other)}", f"The answer is {shaped(meant)} or {shaped(other)}."),
                *(f"Both {shaped(meant)} and {shaped(other)}", f"Answer: {meant}, {other}"),
            ),
            None,
        ),
        "all options alone": ((told, in_a_line), None),
        "a question": ((f"Is it {shaped(meant)}?",), None),
        "no letter, an A or I as a word": ((more,), None),
    }
    form = rng.choice([name for name, (answers, _) in forms.items() for _ in answers])
    answers, letter = forms[form]
    return rng.choice(answers), options, letter, form
