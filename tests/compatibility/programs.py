"""llava.eval and llava.serve: what is imported from them, and what LLaVA's documents start with `python -m`."""

import json
from types import SimpleNamespace

import pytest

from tests.compatibility.models import refused
from tests.compatibility.table import name


@name(
    "llava.eval.run_llava.eval_model",
    "LLaVA: README.md",
    "differs",
    "prints the answer, and returns it; several pictures have an <image> each and are squared, as in training; "
    "a checkpoint that names its template is asked with it",
)
def _(function, world, capsys=None):
    args = SimpleNamespace(
        model_path=world.checkpoint,
        model_base=None,
        model_name="model",
        query="What is it?",
        conv_mode=None,
        image_file=world.png,
        sep=",",
        temperature=0,
        top_p=None,
        num_beams=1,
        max_new_tokens=4,
    )
    answer = function(args)
    assert isinstance(answer, str) and function(args) == answer


@name("llava.eval.m4c_evaluator.EvalAIAnswerProcessor", "LLaVA: scripts/convert_vqav2_for_submission.py")
def _(processor, world):
    assert processor()("Two  dogs, the dog's\nball? isnt") == "2 dogs dog 's ball isn't"
    assert processor()("cat?dog") == "catdog"


ROWS = [
    {"pred_answer": "Two", "gt_answers": ["2"] * 2 + ["three"] * 8},
    {"pred_answer": "a cat", "gt_answers": ["cat"] * 10},
]


@name("llava.eval.m4c_evaluator.TextVQAAccuracyEvaluator", "LLaVA: llava/eval/eval_textvqa.py")
def _(evaluator, world):
    # two of ten: 1/3 where one of the two is left out, else 2/3
    assert evaluator().eval_pred_list(ROWS) == pytest.approx((0.2 * (1 / 3) + 0.8 * (2 / 3) + 1) / 2)


@name("llava.eval.m4c_evaluator.STVQAAccuracyEvaluator", "LLaVA: llava/eval/m4c_evaluator.py")
def _(evaluator, world):
    assert evaluator().eval_pred_list([*ROWS, {"pred_answer": "x", "gt_answers": ["y"]}]) == pytest.approx(2 / 3)


@name("llava.eval.m4c_evaluator.STVQAANLSEvaluator", "LLaVA: llava/eval/m4c_evaluator.py")
def _(evaluator, world):
    rows = [{"pred_answer": "Temple", "gt_answers": ["temple", "x"]}, {"pred_answer": "abcd", "gt_answers": ["abcx"]}]
    assert evaluator().eval_pred_list(rows) == pytest.approx((1 + 0.75) / 2)


@name(
    "llava.eval.m4c_evaluator.TextCapsBleu4Evaluator",
    "LLaVA: llava/eval/m4c_evaluator.py",
    "refused",
    "lmms-eval's task textcaps_val scores captions",
)
def _(value, world):
    refused(value, "TextCapsBleu4Evaluator: there is no such part here; use lmms-eval")


@name(
    "llava.eval.model_vqa",
    "LLaVA: scripts/v1_5/eval/mmvet.sh; ToConv: LLaVA/scripts/v1_5/eval/mmvet.sh",
    "differs",
    "the program takes LLaVA's flags and files; greedy unless --temperature is given, and it goes on where it was cut",
)
def _(module, world):
    questions, answers = world.folder / "q.jsonl", world.folder / "a.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "image": "picture.png", "text": "What?"}) + "\n")
    flags = ["--model-path", world.checkpoint, "--image-folder", world.png.rpartition("/")[0], "--temperature", "0"]
    flags += ["--question-file", str(questions), "--answers-file", str(answers), "--conv-mode", "qwen_1_5"]
    module.main([*flags, "--max_new_tokens", "3"])
    (row,) = map(json.loads, answers.read_text().splitlines())
    assert row["question_id"] == 1 and {"prompt", "text", "answer_id", "model_id", "metadata"} <= set(row)


@name(
    "llava.eval.model_vqa_loader",
    "LLaVA: scripts/v1_5/eval/gqa.sh",
    "differs",
    "the same program as llava.eval.model_vqa",
)
def _(module, world):
    from llava.eval.model_vqa import main

    assert module.main is main


@name(
    "llava.serve.cli",
    "LLaVA: README.md",
    "differs",
    "the program takes LLaVA's flags; the template is the checkpoint's unless --conv-mode names one",
)
def _(module, world):
    args = module.build_parser().parse_args(["--model-path", "x", "--image-file", "a.jpg", "--load-4bit"])
    assert (args.model_path, args.image_file, args.load_4bit, args.temperature) == ("x", ["a.jpg"], True, 0.2)


NOT_HERE = {
    "llava.eval.model_vqa_mmbench": ("LLaVA: scripts/v1_5/eval/mmbench.sh", "lmms-eval's mmbench tasks"),
    "llava.eval.model_vqa_science": (
        "LLaVA: scripts/v1_5/eval/sqa.sh; LLaVA-NeXT: scripts/archived/sqa_eval_batch.sh",
        "llava.eval.model_vqa asks records too; lmms-eval's scienceqa_img",
    ),
    "llava.eval.model_vqa_qbench": ("LLaVA: scripts/v1_5/eval/qbench.sh", "llava.eval.model_vqa, or lmms-eval"),
    "llava.eval.eval_textvqa": ("LLaVA: scripts/v1_5/eval/textvqa.sh", "llava.eval.score --metric vqa"),
    "llava.eval.evaluate_interleave": ("LLaVA-NeXT: scripts/interleave/eval_interleave_3d.sh", "llava.eval.score"),
    "llava.train.train_dpo": ("LLaVA-NeXT: scripts/train/dpo.sh", "preferences (DPO) are not trained on"),
    "llava.model.apply_delta": ("LLaVA: docs/MODEL_ZOO.md", "weights are published whole"),
    "llava.model.make_delta": ("LLaVA: llava/model/make_delta.py", "weights are saved whole"),
    "llava.model.consolidate": ("LLaVA: llava/model/consolidate.py", "every folder that is saved is whole"),
    "llava.serve.controller": ("LLaVA: README.md", "no web demo; llava.serve.cli, or an exported model"),
    "llava.serve.model_worker": ("LLaVA: README.md", "no web demo; llava.serve.cli, or an exported model"),
    "llava.serve.gradio_web_server": ("LLaVA: README.md", "no web demo; llava.serve.cli, or an exported model"),
    "llava.serve.sglang_worker": ("LLaVA: README.md", "no web demo; llava.serve.cli, or an exported model"),
}


def _no_program(module, world):
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2


for _name, (_used, _note) in NOT_HERE.items():
    name(_name, _used, "refused", f"a program: {_note}")(_no_program)
