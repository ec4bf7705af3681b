"""The patterns by which `llava.eval.choices` reads an answer: how letters are written, and what is said of them."""

import re

# --- what an answer is wrapped in ---

WIDE = str.maketrans("（）［］【】．：，、。；！？—–", "()[][].:,,.;!?--") | dict.fromkeys(
    map(ord, "「」『』“”《》〈〉"), '"'
)
WIDE |= str.maketrans("‘’", "''")
WIDE |= {ord("Ａ") + i: ord("A") + i for i in range(26)} | {ord("ａ") + i: ord("a") + i for i in range(26)}
FINAL = re.compile(
    r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|$)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)",
    re.DOTALL | re.IGNORECASE,
)
COMMANDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
MARKUP = re.compile(
    r"\*+|`+|\$+|(?<!\w)_+|_+(?!\w)|\\[()\[\]]|^[ \t]*(?:#+|>|[-•])[ \t]+|</?[a-z][a-z0-9]*>", re.MULTILINE
)
QUOTED = re.compile(r"(?<![0-9A-Za-z_])([\"'])\s*\(?([A-Za-z])\)?([.,:]?)\s*\1(?![0-9A-Za-z_])")
WHOLE = re.compile(r"[(\[{<\"']?\s*([A-Za-z])\s*[)\]}>\"']?[.:,;!]?[)\"']?")

# --- letters ---

OPEN, CLOSE = "\ue000", "\ue001"  # around a mention: B, B! where it can be nothing but an option, B!* in a box
BOXED, ITS_TEXT = "\ue002", "\ue003"  # in front of a letter in a box; in place of an option's text behind its letter
_BEFORE, _AFTER = r"(?<![0-9A-Za-z_À-ɏ.'°+#/-])", r"(?![0-9A-Za-z_'°+#-])"  # B-52, C++, 20 °C, D.C. are none
CALLED = r"(?:options?|choices?|选项)\s*:?\s*"
MENTION = re.compile(
    rf"""
    (?P<bracketed> (?:{BOXED}|(?<![0-9A-Za-z])) [(\[{{] \s* (?:{CALLED})? ([A-Za-z]) \s* [.:]? \s* [)\]}}])
    | (?P<named> (?i:(?<![a-z]){CALLED}) {BOXED}? (?: \(\s*([A-Za-z])\s*\) | ([A-Za-z]){_AFTER} ))
    | (?P<bare> (?<!\d[ ]) (?<!°[ ]) {_BEFORE} ([A-Z]) {_AFTER} (?!\.\w) (?! (?<=[A-Z]\.[ ].) \.\s[A-Z] ))
    | (?P<small> (?<![0-9A-Za-z_.'-]) ([a-z]) (?= \) | [.:]?\s*$ | [.:]?\s*\n ))
    """,
    re.VERBOSE,
)
# after which an A is no article
NO_NOUN = re.compile(
    r"""
    \s+ (?: is | isn't | are | aren't | was | and | or | nor | because | since | seems | looks | appears | would | could
        | should | cannot | can't | but | shows | does | doesn't | while | whereas | rather\ than | instead\ of ) \b
    | \s* [^\w\s] | \s* $ | \s* \n | \s* [\u3040-\u9fff] | \s+ \ue000
    """,
    re.VERBOSE,
)
ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|No|Fig|vs|e\.g|i\.e)\.\s*$")
TOKEN = rf"{OPEN}[A-Z]!?\*?{CLOSE}"
_JOINED = (
    r"[ \t]*(?:,|/|&|;|->|[|→>-]|\.\.\.)?[ \t]*(?:and/or|and|or|nor|as well as|to|through|或者?|和|与|及)?"
    r"[ \t]*(?:maybe|perhaps|possibly|also|even)?[ \t]*"
)
GROUP = re.compile(rf"{TOKEN}(?:{_JOINED}{TOKEN})*")

# --- what is said of them ---

CLAUSE = re.compile(
    r"[.,;:!?\n]|-\s|\b(?:but|so|therefore|thus|hence|because|since|while|whereas|although|though|then)\b"
    r"|而是|所以|因此|但"
)
DENIED = re.compile(
    r"""
    \b (?: not | never | no | nor | neither | none | nobody | cannot | without | except | excluding | exclud\w*
        | eliminat\w* | rul(?:e|es|ed|ing)\ out | discard\w* | reject\w* | rather\ than | instead\ of | unlike
        | unlikely | other\ than | apart\ from | doubt\w* | impossible | wrong\w* | incorrect\w* | false | invalid
        | mistaken | hardly | barely | scarcely | least | less | worst | far\ from | lack\w* | absent | missing
        | fail\w* | contradict\w* ) \b
    | n't\b | 不 | 非 | 排除 | 除了 | 错
    """,
    re.IGNORECASE | re.VERBOSE,
)
# after a letter: what is denied is what comes next
NOT_THE_NEXT = re.compile(
    rf"\b(?:rather than|instead of|unlike|other than|apart from|except)\b"
    rf"|\b(?:(?:and |but )?not(?=\s+(?:{CALLED})?{OPEN}))",
    re.IGNORECASE,
)
ALL_BUT = re.compile(r"\b(?:anything|everything|all|any)\s+but\b", re.IGNORECASE)
NO_DENIAL = re.compile(r"\b(?:no|without|beyond)\s+(?:a\s+|any\s+)?(?:doubt|question)\b", re.IGNORECASE)
OPEN_QUESTION = re.compile(r"\b(?:if|whether|unless|suppos\w+|assum\w+|either|between)\b|如果|是否", re.IGNORECASE)
UNREAL = re.compile(r"\b(?:if|suppos\w+|assum\w+)\b.*\bwould\b", re.IGNORECASE)
GOES_ON = re.compile(r"\s*,?\s*(?:or|if|unless|when|in case|otherwise)\b", re.IGNORECASE)
_HOW = (
    r"(?:(?:clearly|definitely|probably|likely|indeed|simply|obviously|certainly|perhaps|maybe|actually|the|an?|most)"
    r"\s+)*"
)
_BE = (
    r"(?:is|was|'s|are|(?:would|must|should|will|has\s+to|may|might|could|can)(?:\s+also)?(?:\s+only)?\s+be|seems\s+to\s+be"
    r"|being)"
)
# in front of a letter: it is said to be the answer
CUE = re.compile(
    rf"""
    (?: \b (?: answers? | solution | selection | conclusion | choice | option | pick | guess
            | (?:correct|right|best|true|only)(?:\s+\w+)? ) \b [^.;:!?\n]{{0,60}}? (?: \b{_BE} | 's | : | = | -> | → )
        | \b ans(?:wer)? \b \.? | \b selected
        | \b (?: it | this | that | which | one ) \s* {_BE}
        | \b (?: I | I'd | I'll | we | we'd | to ) \s+ (?:would\s+|will\s+)?
            (?: say | think | believe | guess | suppose ) (?:\s+that)?
        | \b (?: choos | chose | pick | select | prefer | go\ with | going\ with | opt\ for | vote\ for )
            (?: e | s | es | ed | ing )?
        | \b (?: so | thus | therefore | hence | leav(?:es|ing)(?:\s+us\s+with)? | left\ with | remaining | only
            | conclude(?:\s+that)? | looks\ like | points\ to | probably | likely | definitely | maybe | perhaps
            | certainly | clearly | obviously | must\ be | should\ be )
        | => | -> | [→⇒]
        | (?: 答案 | 选择 | 应选 | 应该选 | 选 | 而是 | 所以 | 因此 ) (?: 应该是 | 应为 | 是 | 为 | : )?
        | (?:应该|认为)是
    ) \s* ,? \s* :? \s* {_HOW} :? \s* (?:{CALLED}|letter\s+)? [(]? $
    """,
    re.IGNORECASE | re.VERBOSE,
)
BUT = re.compile(r"(?:\bbut|而是)\s*(?:rather\s*)?$", re.IGNORECASE)
# behind a letter, the same
PREDICATE = re.compile(
    rf"\s*(?:(?:is|was|seems|looks|appears|would be)(?:\s+to\s+be)?\s+(?:my\s+|more\s+|{_HOW})*"
    r"(?:correct|right|best|true|accurate|answer|appropriate|suitable|plausible|one|choice|option|solution|fit|left)\b"
    r"|is\s*[.!]?\s*$|remains\b|fits\b|(?:选项)?(?:是正确|正确|是对|对))",
    re.IGNORECASE,
)
SECOND_THOUGHTS = re.compile(
    r"\b(?:wait|actually|correction|sorry|on second thought|hmm|scratch that|no,)", re.IGNORECASE
)
# behind the letter that an answer begins with: it goes on about it
LEADS = re.compile(
    r"\)|\s*[.,:;)-](?=\s|\w|$)|\s+(?:(?:is|was)\s+(?:the|an?)|because|since|as|shows|rather than|instead of|over"
    r"|(?:and )?not)\b|\n"
)
