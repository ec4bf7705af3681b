"""What the demo's tasks for lmms-eval call: its held-out file as documents, prompts, pictures and scores."""

import json

import datasets
from PIL import Image

from llava.conversation import conv_templates
from llava.eval.questions import is_correct, read_questions

IMAGES = "playground/demo/images"


def all_questions(records):
    """A document per answer, as `llava.eval.exact_match` asks."""
    records = [{key: value for key, value in record.items() if value is not None} for record in records]
    questions = read_questions(records, "heldout.json", IMAGES, conv_templates["qwen_1_5"])
    return datasets.Dataset.from_list(
        [
            {
                "question_id": question.id,
                "kind": question.kind,
                "turns": json.dumps(question.turns),
                "question": question.text,
                "answer": question.answer,
                "paths": json.dumps(question.paths),
            }
            for question in questions
        ]
    )


def single_questions(records):
    return all_questions(records).filter(lambda doc: len(json.loads(doc["turns"])) == 1)


def one_digit_questions(records):
    return all_questions(records).filter(lambda doc: doc["kind"] == "one_digit")


def visuals(doc):
    return [Image.open(path).convert("RGB") for path in json.loads(doc["paths"])]


def messages(doc):
    roles = {"human": "user", "gpt": "assistant"}
    turns = [
        {"role": roles[speaker], "content": [{"type": "text", "text": text}]}
        for speaker, text in json.loads(doc["turns"])
    ]
    turns[0]["content"] = [{"type": "image", "url": image} for image in visuals(doc)] + turns[0]["content"]
    return turns


def digit(doc):
    return int(doc["answer"])


def score(doc, results):
    return {"exact_match": float(is_correct(results[0], doc["answer"]))}
