"""Hold the scorers against lmms-eval's functions on generated answers, and explain every difference.

    python scripts/lmms_eval/compare_scorers.py [--count 100000] [--seed 0]

Needs lmms-eval. Prints, for each pair of functions, how many answers are scored alike, and of the others how many for
which reason, with an example. A difference without a reason, or a letter that is not the one meant, makes the exit
status 1. What a generated choice means is known; docs/answers.md has the reasons.
"""

import argparse
import random
import sys
from collections import Counter

import answer_strings as strings

from llava.eval import scorers
from llava.eval.choices import chosen_letter

# --- metrics with a value ---


def exact(rng, theirs):
    answer = strings.text(rng)
    said = rng.choice((answer, strings.altered(rng, answer), f" {answer}"))
    found = (
        scorers.exact_match(said, answer),
        float(theirs.exact(predictions=[said], references=[answer])["exact_match"]),
    )
    return (said, answer), *found, "blanks at the ends" if said != said.strip() or answer != answer.strip() else None


def vqa(rng, theirs):
    return _vqa(rng, scorers.vqa_accuracy, theirs.vqa)


def textvqa(rng, theirs):
    return _vqa(rng, scorers.textvqa_accuracy, theirs.textvqa)


def _vqa(rng, ours, theirs):
    pool = [strings.text(rng) for _ in range(2)]
    pool += [strings.altered(rng, words) for words in pool]
    people = rng.choices(pool, k=rng.choice((10, 10, 10, 5, 3, 2, 1)))
    said = rng.choice(pool)
    reason = "a single answer" if len(people) == 1 else None
    return (said, people), ours(said, people), theirs(said, people), reason


def anls(rng, theirs):
    answers = [strings.text(rng) for _ in range(rng.randint(1, 3))]
    said = strings.altered(rng, rng.choice(answers))
    return (said, answers), scorers.anls(said, answers), theirs.anls(answers, [said])["anls"], None


def relaxed(rng, theirs):
    answer = strings.number(rng)
    said = strings.near(rng, answer)
    reason = None
    if said.strip().lower() == answer.strip().lower():
        reason = "blanks at the ends" if said.lower() != answer.lower() else "the same text, no finite number"
    return (said, answer), scorers.relaxed_accuracy(said, answer), float(theirs.relaxed(said, answer)), reason


# --- letters: both are held against what is meant ---


def _letters(rng, theirs):
    answer, options, meant, form = strings.choice(rng)
    ours, other = chosen_letter(answer, list(options)), theirs(answer, options)
    reason = None
    if ours == meant:
        reason = f"{form}: as meant here, {_wrong(other, meant)} there"
    elif ours is None:
        reason = f"{form}: in doubt here, {'as meant' if other == meant else _wrong(other, meant)} there"
    return (answer, options), ours, other, reason


def _wrong(letter, meant) -> str:
    if letter is None:
        return "none"
    return "one where none is meant" if meant is None else "another letter"


def mmmu(rng, theirs):
    return _letters(rng, theirs.mmmu)


def mmbench(rng, theirs):
    return _letters(rng, theirs.mmbench)


def mcq(rng, theirs):
    return _letters(rng, theirs.mcq)


# --- lmms-eval's ---


class Theirs:
    """lmms-eval's functions, called alike."""

    def __init__(self):
        from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
        from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
        from lmms_eval.tasks._task_utils.mmmu_mcq_utils import get_multi_choice_info, parse_mmmu_multi_choice_response
        from lmms_eval.tasks.chartqa.utils import relaxed_correctness
        from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
        from lmms_eval.tasks.textvqa.utils import textvqa_process_results
        from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val
        from loguru import logger

        logger.remove()  # MMBench's notes about an A that may be an article
        self.exact, self.anls, self.relaxed = exact_match_hf_evaluate, anls, relaxed_correctness
        self._vqa, self._textvqa, self._extract = vqav2_process_results_val, textvqa_process_results, extract_mcq_answer
        self._info, self._parse, self._bench = (
            get_multi_choice_info,
            parse_mmmu_multi_choice_response,
            MMBench_Evaluator(),
        )

    def vqa(self, said, people):
        answers = [{"answer": answer, "answer_id": at} for at, answer in enumerate(people)]
        return self._vqa({"question_id": 1, "answers": answers}, [said])["exact_match"]

    def textvqa(self, said, people):
        return self._textvqa({"question_id": 1, "answers": list(people)}, [said])["exact_match"]

    def mmmu(self, answer, options):
        names, letters = self._info(options)
        return self._parse(answer, letters, names)

    def mmbench(self, answer, options):
        choices = dict(zip("ABCD", options, strict=False))
        return self._bench.can_infer(answer, choices) or None

    def mcq(self, answer, options):
        return self._extract(answer, [chr(65 + at) for at in range(len(options))]) or None


PAIRS = (exact, vqa, textvqa, anls, relaxed, mmmu, mmbench, mcq)


def compare(pair, theirs, count: int, seed: int) -> int:
    """Print one function's table. Returns how many differ without a reason or get a letter that is not meant."""
    rng, kinds, examples = random.Random(f"{seed}/{pair.__name__}"), Counter(), {}
    for _ in range(count):
        given, ours, other, reason = pair(rng, theirs)
        alike = ours == other or (isinstance(ours, float) and abs(ours - other) < 1e-12)
        wrong = isinstance(ours, str) and reason is None
        kind = "NO REASON" if wrong or not (alike or reason) else "alike" if alike else reason
        kinds[kind] += 1
        examples.setdefault(kind, f"{given!r}: here {ours}, there {other}")
    print(f"{pair.__name__}: {kinds.pop('alike', 0):,} of {count:,} alike")
    for kind, number in kinds.most_common():
        print(f"  {number:,} {kind}\n      {examples[kind]}")
    return kinds["NO REASON"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="answers, over all functions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)  # MMMU's draws a letter where it finds none
    theirs = Theirs()
    faults = sum(compare(pair, theirs, args.count // len(PAIRS), args.seed) for pair in PAIRS)
    print(f"{faults} differences without a reason" if faults else "every difference has a reason")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
