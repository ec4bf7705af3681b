"""llava.constants, llava.conversation, llava.mm_utils, llava.utils."""

import base64
import io
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from tests.compatibility.table import name

PREDICT = "LLaVA-NeXT: predict.py; LLaVA: predict.py; lmms-eval: lmms_eval/models/simple/llava_onevision.py"
NOTEBOOK = "LLaVA-NeXT: docs/LLaVA_OneVision_Tutorials.ipynb; LLaVA: llava/serve/cli.py"
TRAIN = "LLaVA-NeXT: llava/train/train.py; OneVision-Encoder: llava_next/llava/train/train.py"
DEMO = "LLaVA-NeXT: llava/serve/gradio_web_server.py; LLaVA: llava/serve/gradio_web_server.py"
WORKER = "LLaVA-NeXT: llava/serve/model_worker.py; LLaVA: llava/serve/model_worker.py"

# --- constants ---

CONSTANTS = {
    "IGNORE_INDEX": (-100, "LLaVA-NeXT: docs/LLaVA_OneVision_Tutorials.ipynb; LLaVA: llava/train/train.py"),
    "IMAGE_TOKEN_INDEX": (-200, PREDICT),
    "DEFAULT_IMAGE_TOKEN": ("<image>", PREDICT),
    "DEFAULT_IMAGE_PATCH_TOKEN": ("<im_patch>", "LLaVA-NeXT: llava/model/builder.py; LLaVA: llava/model/builder.py"),
    "DEFAULT_IM_START_TOKEN": ("<im_start>", NOTEBOOK),
    "DEFAULT_IM_END_TOKEN": ("<im_end>", NOTEBOOK),
    "IMAGE_PLACEHOLDER": ("<image-placeholder>", "LLaVA: llava/eval/run_llava.py"),
    "CONTROLLER_HEART_BEAT_EXPIRATION": (30, "LLaVA-NeXT: llava/serve/controller.py; LLaVA: llava/serve/controller.py"),
    "WORKER_HEART_BEAT_INTERVAL": (15, WORKER),
    "LOGDIR": (".", DEMO),
}


def _constant(expected):
    def check(value, world):
        assert value == expected and type(value) is type(expected)

    return check


for _constant_name, (_value, _used) in CONSTANTS.items():
    name(f"llava.constants.{_constant_name}", _used)(_constant(_value))

# --- conversation ---


@name("llava.conversation", TRAIN, note="`default_conversation` may be set, as train.py does")
def _(module, world):
    assert module.conv_templates["v1"].sep2 == "</s>"


@name("llava.conversation.SeparatorStyle", PREDICT)
def _(style, world):
    assert [member.name for member in style][:6] == ["SINGLE", "TWO", "MPT", "PLAIN", "CHATML", "LLAMA_2"]


@name("llava.conversation.conv_templates", PREDICT, note="the texts of LLaVA-NeXT's; v0 and default are vicuna_v0")
def _(templates, world):
    conv = templates["qwen_1_5"].copy()
    conv.append_message(conv.roles[0], "<image>\nWhat?")
    conv.append_message(conv.roles[1], None)
    assert conv.get_prompt().endswith("<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    assert templates["qwen_1_5"].messages == []


@name(
    "llava.conversation.default_conversation",
    "LLaVA-NeXT: llava/serve/test_message.py; LLaVA: llava/eval/model_qa.py",
    note="LLaVA-NeXT's, vicuna_v0; LLaVA's is vicuna_v1",
)
def _(conv, world):
    assert conv.version == "Unknown" and conv.roles == ("Human", "Assistant") and conv.offset == 2


@name("llava.conversation.conv_vicuna_v1", "LLaVA: llava/conversation.py", note="and the other conv_* of the module")
def _(conv, world):
    import llava.conversation as module

    assert conv is module.conv_templates["vicuna_v1"] and module.conv_qwen is module.conv_templates["qwen_1_5"]
    assert module.conv_llava_plain is module.conv_templates["plain"]


def _talk(world, picture, mode="Default"):
    from llava.conversation import conv_templates

    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message(conv.roles[0], ("<image>\nWhat?", picture, mode))
    conv.append_message(conv.roles[1], "A cat.")
    return conv


@name("llava.conversation.Conversation", TRAIN)
def _(conversation, world):
    from llava.conversation import SeparatorStyle

    made = conversation(
        system="S", roles=("A", "B"), messages=[["A", "hi"]], offset=0, sep_style=SeparatorStyle.TWO, sep=" ", sep2="#"
    )
    assert made.get_prompt() == "S A: hi "


@name("llava.conversation.Conversation.get_prompt", PREDICT, note="llava_llama_3 needs no tokenizer from the hub")
def _(method, world):
    assert method(_talk(world, world.picture(9, 9))).endswith("USER: <image>\nWhat? ASSISTANT: A cat.</s>")


@name("llava.conversation.Conversation.append_message", PREDICT)
def _(method, world):
    conv = _talk(world, None)
    method(conv, "USER", "Sure?")
    assert conv.messages[-1] == ["USER", "Sure?"]


@name("llava.conversation.Conversation.copy", PREDICT)
def _(method, world):
    conv = _talk(world, None)
    method(conv).messages.clear()
    assert len(conv.messages) == 2


@name("llava.conversation.Conversation.dict", DEMO)
def _(method, world):
    made = method(_talk(world, world.png))
    assert made["messages"] == [["USER", "<image>\nWhat?"], ["ASSISTANT", "A cat."]]
    assert set(made) == {"system", "roles", "messages", "offset", "sep", "sep2"}


@name(
    "llava.conversation.Conversation.get_images",
    DEMO,
    "differs",
    "takes PIL images, as LLaVA's, and paths, as LLaVA-NeXT's, whose pictures that one forgets to add to the list",
)
def _(method, world):
    for picture in (world.png, world.picture(60, 40), [world.png]):
        (text,) = method(_talk(world, picture))
        assert Image.open(io.BytesIO(base64.b64decode(text))).size == (60, 40)
    assert method(_talk(world, world.png), return_path=True) == [world.png]
    assert method(_talk(world, "clip.mp4")) == ["clip.mp4"]
    (square,) = method(_talk(world, world.png, "Pad"), return_pil=True)
    assert square.size == (60, 60) and square.getpixel((0, 0)) == (122, 116, 104)


@name(
    "llava.conversation.Conversation.process_image",
    "LLaVA-NeXT: llava/conversation.py; LLaVA: llava/conversation.py",
    "differs",
    "LLaVA-NeXT's sizes (at most 672 x 448 pixels); LLaVA's are max_len=1344, min_len=672, and smaller ones stay",
)
def _(method, world):
    conv = _talk(world, None)
    sizes = {(1000, 500): (672, 336), (700, 700): (448, 448), (3000, 200): (660, 44), (50, 30): (50, 30)}
    for given, expected in sizes.items():
        assert method(conv, Image.new("RGB", given), "Crop", return_pil=True).size == expected
    assert method(conv, Image.new("RGB", (9, 5)), "Resize", return_pil=True).size == (336, 336)
    with pytest.raises(LlavaError, match="image_process_mode: found 'x'"):
        method(conv, Image.new("RGB", (9, 5)), "x")


@name(
    "llava.conversation.Conversation.to_gradio_chatbot", DEMO, "differs", "pictures have HTML attributes of their own"
)
def _(method, world):
    ((shown, answer),) = method(_talk(world, world.png))
    assert answer == "A cat." and shown.startswith('<img src="data:image/jpeg;base64,')
    assert shown.endswith("/>\n\n\n\n<image>\nWhat?")
    assert method(_talk(world, "clip.mp4")) == [(("clip.mp4",), None), ["<image>\nWhat?", "A cat."]]
    conv = _talk(world, [world.png] * 3)
    conv.messages[0][1] = ("<image>\n<image>\n<image>\nWhat?", *conv.messages[0][1][1:])
    assert method(conv)[0][0].count("<img") == 3 and method(conv)[0][0].endswith("<image> <image> <image>\nWhat?")


# --- mm_utils ---


@name("llava.mm_utils.process_images", NOTEBOOK, note="native gives a list; highres and crop_split are refused")
def _(function, world):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints="[[56, 28], [28, 56], [56, 56]]")
    made = function([world.picture(60, 40), world.picture(40, 20)], world.processor, config)
    assert [tuple(pixels.shape) for pixels in made] == [(5, 3, 28, 28), (3, 3, 28, 28)]
    assert function([world.picture(9, 9)] * 2, world.processor, SimpleNamespace()).shape == (2, 3, 28, 28)


@name("llava.mm_utils.process_anyres_image", "LLaVA-NeXT: playground/demo/video_demo.py; " + TRAIN)
def _(function, world):
    assert function(world.picture(40, 20), world.processor, [[56, 28], [28, 56]]).shape == (3, 3, 28, 28)


@name("llava.mm_utils.tokenizer_image_token", PREDICT)
def _(function, world):
    made = function("<image>\nA cat", world.tokenizer, -200, return_tensors="pt")
    assert made.dtype == torch.long and made.tolist() == [-200, *world.tokenizer("\nA cat").input_ids]


@name("llava.mm_utils.get_model_name_from_path", "LLaVA: README.md; LLaVA-NeXT: docs/LLaVA-NeXT.md")
def _(function, world):
    assert function("a/llava-v1.5-7b/") == "llava-v1.5-7b" and function("a/run/checkpoint-9") == "run_checkpoint-9"


@name(
    "llava.mm_utils.KeywordsStoppingCriteria",
    "LLaVA-NeXT: predict.py; lmms-eval: lmms_eval/models/simple/llava_vid.py",
    "differs",
    "answers for each row of a batch (a bool tensor); LLaVA's for one",
)
def _(criterion, world):
    ids = torch.tensor([world.tokenizer("Why?").input_ids])
    stop = criterion(["###"], world.tokenizer, ids)
    longer = torch.cat([ids, torch.tensor([world.tokenizer(" So.###").input_ids])], dim=1)
    assert stop(longer, None).tolist() == [True] and not stop(longer[:, :-1], None)


@name("llava.mm_utils.load_image_from_base64", WORKER)
def _(function, world):
    with open(world.png, "rb") as file:
        assert function(base64.b64encode(file.read()).decode()).size == (60, 40)


@name("llava.mm_utils.expand2square", "LLaVA-NeXT: llava/serve/sglang_worker.py; LLaVA: llava/serve/sglang_worker.py")
def _(function, world):
    square = function(world.picture(10, 4), (1, 2, 3))
    assert square.size == (10, 10) and square.getpixel((0, 2)) == (1, 2, 3) and square.getpixel((4, 3))[:2] == (4, 0)


@name(
    "llava.mm_utils.get_anyres_image_grid_shape",
    "LLaVA-NeXT: llava/model/llava_arch.py; LLaVA: llava/model/llava_arch.py",
)
def _(function, world):
    assert function((60, 40), "[(56, 28), (84, 56)]", 28) == (3, 2) and function((60, 40), "(1x1),...,(2x2)", 28) == (
        2,
        2,
    )


@name("llava.mm_utils.select_best_resolution", "LLaVA-NeXT: llava/mm_utils.py; LLaVA: llava/mm_utils.py")
def _(function, world):
    assert function((60, 40), [(28, 56), (56, 28), (56, 56)]) == (56, 56)


@name("llava.mm_utils.resize_and_pad_image", "LLaVA-NeXT: llava/mm_utils.py; LLaVA: llava/mm_utils.py")
def _(function, world):
    made = np.asarray(function(Image.new("RGB", (60, 40), (9, 9, 9)), (56, 56)))
    assert made.shape == (56, 56, 3) and [int(row) for row in np.flatnonzero(made[:, 0, 0])[[0, -1]]] == [9, 46]


@name("llava.mm_utils.divide_to_patches", "LLaVA-NeXT: llava/mm_utils.py; LLaVA: llava/mm_utils.py")
def _(function, world):
    assert _corners(function(world.picture(56, 84), 28)) == [(x, y) for y in (0, 28, 56) for x in (0, 28)]


def _corners(crops) -> list[tuple[int, int]]:
    """Where crops of a `World.picture` come from."""
    return [tuple(map(int, np.asarray(crop)[0, 0, :2])) for crop in crops]


@name("llava.mm_utils.extract_patches", "LLaVA-NeXT: llava/mm_utils.py", note="bad shares are one line")
def _(function, world):
    assert _corners(function(world.picture(100, 61), 30, 0.5)) == [
        (x, y) for y in (0, 15, 30) for x in (5, 20, 35, 50, 65)
    ]
    assert [crop.size for crop in function(world.picture(60, 30), 30, 0)] == [(30, 30)] * 2
    with pytest.raises(LlavaError, match="overlap_ratio 1"):
        function(world.picture(9, 9), 3, 1)


@name("llava.mm_utils.resize_and_center_crop", "LLaVA-NeXT: llava/mm_utils.py", note="Pillow's Lanczos filter")
def _(function, world):
    assert function(world.picture(80, 40), 40).size == (40, 40)
    assert _corners([function(world.picture(80, 40), 40)]) == [(20, 0)]
    assert function(world.picture(30, 91), 20).size == (20, 20)


@name("llava.mm_utils.auto_pad_images", "LLaVA-NeXT: llava/mm_utils.py", note="Pillow's Lanczos filter")
def _(function, world):
    made = np.asarray(function(Image.new("RGB", (100, 40), (9, 9, 9)), [28, 56, 112]))
    assert made.shape == (56, 112, 3)
    assert [int(row) for row in np.flatnonzero(made[:, 0, 0])[[0, -1]]] == [6, 49]
    made = np.asarray(function(Image.new("RGB", (40, 100), (9, 9, 9)), [28, 56, 112]))
    assert made.shape == (112, 56, 3)
    assert [int(column) for column in np.flatnonzero(made[0, :, 0])[[0, -1]]] == [6, 49]


@name("llava.mm_utils.process_highres_image", TRAIN, note="any processor with a side; no model is trained with it")
def _(function, world):
    image, processor = world.picture(60, 40), world.processor
    made = function(image, processor, "28,56")
    square = Image.new("RGB", (60, 60), tuple(int(255 * mean) for mean in processor.image_mean))
    square.paste(image, (0, 10))
    square = square.resize((56, 56))
    boxes = [(0, 0, 28, 28), (28, 0, 56, 28), (0, 28, 28, 56), (28, 28, 56, 56)]
    pieces = [image.resize((28, 28)), *(square.crop(box) for box in boxes)]
    expected = [processor.preprocess(piece, return_tensors="pt")["pixel_values"][0] for piece in pieces]
    assert torch.equal(made, torch.stack(expected))
    with pytest.raises(LlavaError, match="image_grid_pinpoints: found 'x'"):
        function(image, processor, "x")


@name("llava.mm_utils.process_highres_image_crop_split", TRAIN, note="no model is trained with it")
def _(function, world):
    args = SimpleNamespace(image_crop_resolution=56, image_split_resolution=28, image_processor=world.processor)
    image = world.picture(112, 56)
    middle = image.crop((28, 0, 84, 56))
    boxes = [(0, 0, 28, 28), (28, 0, 56, 28), (0, 28, 28, 56), (28, 28, 56, 56)]
    expected = [world.processor.preprocess(middle.crop(box), return_tensors="pt")["pixel_values"][0] for box in boxes]
    assert torch.equal(function(image, args), torch.stack(expected))
    assert torch.equal(function(image, args, world.processor), torch.stack(expected))


@name(
    "llava.mm_utils.process_native_image",
    "OneVision-Encoder: llava_next/llava/train/train.py",
    "refused",
    "process_images with image_aspect_ratio native gives one tensor per image",
)
def _(function, world):
    with pytest.raises(LlavaError, match="process_native_image: there is no such part here; use process_images"):
        function(world.picture(9, 9), world.processor)


# --- utils ---


@name(
    "llava.utils.disable_torch_init",
    "LLaVA-NeXT: predict.py; LLaVA: predict.py",
    "differs",
    "nothing to switch off: transformers builds models without drawing the weights that it reads; torch is left alone",
)
def _(function, world):
    before = torch.nn.Linear.reset_parameters
    assert function() is None and torch.nn.Linear.reset_parameters is before


@name("llava.utils.rank0_print", TRAIN, note="one line for the first rank, without the words 'Rank 0'")
def _(function, world):
    function("a", 1)


@name("llava.utils.rank_print", "LLaVA-NeXT: llava/model/llava_arch.py")
def _(function, world):
    function("a", 1)


@name(
    "llava.utils.build_logger",
    DEMO,
    "differs",
    "stdout and stderr stay what they are; LLaVA's sends them into the logger",
)
def _(function, world):
    import llava.utils

    before, llava.utils.LOGDIR = llava.utils.LOGDIR, str(world.folder / "logs")
    try:
        logger = function("names", "names.log")
        logger.info("said")
        assert function("names", "names.log") is logger and isinstance(logger, logging.Logger)
    finally:
        llava.utils.LOGDIR = before
        for handler in logger.handlers[:]:
            handler.close()
            logger.removeHandler(handler)
    (line,) = (world.folder / "logs" / "names.log").read_text().splitlines()
    assert line.endswith("| INFO | names | said")


@name("llava.utils.StreamToLogger", "LLaVA-NeXT: llava/utils.py; LLaVA: llava/utils.py")
def _(stream_class, world):
    said = []
    stream = stream_class(SimpleNamespace(log=lambda level, text: said.append((level, text))), logging.ERROR)
    for text in ("one\ntw", "o\nthree"):
        stream.write(text)
    assert said == [(logging.ERROR, "one"), (logging.ERROR, "two")] and stream.isatty() in (True, False)
    stream.flush()
    assert said[-1] == (logging.ERROR, "three")


@name("llava.utils.pretty_print_semaphore", WORKER)
def _(function, world):
    import asyncio

    assert function(None) == "None" and function(asyncio.Semaphore(3)) == "Semaphore(value=3, locked=False)"


@name("llava.utils.server_error_msg", DEMO, "differs", "words of its own")
def _(text, world):
    assert text.startswith("**")


@name("llava.utils.moderation_msg", DEMO, "differs", "words of its own")
def _(text, world):
    assert text


@name("llava.utils.violates_moderation", DEMO, "refused", "no text is sent to a service on the internet")
def _(function, world):
    with pytest.raises(LlavaError, match="violates_moderation: no text is sent"):
        function("a")


def _video_args(**changes):
    return SimpleNamespace(**{"video_fps": 1, "frames_upbound": 0, "force_sample": False, **changes})


@name(
    "llava.utils.process_video_with_decord",
    TRAIN,
    "differs",
    "PyAV reads the file; a rate above the file's takes every frame, where LLaVA-NeXT's fails",
)
def _(function, world):
    pytest.importorskip("av", reason="reading a video file needs PyAV")
    frames, seconds, times, count = function(world.clip, _video_args())
    assert (frames.shape, frames.dtype, seconds, count) == ((4, 48, 64, 3), np.uint8, 13 / 4, 4)
    assert times == "0.00s,1.00s,2.00s,3.00s"
    assert [round(float(frame.mean()) / 18) for frame in frames] == [0, 4, 8, 12]
    frames, _, times, count = function(world.clip, _video_args(frames_upbound=3))
    assert [round(float(frame.mean()) / 18) for frame in frames] == [0, 6, 12] and times == "0.00s,1.50s,3.00s"
    assert function(world.clip, _video_args(frames_upbound=9, force_sample=True))[3] == 9
    assert function(world.clip, _video_args(video_fps=9))[3] == 13
    with pytest.raises(LlavaError, match="no such file"):
        function(world.clip + "x", _video_args())


@name(
    "llava.utils.process_video_with_pyav",
    TRAIN,
    "differs",
    "the frames alone, as LLaVA-NeXT's; a clip of one frame is that frame, where LLaVA-NeXT's fails",
)
def _(function, world):
    pytest.importorskip("av", reason="reading a video file needs PyAV")
    frames = function(world.clip, _video_args())  # 13 frames by 3 seconds: every fourth
    assert frames.shape == (4, 48, 64, 3)
    frames = function(world.clip, _video_args(video_fps=2, frames_upbound=4, force_sample=True))
    assert [round(float(frame.mean()) / 18) for frame in frames] == [0, 4, 8, 12]
    assert len(function(world.clip, _video_args(frames_upbound=5, force_sample=True))) == 4  # it is not read
