"""Scores of TextVQA and ST-VQA under the names of LLaVA's evaluators (after M4C); they are in `llava.eval.scorers`."""

from abc import ABC, abstractmethod

from llava.absent import absent
from llava.eval import scorers

TextCapsBleu4Evaluator = absent(
    "llava.eval.m4c_evaluator.TextCapsBleu4Evaluator", "use lmms-eval's task textcaps_val for captions"
)


class EvalAIAnswerProcessor:
    """An answer as EvalAI's server compares it: `scorers.normalize_vqa` of a text without commas and question marks."""

    def __call__(self, item: str) -> str:
        words = item.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        return scorers.normalize_vqa(words)


class _Evaluator(ABC):
    """Rows are {"pred_answer": text, "gt_answers": [text, ...]}."""

    def __init__(self):
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: list[dict]) -> float:
        """The mean score, from 0 to 1."""
        return sum(self.score(row["pred_answer"], row["gt_answers"]) for row in pred_list) / len(pred_list)

    @abstractmethod
    def score(self, said: str, answers: list[str]) -> float:
        """Of one answer, from 0 to 1."""


class TextVQAAccuracyEvaluator(_Evaluator):
    """`scorers.vqa_accuracy` of answers as EvalAI's server compares them."""

    def score(self, said, answers):
        return scorers.vqa_accuracy(self.answer_processor(said), [self.answer_processor(text) for text in answers])


class STVQAAccuracyEvaluator(_Evaluator):
    """1 where an answer is among those given."""

    def score(self, said, answers):
        return float(self.answer_processor(said) in [self.answer_processor(text) for text in answers])


class STVQAANLSEvaluator(_Evaluator):
    """`scorers.anls`."""

    def score(self, said, answers):
        return scorers.anls(said, answers)
