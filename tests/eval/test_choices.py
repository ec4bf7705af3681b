"""Which option an answer chooses: answers as people and models write them, each with the letter that is meant."""

import importlib.util
import random
from pathlib import Path

import pytest

from llava.eval.choices import chosen_letter

OPTIONS = ["cat", "dog", "a bird", "none of the above"]

B = (
    *("B", "b", "(B)", "(b)", "[B]", "{B}", "B.", "b.", "B)", "b)", "B:", '"B"', "'B'", '"B".', "**B**", "**B.**"),
    *("**(B)**", "*B*", "__B__", "`B`", "$B$", "$\\boxed{B}$", "\\boxed{B}", "\\boxed{\\text{B}}"),
    *("\\boxed{\\textbf{(B)}}", "\\boxed{B. dog}", "\\boxed{dog}", "\\(B\\)", "\\[B\\]", "<answer>B</answer>"),
    *("<answer>(B)</answer>", "<think>A? no, A and C.</think>B"),
    *("<think>the answer is A</think>\n\nThe answer is B.", "Option B", "option b", "Option (B)", "Choice B"),
    *("choice: B", "(Option B)", "Answer: B", "answer: b", "ANSWER: B", "Answer B", "Answer: (B)"),
    *("Answer: **B**", "**Answer:** B", "**Answer: B**", "Answer: \\boxed{B}", "The answer is B"),
    *("The answer is b", "the answer is b.", "The answer is: B", "The answer is (b)", "The answer is **B**."),
    *('The answer is "B".', "The answer is 'B'", "The correct answer is B.", "The correct answer is (B) dog."),
    *("The correct answer is: B. dog", "The correct option is B", "Correct option: B", "The best choice is B."),
    *("The right answer would be B.", "My answer is B.", "Final answer: B", "Final Answer: (B)"),
    *("### Final Answer\nB", "Answer:\nB", "Answer\n\nB", "I think it's B.", "I think it is B"),
    *("I believe B is correct.", "I'd say B.", "I would choose B.", "I choose B", "I'll go with B"),
    *("I would pick option B.", "It is B.", "It's B", "It must be B.", "It should be (B).", "Probably B"),
    *("Probably B.", "Definitely B!", "So B.", "So the answer is B.", "Therefore, B.", "Thus, the answer is B."),
    *("Hence B", "therefore the correct option is B", "B is correct.", "B is the correct answer.", "B is right"),
    *("B is the best answer.", "B seems right.", "B is my answer", "B is the dog", "B, because it barks."),
    *("B because it barks", "B since it barks", "B, it barks", "B - the one that barks", "B – the dog"),
    *("B—the dog", "B: dog", "B: it barks", "B) dog", "(B) dog", "(B) because", "B. dog", "b) dog", "b. dog"),
    *("B dog", "Reasoning: the animal barks.\n\nB", "The animal barks.\nB.", "The animal barks. B"),
    *("It barks.\n\n**B**", "It barks.\n\nAnswer: B", "B\nIt barks.", "B\n\nBecause", "B.\nThe dog"),
    *("Not A but B", "not A, but B", "It is not A but B.", "A is wrong, B is correct."),
    *("A is not correct. The answer is B.", "A and C are wrong, so B"),
    *("A, C and D are wrong, so the answer is B.", "A, C, and D are incorrect, leaving B."),
    *("Neither A nor C, so B.", "Neither A nor C; the answer is B", "The answer is not A, it is B."),
    *("The answer isn't A. It's B.", "The answer is B, not A.", "B, not A", "B, not A.", "B rather than A"),
    *("B and not A", "The answer is B instead of A.", "(B), not (A)", "Option B, not option A."),
    "The answer is B. Option A shows a cat and option C shows a bird.",
    *("The answer is (B) because (A) and (C) are not dogs.", "The answer is B since A shows a cat."),
    "Looking at A, we see a cat. Looking at C, a bird. The answer is B.",
    *("A: cat\nB: dog\nC: bird\nD: none\nAnswer: B", "A. cat\nB. dog\nC. a bird\nThe answer is B", "dog", "Dog"),
    *("dog.", "A dog", "a dog", "A dog.", "The dog", "The answer is dog", "The answer is a dog."),
    *("The answer is A dog", "It is a dog.", "A dog sits there.", "I see a dog", "Answer: dog", "**dog**"),
    *(
        '"dog"',
        "The animal in the picture is a dog, which barks.",
        "答案：B",
        "答案是B",
        "答案是 B。",
        "答案为B",
        "选B",
        "选择B",
    ),
    *(
        "我选B",
        "选项B",
        "正确答案是B",
        "正确答案：（B）",
        "（B）",
        "Ｂ",
        "Ｂ．",
        "B。",
        "B、狗",
        "应该选B。",
        "不是A，而是B",
        "因此，答案是B。",
    ),
    *(
        "答案：**B**",
        "B是正确的",
        "B 是正确的",
        "选项B是正确的",
        "There is no doubt: B.",
        "Without a doubt, B is correct.",
    ),
    *("Answer: B\n", "  B  ", "B\n\n", "B.\n\nExplanation: A cat meows.", "A dog is shown; B is correct."),
    *("A quick look shows it barks, so the answer is B.", "<|begin_of_box|>B<|end_of_box|>"),
    *("The answer is A. Wait, the answer is B.", "The answer is B. Wait, let me check. Yes, the answer is B."),
    *("The answer: B", "answer = B", "=> B", "-> B", "Answer -> B"),
    "A is incorrect because it is a cat. B is correct because it barks.",
    *("Eliminating A, C and D, the answer is B.", "B is the correct option, as A shows a cat."),
    *("Based on the picture, the answer should be B.", "B!", "The answer is B!", "B is true", "(B).", "((B))"),
    *("[[B]]", "Answer: [B]", "Answer: [[B]]", "The answer to the question is B."),
    *("The answer to what is shown in the picture is B", "option: B", "Option: B. dog"),
    *("The final answer is $\\boxed{B}$.", "The final answer is: $\\boxed{\\text{(B)}}$"),
    *("The correct answer is option B, because the picture shows a dog and not a cat.", "I'm going with B here."),
    *("Looks like B to me.", "My pick: B", "Must be B", "Everything points to B"),
    *("If I had to choose, I'd say B.", "If I have to choose one, B.", "Although A is tempting, B is correct."),
    *("While A shows a cat, the answer is B.", "At first glance A, but the answer is B", "Not A. Not C. B."),
    *("It's not A, not C, so B.", "A is out. C is out. B.", "Yes, B.", "Sure! B", "Sure, the answer is B."),
    *("Okay: B", "1. B", "Q1: B", "Answer 1: B", "Ans: B", "Ans. B", "ANS B", "Solution: B"),
    *("Choice (B) is correct", "The choice is (B)", "Selected: B", "Selected option: B", "Option: (B)"),
    *("The dog (B) is awake.", "Wrong answers: A, C, D. Correct: B", "Between A and B, I choose B.", "A or B? B."),
    *("B (dog)", "(B) - dog", "B = dog", "B\tdog", "dog (B)", "dog, B", "a dog. B", "Dog - B"),
    *("The answer is B\n\nA is wrong because...", "The answer is B.\nA) is a cat\nC) is a bird"),
    *("**Option B: dog**", "**Correct Answer: B. dog**", "Correct answer: **B. dog**", "The answer is **B. dog**"),
    *("**B. dog** is the correct answer.", "The correct choice is: **(B) dog**.", "$\\mathbf{B}$", "\\mathrm{B}"),
    *("\\textbf{B}", "Therefore, the final answer is: $\\boxed{B}$. I hope it is correct."),
    *("\\boxed{\\text{B. dog}}", "\\boxed{\\textbf{Option B}}", "### B", "> B", "- B", "* B", "B\n", "B\r\n"),
    *("B;", "B,", "'B.'", "<B>", "<b>B</b>", '{"answer": "B"}', "answer=B", "answer is B)", "answer is (B"),
    *(
        "The answer is B).",
        "答案应该是B",
        "答案应为B。",
        "应该是B",
        "我认为是B",
        "我认为答案是B",
        "所以选B",
        "故选B",
        "故选：B",
        "故选：B．",
    ),
    *("选择B选项", "B选项", "B选项正确", "排除A，选B", "A不对，B对", "I don't know, maybe B", "I don't know. B"),
    *(
        "It is not clear, B.",
        "It's not clear, but I think B.",
    ),
)

A = (
    *("The animal is a cat, so A.", "The animal is a cat, so the answer is A.", "A", "A.", "A is the answer."),
    *("The answer is A because it meows.", "The answer is A.", "Answer: A", "Answer: A. cat", "Answer: A cat"),
    *("The answer is A, as the cat is visible.", "I choose A.", "A because it meows", "A - the cat"),
    *("No, the answer is A.", "I considered B, but A is right.", "B was my first guess, but it's A."),
    *("B was my first thought; the answer is A.", "The answer was thought to be B but is A."),
    *(
        "Most people would say B, but the answer is A.",
        "A, not B",
        "A instead of B",
    ),
)

C = (
    *("Let's go with option C.", "The picture shows option C.", "Given the options, C is the most suitable."),
    *("C would be the best fit.", "Among the options, only C is correct.", "Only option C matches.", "A bird"),
    *(
        "A bird is flying.",
        "B is the wrong option, it should be C.",
    ),
)

D = (
    *("none of the above", "None of the above.", "None of the above are correct", "It's none of the above, D."),
    *("Cat? No. Dog? No. So D.",),
)

NONE = (
    *(
        "There is a letter B on it",
        "The answer is a",
        "It's a",
        "The letter a is shown",
        "(c) 2019 Getty",
        "cat(s), dog(s)",
    ),
    *("B or C", "A or B", "A and B", "A, B", "A/B", "A & B", "Answer: A, B", "Answer: A or B"),
    *("The answer is A or B", "The answer is either A or B", "The answer is A and B"),
    *("The answer is both A and B.", "Both A and B", "A, B, C, D", "ABCD", "AB", "E", "The answer is E", "(E)"),
    *("neither", "The answer is neither A nor B", "Neither A nor B", "Not B", "not B", "It is not B."),
    *("It isn't B", "B is wrong", "B is not correct.", "B is incorrect", "The answer is not B"),
    *("The answer isn't B.", "The answer cannot be B", "It can't be B", "I don't think the answer is B"),
    *("I don't think it's B.", "I do not believe B is correct", "B is unlikely", "B can be ruled out"),
    *("We can rule out B", "Eliminate B", "All except B", "Anything but B", "Is it B?", "B?", "Could it be B?"),
    *("Is the answer B?", "If it barked, the answer would be B", "The answer is B if it barks", "not sure"),
    *("I am not sure", "I don't know", "unclear", "Cannot be determined", "\\boxed{A, B}"),
    *("\\boxed{A} or \\boxed{B}", "\\boxed{}", "<answer>A or B</answer>", "<answer></answer>", "It is not a dog"),
    *("It isn't a cat or dog", "There is no dog.", "neither a cat nor a dog", "cat or dog", "a cat and a dog"),
    *("Is it a dog or a cat?", "The answer is A. The answer is B.", "A\nB", "A\nB\nC\nD"),
    *("A. cat\nB. dog\nC. a bird", "A. cat B. dog C. bird", "A) cat B) dog", "(A) cat (B) dog", "(A) or (B)"),
    *("(A) or (B)?", "A: cat, B: dog", "Maybe A, maybe B", "It could be A or it could be B."),
    *("It could be A. It could also be B.", "A is correct and B is correct", "A. dog", "A: dog", "(A) dog"),
    *("A - dog", "The answer is A, dog", "The answer is A: a dog", "C. dog", "Vitamin B is shown", "Plan B"),
    *("I have a plan", "A picture of something", "A nice animal", "None", "I see", "I", "I cannot answer."),
    *("As an AI, I cannot", "A big thing sits on a mat", "The A team", "Grade A meat", "An A-frame house"),
    *("The B-52", "B-52", "B2", "B12", "USB", "AC/DC", "J. B. Smith", "U.S.A.", "C++", "C#", "20 C", "20 °C"),
    *(
        "D.C.",
        "Washington D.C.",
        "P.S. hello",
        "不是B",
        "不选B",
        "A或B",
        "A和B",
        "答案不是B",
        "B是错误的",
        "选项B不正确",
    ),
    *("Option A and option B are both plausible", "options A and B"),
    *("Option A shows a cat. Option B shows a dog.", "B is not wrong", "B cannot be wrong"),
    *("The answer is A or, more likely, B", "A, maybe B", "A? B?", "the answer is not a"),
    *("A is better than B but B is better than C", "Everything except B fits", "Not A, not B", "not A, B or C"),
    *("A dog and a cat", "The dog is not here; it is a cat.", "It looks like a cat but is a dog"),
    *("The answer is not B.", "The answer is not (B)", "The statement A is false."),
    *("The cat (A) is asleep, the dog (B) is awake.", "B is the incorrect answer.", "B is the least likely."),
    *("The least likely is B.", "The wrong answer is B.", "The incorrect option is B.", "Incorrect: B"),
    *("Wrong: B", "Incorrect options: A, C, D", "The answer is anything but B.", "The only wrong one is B"),
    *("It's hard to say whether it is A or B.", "Out of A and B, B.", "A? No. B? Yes.", "B (cat)", "cat (B)"),
    *("A: No\nB: Yes\nC: No", "A ✗ B ✓ C ✗", "正解はBです", "La respuesta es B", "Die Antwort ist B.", "Réponse : B"),
    *("B选项错误", "排除B", "A和B都不对", "A、B都对", "不是A也不是B", "I would not choose B.", "I wouldn't say B."),
    *("Nobody would choose B.", "You should not choose B.", "Never B.", "B is hardly correct."),
    *("B is far from correct.", "B fails.", "B fails to explain it.", "B contradicts the picture."),
    *("B lacks a dog.", "B is too small.", "B does not apply.", "B is absent", "I considered B."),
    *("B seems correct, but A is.", "B looks right at first, however the answer is A.", "B... no, C."),
    *("B. Actually C.", "B. On second thought, C.", "B → C", "B > A", "A < B", "C beats B", "A photo of B."),
    *("See figure B.", "In panel B a dog is seen", "Team B won.", "Vitamin B.", "Building B.", "Type B."),
    *("The shirt says B.", "Line B.", "Exit B", "Seat 12 B", "Mr. B.", "B.C.", "A.M.", "e.g. B", "ABC", "Both"),
    *("All of the above", "A & B are right", "B/C", "B|C", "B C", "A then B", "A, B and C", "A to C", "A-C"),
    *(
        "A–C",
        "A through C",
        "A...C",
        "from A to B",
    ),
)


@pytest.mark.parametrize(
    ("answers", "letter"), [(A, "A"), (B, "B"), (C, "C"), (D, "D"), (NONE, None)], ids=["A", "B", "C", "D", "none"]
)
def test_the_letter_that_is_meant(answers, letter):
    wrong = {answer: found for answer in answers if (found := chosen_letter(answer, OPTIONS)) != letter}
    assert not wrong and len(answers) > 1


# what is meant can be told, but not by these rules: another letter is never chosen
DOUBT = {
    "B it is.": "B",
    "Though it might be A, I think it's B.": "B",
    "A might be right, but B is better.": "B",
    "Between A and B, B is correct.": "B",
    "- A: incorrect\n- B: correct\n- C: incorrect": "B",
    "People say B; the truth is A.": "A",
    "Some might choose B. However, A is correct.": "A",
    "B. Correction: C": "C",
    "I pick B over C.": "B",
}


@pytest.mark.parametrize(("answer", "letter"), DOUBT.items())
def test_in_doubt_none(answer, letter):
    assert chosen_letter(answer, OPTIONS) in (letter, None)


@pytest.mark.parametrize(
    ("options", "answers"),
    [
        (["yes", "no"], {"Yes.": "A", "No, there is no cat.": "B", "yes, there is no dog": "A", "(B) no": "B"}),
        (["yes", "no"], {"yes or no": None, "There is no doubt": None, "no. B": "B", "yes (B)": None}),
        # options that are letters themselves: a bare one may be either
        (["C", "B", "A"], {"A": None, "B": "B", "The answer is C": None, "(A)": "A", "Option C": "C", "A. C": "A"}),
        (["vitamin C", "Plan B", "iron"], {"(B) Plan B": "B", "A) vitamin C": "A", "vitamin C": "A", "Plan B.": "B"}),
        (["not there", "on the left"], {"It is not there.": "A", "not on the left": None, "B. on the left": "B"}),
        (["3", "5"], {"5": "B", "The answer is 5.": "B", "A: 3": "A", "A: 5": None, "3 or 5": None}),
        (list("abcdefghij"), {"I": "I", "I see a dog": None, "(I)": "I", "The answer is I.": "I", "J": "J"}),
        (["one"], {"A": "A", "B": None, "The answer is B": None}),
        ([""] * 4, {"A": "A", "a dog": None, "The answer is (C).": "C"}),
    ],
)
def test_options_of_other_kinds(options, answers):
    assert {answer: chosen_letter(answer, options) for answer in answers} == answers


def test_generated_answers_never_choose_another_letter():
    path = Path(__file__).parents[2] / "scripts" / "lmms_eval" / "answer_strings.py"
    spec = importlib.util.spec_from_file_location("answer_strings", path)
    strings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(strings)
    rng, right, forms = random.Random(7), 0, set()
    for _ in range(4000):
        answer, options, meant, form = strings.choice(rng)
        found = chosen_letter(answer, list(options))
        assert found in (meant, None), (answer, options)
        right += found == meant
        forms.add(form)
    assert right > 3980 and len(forms) == 11


def test_a_long_answer_takes_no_long():
    """Whatever stands in it: no pattern runs away."""
    for part in (
        "the answer is ",
        "A or B, ",
        "I think that it is not ",
        "(",
        "a ",
        "**B** ",
        "\\boxed{",
        "so the the the ",
    ):
        chosen_letter(part * (20_000 // len(part)), OPTIONS)
