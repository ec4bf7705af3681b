"""Every command that loads a checkpoint lets its user name the class of the checkpoint's encoder, in the same words."""

import importlib

import pytest

from llava.errors import LlavaError
from llava.families import get_family
from llava.inference.own_code import overrides

COMMANDS = {
    "llava.eval.exact_match": "--model-path M --data-path D",
    "llava.eval.model_vqa": "--model-path M --question-file Q --answers-file A",
    "llava.serve.cli": "--model-path M",
    "llava.tools.merge_lora": "--model-path M --save-model-path S",
    "llava.tools.explain_image": "photo.jpg --model-path M",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command(command):
    parser, words = importlib.import_module(command).build_parser(), COMMANDS[command].split()
    assert overrides(parser.parse_args(words)) == {}
    for flag in ("--vision_tower", "--vision-tower"):
        assert overrides(parser.parse_args([*words, flag, "v.py:V"])) == {"vision_tower": "v.py:V"}
    for flag in ("--trust_remote_code", "--trust-remote-code"):
        assert overrides(parser.parse_args([*words, flag])) == {"trust_remote_code": True}


def test_a_family_with_encoders_of_its_own():
    with pytest.raises(LlavaError, match=r"vision_tower: found v.py:V, but there is a Qwen2-VL with its own encoder"):
        get_family("qwen2_vl").load("there", vision_tower="v.py:V")
