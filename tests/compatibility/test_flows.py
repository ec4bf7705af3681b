"""What scripts and notebooks of LLaVA's and LLaVA-NeXT's users do from beginning to end, on a small checkpoint."""

import copy
import subprocess
import sys
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.errors import LlavaError
from llava.eval.run_llava import eval_model
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init
from tests.compatibility.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def written(question: str, template: str = "qwen_1_5"):
    """A conversation up to its next answer."""
    conv = copy.deepcopy(conv_templates[template])
    conv.append_message(conv.roles[0], question)
    conv.append_message(conv.roles[1], None)
    return conv


def ids_of(conv, tokenizer) -> torch.Tensor:
    return tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)


def ask(world, question: str, pictures: list, **options) -> str:
    """The OneVision notebook's way: crops of each picture, greedy."""
    tokenizer, model, processor, _ = world.loaded
    pixels = [crops.to(model.dtype) for crops in process_images(pictures, processor, model.config)]
    sizes = [picture.size for picture in pictures]
    made = model.generate(
        ids_of(written(question), tokenizer),
        images=pixels,
        image_sizes=sizes,
        **{"do_sample": False, "temperature": 0, "max_new_tokens": 6, **options},
    )
    return tokenizer.batch_decode(made, skip_special_tokens=True)[0].strip()


def test_notebook_one_picture_is_the_models_own_answer(world):
    from llava.inference.engine import Inference

    picture = world.picture(60, 40)
    inference = Inference.load(world.checkpoint)
    prompt = inference.prompt([("human", f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?")])
    expected = inference.generate([prompt], [[picture]], max_new_tokens=6)[0]
    assert ask(world, f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?", [picture]) == expected != ""
    # what each picture shows counts
    assert ask(world, f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?", [world.picture(200, 20)]) != expected


def test_notebook_pictures_between_words(world):
    """The second cell loads with image_aspect_ratio pad and asks about two pictures in one prompt."""
    overwrite = {"multimodal": True, "overwrite_config": {"image_aspect_ratio": "pad"}}
    loaded = load_pretrained_model(
        world.checkpoint, None, "llava_qwen", device_map="auto", torch_dtype="float32", **overwrite
    )
    padded = SimpleNamespace(loaded=loaded)
    first, second = world.picture(60, 40), world.picture(20, 50)
    question = f"{DEFAULT_IMAGE_TOKEN} is one.\nAnd {DEFAULT_IMAGE_TOKEN}\nWhat differs?"
    assert process_images([first, second], loaded[2], loaded[1].config).shape == (2, 3, 28, 28)
    assert ask(padded, question, [first, second]) != ask(padded, question, [second, first])


def test_notebook_streams_in_a_thread(world):
    from transformers import TextIteratorStreamer

    tokenizer, model, processor, _ = world.loaded
    question, picture = f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?", world.picture(60, 40)
    ids = ids_of(written(question), tokenizer)
    room = model.config.max_position_embeddings - ids.shape[-1] - model.get_vision_tower().num_patches
    assert room > 0
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    pixels = process_images([picture], processor, model.config)
    options = dict(images=pixels, image_sizes=[picture.size], do_sample=False, max_new_tokens=min(6, room))
    thread = Thread(target=model.generate, kwargs=dict(inputs=ids, streamer=streamer, **options))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == ask(world, question, [picture])


def test_prediction_service(world):
    """predict.py: one square picture as a plain batch, sampled, with keywords that end an answer."""
    from transformers import TextIteratorStreamer

    disable_torch_init()
    tokenizer, model, processor, _ = world.loaded
    pixels = processor.preprocess(world.picture(60, 40), return_tensors="pt")["pixel_values"]
    conv = written(f"{DEFAULT_IMAGE_TOKEN}\nWhat?", "llava_v1")
    ids = ids_of(conv, tokenizer)
    stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = dict(do_sample=True, temperature=0.2, top_p=1.0, max_new_tokens=5, use_cache=True)
    options |= {"streamer": streamer, "stopping_criteria": [KeywordsStoppingCriteria([stop], tokenizer, ids)]}
    with torch.inference_mode():
        thread = Thread(target=model.generate, kwargs=dict(inputs=ids, images=pixels, **options))
        thread.start()
        assert "".join(streamer)
        thread.join()


def test_video_script(world):
    """video_demo.py: settings over the checkpoint's, the config read first, a clip with one modality for all."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(world.checkpoint)
    assert "tower" in config.mm_vision_tower and config._name_or_path
    overwrite = {"mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2, "mm_newline_position": "no_token"}
    tokenizer, model, processor, _ = load_pretrained_model(
        world.checkpoint, None, "llava_qwen", load_8bit=False, overwrite_config=overwrite, torch_dtype="float32"
    )
    frames = np.stack([np.asarray(world.picture(64, 48))] * 3)
    frames[1] = 255 - frames[1]
    pixels = processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 28, 28)
    conv = written(f"{DEFAULT_IMAGE_TOKEN}\nWhat happens?")
    ids = ids_of(conv, tokenizer)
    mask = ids.ne(tokenizer.pad_token_id).long()
    options = dict(do_sample=False, temperature=0.0, max_new_tokens=6, top_p=0.1, num_beams=1, use_cache=True)
    options["stopping_criteria"] = [KeywordsStoppingCriteria([conv.sep], tokenizer, ids)]
    with torch.inference_mode():
        made = model.generate(inputs=ids, images=[pixels], attention_mask=mask, modalities="video", **options)
        same = model.generate(ids, images=[pixels], modalities=["video"], do_sample=False, max_new_tokens=6)
    assert made.tolist() == same.tolist()
    # each of the three frames is pooled to one token, and none is added
    assert not getattr(model.config, "mm_use_im_start_end", None)
    merged = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [pixels], "video")
    assert merged[4].shape[1] == ids.shape[1] - 1 + 3


def arguments(world, **changes):
    values = dict(model_path=world.checkpoint, model_base=None, model_name="x", query="What is it?", conv_mode=None)
    values |= dict(image_file=world.png, sep=",", temperature=0, top_p=None, num_beams=1, max_new_tokens=6)
    return SimpleNamespace(**values | changes)


def test_eval_model_prints_the_answer(world, capsys):
    expected = ask(world, f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?", [world.picture(60, 40)])
    eval_model(arguments(world))
    assert capsys.readouterr().out.splitlines()[-1] == expected.splitlines()[-1]


def test_eval_model_puts_a_picture_where_the_question_has_it(world):
    marked = eval_model(arguments(world, query=f"What is {IMAGE_PLACEHOLDER} of?"))
    assert marked == ask(world, f"What is {DEFAULT_IMAGE_TOKEN} of?", [world.picture(60, 40)])
    assert marked != ask(world, f"{DEFAULT_IMAGE_TOKEN}\nWhat is  of?", [world.picture(60, 40)])


def test_eval_model_takes_several_pictures(world):
    other = world.folder / "other.png"
    world.picture(30, 50).save(other)
    both = eval_model(arguments(world, image_file=f"{world.png};{other}", sep=";", query="Which?"))
    assert both != eval_model(arguments(world, image_file=world.png, query="Which?"))
    with pytest.raises(LlavaError, match="query: found 1 <image-placeholder> for 2 pictures"):
        eval_model(arguments(world, image_file=f"{world.png},{other}", query=IMAGE_PLACEHOLDER))
    with pytest.raises(LlavaError, match=r"image gone\.png: no such file"):
        eval_model(arguments(world, image_file="gone.png"))


@pytest.mark.parametrize(
    ("name", "named", "asked", "expected"),
    [
        ("llava-v1.5-7b", None, None, "llava_v1"),
        ("llava-llama-2-13b-chat", None, None, "llava_llama_2"),
        ("llava-v1.6-mistral-7b", None, None, "mistral_instruct"),
        ("llava-v1.6-34b", None, None, "chatml_direct"),
        ("llava-v1.6-34b", None, "llava_v1", "llava_v1"),
        ("llava-onevision-qwen2-7b", None, None, None),
        ("llava-v1.5-mine", "qwen_1_5", None, None),
    ],
)
def test_eval_model_goes_by_the_names_that_llava_goes_by(name, named, asked, expected, tmp_path, capsys):
    from llava.eval.run_llava import _template

    folder = tmp_path / name
    folder.mkdir()
    values = '{"model_type": "llava_qwen", "conversation_template": %s}' % (f'"{named}"' if named else "null")
    (folder / "config.json").write_text(values)
    assert _template(str(folder), asked) == expected
    told = capsys.readouterr().err
    assert ("is usually asked with chatml_direct, here with llava_v1" in told) == (asked is not None)


def program(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)


def test_run_llava_is_a_program(world):
    flags = ["--model-path", world.checkpoint, "--image-file", world.png, "--query", "What is it?"]
    done = program("llava.eval.run_llava", *flags, "--temperature", "0", "--max_new_tokens", "6")
    expected = ask(world, f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?", [world.picture(60, 40)])
    assert done.returncode == 0 and done.stdout.strip().endswith(expected)


def test_the_builder_alone_makes_the_model_types_known(world):
    """lmms-eval's llava_onevision reads a config before it loads the model."""
    code = "import sys, llava.model.builder; from transformers import AutoConfig, AutoModelForCausalLM\n"
    code += "config = AutoConfig.from_pretrained(sys.argv[1])\n"
    code += "print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)"
    done = subprocess.run([sys.executable, "-c", code, world.checkpoint], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["LlavaQwenConfig", "LlavaQwenForCausalLM"], done.stderr


def test_programs_that_are_not_here_say_so_in_one_line():
    done = program("llava.serve.controller", "--host", "0.0.0.0", "--port", "10000")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: python -m llava.serve.controller: there is no such program here; ")


def test_importing_names_costs_nothing():
    """`import llava` and llava.utils bring in neither torch nor transformers."""
    heavy = "import sys, llava, llava.utils, llava.constants, llava.conversation, llava.train.train, llava.absent\n"
    heavy += "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'av'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
