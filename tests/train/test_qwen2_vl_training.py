"""Fine-tuning Qwen2-VL with adaptive patches: whole, with LoRA, resumed, on two processes; results and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.model.qwen2_vl.parts import load, picture, prompt
from tests.train.test_stages import Stopped

ROOT = Path(__file__).parents[2]
ALL = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
RANGE = {"patch_selection_method": "budget", "patch_alpha": "[0.3, 1.0]"}
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 2e-2}
LORA |= {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}


class Kit:
    """A random Qwen2-VL and records; `run` trains in this process."""

    def __init__(self, folder: Path, kind: str = "qwen2_vl"):
        self.folder, self.model = folder, tiny.qwen2_vl(folder / kind, kind)

    def flags(self, out: Path, kinds: str = "iimtiimt", **changes) -> list[str]:
        data = self.folder / kinds
        if not data.exists():
            tiny.records(data, kinds)
        flags = {
            "model_name_or_path": self.model,
            "data_path": data / "records.json",
            "image_folder": data / "images",
            "output_dir": out,
            "mm_tunable_parts": ALL,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        flags |= RANGE | changes
        return [part for key, value in flags.items() if value is not None for part in (f"--{key}", str(value))]

    def run(self, out: Path, kinds: str = "iimtiimt", **changes) -> Path:
        from llava.train.train_qwen2_vl import train

        train(self.flags(out, kinds, **changes))
        return out


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    return Kit(tmp_path_factory.mktemp("qwen2_vl"))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def logits(folder, base=None, **images_kwargs):
    """Of one picture and question; `images_kwargs` empty: the selection that the folder says."""
    model, processor = load(folder, base)
    inputs = processor(text=[prompt(1)], images=[picture(150, 120)], images_kwargs=images_kwargs, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def trained(kit, tmp_path_factory):
    return kit.run(tmp_path_factory.mktemp("whole") / "out", max_steps=12)


def test_the_loss_falls(trained):
    losses = [entry["loss"] for entry in tiny.history(trained)]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_what_is_left_is_a_stock_folder(kit, trained):
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

    before, after = weights(kit.model), weights(trained)
    assert before.keys() == after.keys()
    stock = AutoModelForImageTextToText.from_pretrained(trained)
    assert type(stock).__name__ == "Qwen2VLForConditionalGeneration" and stock.config.text_config.use_cache
    for path in trained.glob("*.json"):
        assert "Adaptive" not in path.read_text(), path.name
    assert json.loads((trained / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]
    saved = json.loads((trained / "preprocessor_config.json").read_text())
    assert (saved["patch_selection_method"], saved["alpha"]) == ("budget", 0.65)  # the middle of the range
    assert AutoTokenizer.from_pretrained(trained).chat_template

    images = Qwen2VLImageProcessorPil.from_pretrained(trained)(images=[picture(150, 120)], return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = prompt(1).replace("<|image_pad|>", "<|image_pad|>" * (len(images["pixel_values"]) // 4))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (ids == stock.config.image_token_id).long()
    with torch.no_grad():
        theirs = stock.eval()(input_ids=ids, mm_token_type_ids=kinds, **images).logits
    assert (logits(trained, patch_selection_method=None) - theirs).abs().max() < 1e-5
    assert (logits(trained) - theirs).abs().max() > 1e-2  # by itself it merges patches


VISION, MERGER = "visual.", "visual.merger."


@pytest.mark.parametrize(
    ("parts", "moved"),
    [
        ("mm_vision_tower", lambda name: name.startswith(VISION) and not name.startswith(MERGER)),
        ("mm_mlp_adapter", lambda name: name.startswith(MERGER)),
        ("mm_language_model", lambda name: not name.startswith(VISION)),
    ],
)
def test_parts(kit, tmp_path, parts, moved):
    out = kit.run(tmp_path / "out", max_steps=1, mm_tunable_parts=parts, patch_alpha=0.5)
    before, after = weights(kit.model), weights(out)
    assert after.keys() == before.keys()  # a run of the merger alone leaves a whole model too
    assert {name for name in after if not after[name].equal(before[name])} <= {name for name in after if moved(name)}
    assert sum(not after[name].equal(before[name]) for name in after) > 0.8 * sum(map(moved, after))
    assert json.loads((out / "preprocessor_config.json").read_text())["alpha"] == 0.5


def stop_before(monkeypatch, step: int):
    """Let the run of this process end after `step` steps."""
    from llava.train.llava_trainer import LLaVATrainer

    take = LLaVATrainer.training_step

    def guarded(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stopped
        return take(self, *args, **kwargs)

    monkeypatch.setattr(LLaVATrainer, "training_step", guarded)


@pytest.mark.parametrize("changes", [{}, {"dataloader_num_workers": 1} | LORA], ids=["whole", "lora-worker"])
def test_resume_gives_the_uninterrupted_run(kit, tmp_path, monkeypatch, capsys, changes):
    """Two epochs of two steps in shuffled order, alpha drawn anew in each; stopped inside the second."""
    changes = changes | dict(max_steps=4, save_strategy="steps", save_steps=1, train_sampling_strategy=None)
    whole = kit.run(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(patch, 3)
        kit.run(tmp_path / "cut", **changes)
    capsys.readouterr()
    cut = kit.run(tmp_path / "cut", **changes)
    assert f"resuming from {tmp_path}/cut/checkpoint-3" in capsys.readouterr().out
    for got, want in zip(tiny.history(cut), tiny.history(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)
    for name in ["adapter_model", "non_lora_trainables"] if "lora_enable" in changes else ["model"]:
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (whole, cut))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_epochs_draw_anew(kit, tmp_path, monkeypatch):
    from llava.model.adaptive_patches import PatchChoice

    drawn, draw = [], PatchChoice.draw
    monkeypatch.setattr(
        PatchChoice, "draw", lambda self, seed, *at: drawn.append((at, draw(self, seed, *at))) or drawn[-1][1]
    )
    kit.run(tmp_path / "out", "iiii", max_steps=2)
    shown, trained = drawn[:4], drawn[4:]  # a run looks at some of its samples first
    assert [where for where, _ in trained] == [(epoch, record, 0) for epoch in (0, 1) for record in range(4)]
    assert len({alpha for _, alpha in trained}) == 8 and shown == trained[:4]


@pytest.fixture(scope="module")
def adapter(kit, tmp_path_factory):
    return kit.run(tmp_path_factory.mktemp("lora") / "adapter", **LORA)


def test_lora(kit, adapter, tmp_path):
    from llava.tools.merge_lora import main

    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert len(names) == 2 * 2 * 7 and all(".language_model.layers." in name for name in names)
    others = load_file(adapter / "non_lora_trainables.safetensors").keys()
    assert others and all(".visual.merger." in name for name in others)
    assert not (adapter / "model.safetensors").exists()
    found = logits(adapter, kit.model)
    assert (found - logits(kit.model, patch_selection_method="budget", alpha=0.65)).abs().max() > 1e-2
    assert logits(adapter).equal(found)  # over the base that it names
    main(["--model-path", str(adapter), "--save-model-path", str(tmp_path / "merged")])
    assert logits(tmp_path / "merged").equal(found)
    assert weights(tmp_path / "merged").keys() == weights(kit.model).keys()
    assert json.loads((tmp_path / "merged/preprocessor_config.json").read_text())["alpha"] == 0.65


def test_lora_as_trained_and_as_loaded(kit, tmp_path, monkeypatch):
    from llava.train import train

    seen, save = [], train.save

    def watched(trainer, out):
        model = trainer.model.eval()
        processor = trainer.processing_class
        inputs = processor(text=[prompt(1)], images=[picture(150, 120)], return_tensors="pt")
        with torch.no_grad():
            seen.append(model(**inputs).logits)
        save(trainer, out)

    monkeypatch.setattr(train, "save", watched)
    out = kit.run(tmp_path / "out", gradient_checkpointing=True, **LORA)
    assert (logits(out) - seen[0]).abs().max() < 1e-5 * seen[0].abs().max()


KINDS = (
    "iittimti" + "miittiti" + "ttiittim"
)  # rank 1's first micro-batch has no image; in the last step rank 0 has none


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles an extension at first use")
def test_two_processes_under_zero3_equal_one(kit, forks, tmp_path):
    rates = {"mm_projector_lr": 2e-3, "mm_vision_tower_lr": 5e-4, "gradient_checkpointing": True}
    rates |= {"gradient_accumulation_steps": 2}
    single = kit.run(tmp_path / "single", KINDS, **rates)
    flags = kit.flags(
        tmp_path / "two", KINDS, **rates, per_device_train_batch_size=2, deepspeed=ROOT / "scripts/zero3.json"
    )
    status, said = forks.ranks(2, flags, tmp_path / "log", "llava.train.train_qwen2_vl:train")
    assert status == 0, said[-9000:]
    ours, theirs = tiny.history(tmp_path / "two"), tiny.history(single)
    assert len(ours) == len(theirs) == 3
    for got, want in zip(ours, theirs, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-5, (got, want)
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * max(1, want["grad_norm"]), (got, want)
    whole, other = weights(single), weights(tmp_path / "two")
    assert whole.keys() == other.keys()
    assert all(torch.allclose(whole[key], other[key], atol=1e-4) for key in whole)


def test_qwen2_5_vl(tmp_path, monkeypatch):
    """Wholly, cut off and resumed; then LoRA over it, merged: stock folders of Qwen2.5-VL."""
    from transformers import AutoModelForImageTextToText

    from llava.tools.merge_lora import main

    kit = Kit(tmp_path, "qwen2_5_vl")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = kit.run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(patch, 3)
        kit.run(tmp_path / "cut", **options)
    again = kit.run(tmp_path / "cut", **options)
    first, second, start = weights(whole), weights(again), weights(kit.model)
    assert first.keys() == second.keys() == start.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    assert not any(torch.equal(first[key], start[key]) for key in first if "norm" not in key and "bias" not in key)
    assert tiny.history(whole)[-1]["loss"] < tiny.history(whole)[0]["loss"]

    adapter = kit.run(tmp_path / "adapter", **LORA | {"model_name_or_path": whole})
    main(["--model-path", str(adapter), "--save-model-path", str(tmp_path / "merged")])
    assert logits(tmp_path / "merged").equal(logits(adapter))
    for folder in (whole, tmp_path / "merged"):
        stock = AutoModelForImageTextToText.from_pretrained(folder)
        assert type(stock).__name__ == "Qwen2_5_VLForConditionalGeneration"
        assert json.loads((folder / "preprocessor_config.json").read_text())["alpha"] == 0.65


def test_bad_pictures_are_counted(kit, tmp_path, capsys):
    kit.flags(tmp_path, "iiim")
    data = tmp_path / "data"
    shutil.copytree(kit.folder / "iiim", data)
    (data / "images/1_0.png").write_bytes(b"not a picture")
    files = {"data_path": data / "records.json", "image_folder": data / "images"}
    out = kit.run(tmp_path / "out", "iiim", max_steps=1, **files)
    printed = capsys.readouterr().out
    assert "left out: r1: image" in printed and "records left out: 1" in printed
    assert tiny.history(out)[0]["loss"] > 0


def test_selection_goes_on_from_the_folder(kit, trained, tmp_path, capsys):
    """A folder's own selection holds where the run says nothing, and its sizes."""
    none = {"patch_selection_method": None, "patch_alpha": None}
    changes = {"mm_tunable_parts": "mm_mlp_adapter", "max_steps": 1}
    out = kit.run(tmp_path / "again", model_name_or_path=trained, max_pixels=25088, **changes, **none)
    assert "patches: budget, alpha 0.65" in capsys.readouterr().out
    saved = json.loads((out / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 112 * 112, "longest_edge": 25088} and saved["alpha"] == 0.65
    out = kit.run(tmp_path / "stock", **changes, **none)
    assert "patches: all" in capsys.readouterr().out
    assert "patch_selection_method" not in json.loads((out / "preprocessor_config.json").read_text())
    none["patch_selection_method"] = "all"
    out = kit.run(tmp_path / "all", model_name_or_path=trained, **changes, **none)
    assert "patches: all" in capsys.readouterr().out
    assert "patch_selection_method" not in json.loads((out / "preprocessor_config.json").read_text())


REFUSED = [
    ({"vision_tower": "x"}, "vision_tower is 'x', but Qwen2-VL has a vision encoder"),
    ({"version": "v1"}, "expected no version"),
    ({"image_aspect_ratio": "anyres"}, "expected no image_aspect_ratio"),
    ({"mm_token_compressor_lr": 1e-3}, "expected no mm_token_compressor_lr"),
    ({"tower": "configs/towers/demo_clip.yaml"}, "expected no tower config"),
    ({"supervise": "llava_next"}, "expected answers_only"),
    ({"mm_tunable_parts": "mm_token_compressor"}, "which Qwen2-VL does not have"),
    ({"patch_alpha": "[0.5, 0.3]"}, "expected a number, or two from the lower"),
    ({"patch_alpha": "[0.1, 0.3, 0.5]"}, "expected a number, or two"),
    ({"patch_alpha": "-0.5"}, "alpha"),
    ({"patch_selection_method": None}, "patch_alpha: found [0.3, 1.0] with patch_selection_method None"),
    ({"patch_selection_method": "v1"}, "it is used by budget and v2"),
    ({"patch_selection_method": "v1", "patch_alpha": None, "patch_thresholds": "3"}, "thresholds"),
    ({"min_pixels": 50177}, "min_pixels and max_pixels: found 50177 and 50176"),
    ({"lora_enable": True, "mm_tunable_parts": "mm_mlp_adapter"}, "mm_mlp_adapter alone is to be trained"),
    ({"model_name_or_path": "llm"}, "found a LLaVA or language model, expected Qwen2-VL's kind"),
    ({"data_path": None}, "data_path: missing"),
]


@pytest.mark.parametrize(
    ("changes", "expected"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_refusals(kit, tmp_path, capsys, changes, expected):
    if "model_name_or_path" in changes:
        changes = {"model_name_or_path": tiny.llm(tmp_path / "llm")}
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", **changes)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and expected in error


def test_video_is_refused(kit, tmp_path, capsys):
    record = {"id": "v", "video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    (tmp_path / "v.json").write_text(json.dumps([record]))
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", data_path=tmp_path / "v.json")
    assert "record 1 (id 'v'): found a video" in capsys.readouterr().err
