"""llava.train."""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

import llava.conversation as conversation_lib
from llava.errors import LlavaError
from tests import tiny
from tests.compatibility.faces import TRAIN
from tests.compatibility.models import refused
from tests.compatibility.table import name
from tests.data.common import GOLDEN, tokenizer

BOTH = "LLaVA-NeXT: llava/train/train.py; LLaVA: llava/train/train.py"
CASES = json.loads((GOLDEN / "preprocess.json").read_text())  # LLaVA-NeXT's ids and labels


class template:
    """`default_conversation` is set, as train.py does, and set back."""

    def __init__(self, version: str):
        self.version = version

    def __enter__(self):
        self.before = conversation_lib.default_conversation
        conversation_lib.default_conversation = conversation_lib.conv_templates[self.version]

    def __exit__(self, *fault):
        conversation_lib.default_conversation = self.before


def _golden(call, versions=None) -> int:
    """Compare `call(sources, tokenizer, has_image)` with LLaVA-NeXT's for every golden conversation of the versions."""
    from llava.train.train import preprocess_multimodal

    args, count = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False), 0
    for case in CASES:
        if versions is not None and case["version"] not in versions:
            continue
        with template(case["version"]):
            sources = [copy.deepcopy(case["conversations"])]
            sources = preprocess_multimodal(sources, args) if case["has_image"] else sources
            made = call(sources, tokenizer(case["tokenizer"]), case["has_image"])
        assert made["input_ids"][0].tolist() == case["input_ids"] and made["labels"][0].tolist() == case["labels"]
        count += 1
    return count


@name("llava.train.train.preprocess", BOTH, note="several conversations are padded on the right")
def _(function, world):
    assert _golden(lambda sources, tok, image: function(sources, tok, has_image=image)) == len(CASES)
    tok = copy.deepcopy(world.tokenizer)
    tok.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    for text in ("What is <image> it?", "<im_start><image><im_end>\nWhat?"):  # an image stays where the text has it
        with template("qwen_1_5"):
            made = function(
                [[{"from": "human", "value": text}, {"from": "gpt", "value": "A cat."}]], tok, has_image=True
            )
        before = made["input_ids"][0].tolist()
        before = tok.decode(before[: before.index(-200)])
        assert before.endswith("user\n" + text[: text.index("<image>")])
    with pytest.raises(LlavaError, match="default_conversation: found a template"):
        before = conversation_lib.default_conversation
        conversation_lib.default_conversation = conversation_lib.Conversation("x", ("a", "b"), [], 0)
        try:
            function([CASES[0]["conversations"]], world.tokenizer)
        finally:
            conversation_lib.default_conversation = before


STYLES = {
    "preprocess_qwen": ("qwen_1_5", TRAIN),
    "preprocess_llama3": ("llava_llama_3", TRAIN),
    "preprocess_v1": ("v1", BOTH),
    "preprocess_llama_2": ("mistral_instruct", BOTH),
}


def _by_style(function_name: str, version: str):
    def check(function, world):
        assert _golden(lambda sources, tok, image: function(sources, tok, has_image=image), {version}) > 0
        if function_name in ("preprocess_qwen", "preprocess_llama3"):
            said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
            tok = tokenizer("qwen" if function_name == "preprocess_qwen" else "llama3")
            made = function([said], tok, system_message="Be brief.", max_len=9)
            assert "Be brief." in tok.decode(made["input_ids"][0])
        else:
            with template("plain"), pytest.raises(LlavaError, match=f"{function_name}: found default_conversation"):
                function([[]], world.tokenizer)

    return check


for _function, (_version, _used) in STYLES.items():
    name(f"llava.train.train.{_function}", _used, note="fits LLaVA-NeXT's golden ids and labels")(
        _by_style(_function, _version)
    )


@name("llava.train.train.preprocess_plain", BOTH)
def _(function, world):
    case = next(case for case in CASES if case["version"] == "plain")
    with template("plain"):
        made = function([case["conversations"]], tokenizer(case["tokenizer"]))
    assert made["input_ids"][0].tolist() == case["input_ids"] and made["labels"][0].tolist() == case["labels"]


def _answers_alone(function_name: str, version: str):
    def check(function, world):
        said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "A temple."}]
        with template(version):
            made = function([said], world.tokenizer, has_image=False)
        learned = [token for token in made["labels"][0].tolist() if token != -100]
        assert world.tokenizer.decode(learned).strip().startswith("A temple.")

    return check


for _function, _version in (("preprocess_mpt", "mpt"), ("preprocess_gemma", "gemma_instruct")):
    name(
        f"llava.train.train.{_function}",
        BOTH if "mpt" in _function else TRAIN,
        "differs",
        "the answers alone are learned",
    )(_answers_alone(_function, _version))


@name("llava.train.train.preprocess_multimodal", BOTH)
def _(function, world):
    args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=True)
    sources = [[{"from": "human", "value": "What is <image> it?"}, {"from": "gpt", "value": "It."}]]
    assert function(copy.deepcopy(sources), SimpleNamespace(is_multimodal=False)) == sources
    with template("qwen_1_5"):
        made = function(sources, args)
    assert made is sources and sources[0][0]["value"] == "<im_start><image><im_end>\nWhat is  it?"


@name("llava.train.train.conversation_lib", BOTH)
def _(module, world):
    assert module is conversation_lib


def _arguments(fields: dict):
    def check(value, world):
        made = value()
        assert {key: getattr(made, key) for key in fields} == fields

    return check


name("llava.train.train.ModelArguments", BOTH, note="the model keys of a run, LLaVA-NeXT's and more")(
    _arguments({"version": "v0", "mm_tunable_parts": None, "mm_patch_merge_type": "flat", "mm_resampler_type": None})
)
name("llava.train.train.DataArguments", BOTH, note="the data keys of a run, LLaVA-NeXT's and more")(
    _arguments({"data_path": None, "image_aspect_ratio": "square", "frames_upbound": 0, "is_multimodal": False})
)


@name(
    "llava.train.train.TrainingArguments",
    BOTH,
    "differs",
    "attn_implementation is the best there is, not flash_attention_2",
)
def _(value, world):
    from transformers import HfArgumentParser

    from llava.train.train import DataArguments, ModelArguments

    flags = ["--output_dir", str(world.folder / "o"), "--lora_enable", "True", "--version", "v1", "--use_cpu", "true"]
    parser = HfArgumentParser((ModelArguments, DataArguments, value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of a key that it renames
        model_args, data_args, training_args = parser.parse_args_into_dataclasses([*flags, "--data_path", "x.json"])
    assert (model_args.version, data_args.data_path, training_args.lora_enable) == ("v1", "x.json", True)
    assert training_args.model_max_length == 4096 and training_args.lora_r == 64


@name(
    "llava.train.train.LazySupervisedDataset",
    BOTH,
    "differs",
    "a record that cannot be read is a LlavaError that names it; another never takes its place",
)
def _(dataset_class, world):
    with template("qwen_1_5"):
        data = dataset_class(tokenizer=world.tokenizer, data_path=world.records, data_args=world.data_args())
        image, several, text = (data[i] for i in range(3))
        assert len(data) == 3 and [item["id"] for item in (image, several, text)] == ["r0", "r1", "r2"]
        ((pixels, size, kind),) = image["image"]
        assert pixels.ndim == 4 and kind == "image" and size == data.process_image("0_0.png")[1]
        assert torch.equal(pixels, data.process_image("0_0.png")[0])
        assert [tuple(shown[0].shape) for shown in several["image"]] == [(3, 28, 28)] * 2
        assert torch.equal(several["image"][0][0], data.process_image("1_0.png", "pad")[0])
        assert [(shown[0].abs().max().item(), *shown[1:]) for shown in text["image"]] == [(0, (28, 28), "text")]
        assert (image["input_ids"] == -200).sum() == 1 and len(image["labels"]) == len(image["input_ids"])
        words = 3 + 4  # "<image> What is shown?" is four, "A temple in China." four
        assert data.lengths == [words + 1 + 128, 5 + 8 + 128, 3 + 12] and data.modality_lengths == [8, 13, -15]
        clip = dataset_class(world.clip_record(), world.tokenizer, world.data_args(video_folder=str(world.folder)))
        ((frames, size, kind),) = clip[0]["image"]
        assert frames.shape == (4, 3, 28, 28) and (size, kind) == ((64, 48), "video")
        gone = dataset_class(world.records, world.tokenizer, world.data_args(image_folder="/nowhere"))
        with pytest.raises(LlavaError, match=r"records.json: record 1 \(id 'r0'\): image /nowhere/0_0.png: no such"):
            gone[0]


@name(
    "llava.train.train.DataCollatorForSupervisedDataset",
    BOTH,
    "differs",
    "the mask is False on padding alone, not wherever the pad id stands",
)
def _(collator_class, world):
    tok = copy.deepcopy(world.tokenizer)
    tok.model_max_length, tok.pad_token_id, tok.padding_side = 4, 7, "right"
    long = {"input_ids": torch.tensor([7, 2, 3, 4, 5]), "labels": torch.tensor([-100, 2, 3, 4, 5])}
    short = {"input_ids": torch.tensor([7, 8]), "labels": torch.tensor([-100, 8])}
    short["image"] = [(torch.zeros(3, 2, 2), (2, 2), "image")]
    batch = collator_class(tokenizer=tok)([long, short])
    assert batch["input_ids"].tolist() == [[7, 2, 3, 4], [7, 8, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 4], [-100, 8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert (batch["image_sizes"], batch["modalities"], len(batch["images"])) == ([(2, 2)], ["image"], 1)
    tok.padding_side = "left"
    assert collator_class(tok)([long, short])["input_ids"].tolist() == [[7, 2, 3, 4], [7, 7, 7, 8]]


@name("llava.train.train.make_supervised_data_module", BOTH)
def _(function, world):
    model = world.loaded[1]
    with template("qwen_1_5"):
        made = function(tokenizer=world.tokenizer, data_args=world.data_args())
        batch = made["data_collator"]([made["train_dataset"][i] for i in range(3)])
    assert made["eval_dataset"] is None
    with torch.no_grad():
        loss = model(**batch).loss
    assert torch.isfinite(loss) and loss > 0


@name("llava.train.train.train", "LLaVA-NeXT: llava/train/train_mem.py; LLaVA: llava/train/train_mem.py")
def _(function, world):
    with pytest.raises(SystemExit) as stop:
        function(["--output_dir", str(world.folder / "o"), "--no_such_key", "1"])
    assert stop.value.code == 2


@name("llava.train.train_mem.train", "LLaVA-NeXT: llava/train/train_mem.py; LLaVA: llava/train/train_mem.py")
def _(function, world):
    from llava.train.train import train

    assert function is train


@name("llava.train.train_xformers.train", "LLaVA: scripts/pretrain_xformers.sh", note="xformers is not needed")
def _(function, world):
    from llava.train.train import train

    assert function is train


@name(
    "llava.train.train.LLaVATrainer",
    BOTH,
    "differs",
    "takes the trained parts and the model's family; see its docstring",
)
def _(value, world):
    from llava.train.llava_trainer import LLaVATrainer

    assert value is LLaVATrainer


@name(
    "llava.train.llava_trainer.LLaVATrainer",
    "LLaVA-NeXT: llava/train/llava_trainer_eval.py; " + BOTH,
    "differs",
    "takes the trained parts and the model's family; see its docstring",
)
def _(value, world):
    import transformers

    assert issubclass(value, transformers.Trainer)


@name(
    "llava.train.llava_trainer.LLaVADPOTrainer",
    "LLaVA-NeXT: llava/train/train_dpo.py",
    "refused",
    "preferences (DPO) are not trained on",
)
def _(value, world):
    refused(value, "LLaVADPOTrainer: there is no such part here; preferences")


@name(
    "llava.train.llava_trainer.LengthGroupedSampler",
    "LLaVA-NeXT: llava/train/llava_trainer.py",
    "differs",
    "one class for every grouping (`group_by`); an order comes from the seed and the epoch",
)
def _(value, world):
    assert sorted(value([5, 1, 4, 2], 1, 2, group_by="varlen")) == [0, 1, 2, 3]


# --- around a model's weights ---


@name("llava.train.train.maybe_zero_3", BOTH)
def _(function, world):
    weight = torch.nn.Parameter(torch.ones(2))
    made = function(weight, ignore_status=True, name="w")
    assert made.tolist() == [1, 1] and not made.requires_grad and made.data_ptr() != weight.data_ptr()


@name("llava.train.train.get_mm_adapter_state_maybe_zero_3", BOTH)
def _(function, world):
    found = function(world.loaded[1].named_parameters(), ["mm_projector", "image_newline"])
    assert sorted({key.split(".")[1] for key in found}) == ["image_newline", "mm_projector"]


def _adapted() -> list:
    names = ("a.lora_A.default.weight", "a.base_layer.weight", "a.base_layer.bias", "b.weight", "b.bias")
    named = [(name, torch.nn.Parameter(torch.zeros(1))) for name in names]
    named[3][1].requires_grad_(False)
    return named


@name("llava.train.train.get_peft_state_maybe_zero_3", BOTH, "differs", "lora_only gives the adapted layers' biases")
def _(function, world):
    found = {bias: sorted(function(_adapted(), bias)) for bias in ("none", "lora_only", "all")}
    assert found["none"] == ["a.lora_A.default.weight"]
    assert found["lora_only"] == ["a.base_layer.bias", "a.lora_A.default.weight"]
    assert found["all"] == ["a.base_layer.bias", "a.lora_A.default.weight", "b.bias"]
    with pytest.raises(LlavaError, match="lora_bias: found 'x'"):
        function(_adapted(), "x")


@name("llava.train.train.get_peft_state_non_lora_maybe_zero_3", BOTH)
def _(function, world):
    assert sorted(function(_adapted())) == ["a.base_layer.bias", "a.base_layer.weight", "b.bias"]
    assert "b.weight" in function(_adapted(), require_grad_only=False)


@name("llava.train.train.find_all_linear_names", BOTH, note="sorted")
def _(function, world):
    layers = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert function(world.loaded[1]) == layers


@name(
    "llava.train.train.safe_save_model_for_hf_trainer",
    BOTH,
    "differs",
    "the projector's file is mm_projector.safetensors",
)
def _(function, world):
    model, whole, part = world.loaded[1], world.folder / "whole", world.folder / "part"
    args = SimpleNamespace(mm_tunable_parts="mm_mlp_adapter", should_save=True)
    function(SimpleNamespace(model=model, args=args), str(part))
    assert sorted(path.name for path in part.iterdir()) == ["config.json", "mm_projector.safetensors"]
    saved = []
    args = SimpleNamespace(mm_tunable_parts=None, should_save=True)
    function(SimpleNamespace(model=model, args=args, save_model=saved.append), str(whole))
    assert saved == [str(whole)]


@name("llava.train.train.smart_tokenizer_and_embedding_resize", BOTH)
def _(function, world):
    from transformers import AutoModelForCausalLM

    model, tok = AutoModelForCausalLM.from_pretrained(tiny.llm(world.folder / "llm")), copy.deepcopy(world.tokenizer)
    old = model.get_input_embeddings().weight.detach()[: len(tok)].clone()
    model.resize_token_embeddings(len(tok))
    function({"additional_special_tokens": ["<one>", "<two>"]}, tok, model)
    new = model.get_input_embeddings().weight.detach()
    assert len(new) == len(tok) and torch.allclose(new[-2:], old.mean(dim=0).expand(2, -1), atol=1e-6)


for _kind, _used in (
    ("flash", "LLaVA-NeXT: llava/train/llama_flash_attn_monkey_patch.py"),
    ("xformers", "LLaVA: llava/train/train_xformers.py"),
):
    name(
        f"llava.train.llama_{_kind}_attn_monkey_patch.replace_llama_attn_with_{_kind}_attn",
        _used,
        "differs",
        "nothing is patched: attn_implementation chooses the attention; it says so",
    )(lambda function, world: function())
