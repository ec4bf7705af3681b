"""What the demo's tasks for lmms-eval call: its held-out file as documents, prompts, pictures and scores."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from llava.conversation import conv_templates
from llava.eval.questions import is_correct, read_questions

IMAGES = "playground/demo/images"
FRAMES, FRAMES_PER_SECOND, STEP = 8, 4, 4  # of a clip; its picture moves that many pixels to the right per frame
SIDE = 96  # pixels of a clip: decord cannot read some sizes that are no multiple of 16


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


def picture_questions(records):
    return single_questions(records).filter(lambda doc: len(json.loads(doc["paths"])) == 1)


def one_digit_questions(records):
    return all_questions(records).filter(lambda doc: doc["kind"] == "one_digit")


def visuals(doc):
    return [Image.open(path).convert("RGB") for path in json.loads(doc["paths"])]


def frames(paths):
    """Of a clip: [FRAMES, SIDE, SIDE, 3], uint8; what leaves on the right comes back on the left."""
    (path,) = paths
    picture = np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)))
    return np.stack([np.roll(picture, STEP * index, axis=1) for index in range(FRAMES)])


def clips(doc):
    """The clip as a file in the folder DEMO_CLIPS, without loss."""
    import av

    path = Path(os.environ["DEMO_CLIPS"]) / f"{doc['question_id']}.mkv"
    if not path.is_file():
        with av.open(str(path), "w") as container:
            pictures = frames(json.loads(doc["paths"]))
            stream = container.add_stream("ffv1", rate=FRAMES_PER_SECOND)
            stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "bgr0"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return [str(path)]


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
