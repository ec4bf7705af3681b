"""LoRA: what is trained and saved, resumption, loading over a base, merging, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from tests import tiny
from tests.train.test_stages import GRIDS, Stopped

LORA = dict(lora_enable=True, lora_r=4, lora_alpha=8, lora_dropout=0.0, learning_rate=2e-2, save_strategy="no")
NO_TOWER = dict(mm_tunable_parts="mm_mlp_adapter,mm_language_model")
LLM_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def load(folder, base=None):
    """(model, its logits on a picture and a prompt)."""
    from llava.model.builder import load_pretrained_model

    name = "llava_qwen_lora"
    model = load_pretrained_model(str(folder), base and str(base), name, device_map="cpu", torch_dtype="float32")[1]
    return model, logits(model)


def logits(model):
    side = model.get_vision_tower().image_size
    image = torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)
    ids = torch.tensor([[5, -200, 7, 11, 13]])
    was = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=ids, images=[image], image_sizes=[(side, side)]).logits
    model.train(was)
    return out


@pytest.fixture(scope="module")
def full(kit, tmp_path_factory):
    """A whole LLaVA checkpoint, to adapt."""
    return kit.run(tmp_path_factory.mktemp("full") / "out", max_steps=1, save_strategy="no")


@pytest.fixture(scope="module")
def adapter(kit, full, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "adapter"
    return kit.run(out, model_name_or_path=full, max_steps=3, **LORA, **NO_TOWER)


def test_what_moves(kit, full, tmp_path, spy):
    kit.run(tmp_path / "out", model_name_or_path=full, max_steps=3, **LORA, **NO_TOWER)
    moved = spy.moved()
    adapters = {name for name in spy.before if "lora_" in name}
    assert len(adapters) == 2 * 2 * len(LLM_LINEAR)  # A and B, two layers
    assert all(".layers." in name and "vision_tower" not in name for name in adapters)
    assert moved - adapters == {
        "base_model.model.model.image_newline",
        *(f"base_model.model.model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }
    assert {name for name in moved if "lora_B" in name} == {name for name in adapters if "lora_B" in name}


@pytest.mark.parametrize(
    ("bias", "kept"), [("none", ()), ("lora_only", ("q_proj", "k_proj", "v_proj")), ("all", ("q_proj",))]
)
def test_biases(kit, full, tmp_path, bias, kept):
    changes = dict(mm_tunable_parts="mm_language_model", lora_bias=bias, max_steps=2)
    out = kit.run(tmp_path / "out", model_name_or_path=full, **LORA, **changes)
    others = load_file(out / "non_lora_trainables.safetensors")
    biases = {name for name in others if name.endswith("bias")}
    assert all("self_attn" in name and "base_layer" not in name for name in biases)
    assert bool(biases) == bool(kept) and all(any(part in name for name in biases) for part in kept)
    model, _ = load(out, full)
    for name in biases:
        assert others[name].equal(model.get_parameter(name.removeprefix("base_model.model."))), name


def test_files(adapter, full):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, LLM_LINEAR)
    assert config["base_model_name_or_path"] == str(full)
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names and len(names) == 28
    others = load_file(adapter / "non_lora_trainables.safetensors")
    assert len(others) == 5 and "base_model.model.model.mm_projector.0.weight" in others
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "trainer_state.json"):
        assert (adapter / name).is_file()
    assert not (adapter / "model.safetensors").exists()


def test_loaded_merged_and_trained_agree(kit, full, tmp_path, spy, capsys):
    from llava.tools.merge_lora import main

    out = kit.run(tmp_path / "adapter", model_name_or_path=full, max_steps=3, **LORA, **NO_TOWER)
    trained = logits(spy.trainer.model)
    model, loaded = load(out, full)
    assert type(model).__name__ == "LlavaQwenForCausalLM" and not any("lora_" in n for n, _ in model.named_modules())
    assert (loaded - trained).abs().max() < 1e-5
    assert (load(full)[1] - trained).abs().max() > 1e-2  # the adapter does something
    assert load(out)[1].equal(loaded)  # over the base that it names
    assert str(full) in capsys.readouterr().out
    main(["--model-path", str(out), "--model-base", str(full), "--save-model-path", str(tmp_path / "merged")])
    assert load(tmp_path / "merged")[1].equal(loaded)
    with pytest.raises(SystemExit):
        main(["--model-path", str(out), "--save-model-path", str(tmp_path / "merged")])
    with pytest.raises(SystemExit):
        main(["--model-path", str(full), "--save-model-path", str(tmp_path / "other")])
    error = capsys.readouterr().err
    assert "a model lies there" in error and "no adapter_config.json" in error


def test_over_a_plain_language_model(kit, tmp_path, spy):
    """LLaVA's usual start: a language model, a tower of its own, and a projector that this run trains."""
    out = kit.run(tmp_path / "out", max_steps=2, **LORA, **NO_TOWER)
    assert (load(out, kit.llm)[1] - logits(spy.trainer.model)).abs().max() < 1e-5
    others = load_file(out / "non_lora_trainables.safetensors")
    others.pop("base_model.model.model.mm_projector.0.weight")
    save_file(others, out / "non_lora_trainables.safetensors")
    with pytest.raises(LlavaError, match=r"holds 1 weights, model\.mm_projector\.0\.weight"):
        load(out, kit.llm)


def test_tower_and_compressor_are_kept_whole(kit, tmp_path, spy):
    changes = dict(vision_tower=kit.clip_fine, mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model")
    out = kit.run(tmp_path / "out", max_steps=2, gradient_checkpointing=True, **LORA, **changes, **GRIDS)
    assert spy.moved_parts() == {
        "mm_vision_tower",
        "mm_token_compressor",
        "mm_mlp_adapter",
        "mm_language_model",
    }
    others = load_file(out / "non_lora_trainables.safetensors")
    assert sum(".token_compressor." in name for name in others) == 4
    assert sum(".vision_tower.vision_tower.vision_model." in name for name in others) > 20
    trained = {name: value for name, value in spy.trainer.model.state_dict().items() if "lora_" not in name}
    model, _ = load(out, kit.llm)
    for name, value in model.get_vision_tower().state_dict().items():
        assert value.equal(trained[f"base_model.model.model.vision_tower.{name}"]), name


def test_resume_gives_the_uninterrupted_run(kit, full, tmp_path, monkeypatch, capsys):
    from llava.train.llava_trainer import LLaVATrainer

    changes = LORA | NO_TOWER | dict(model_name_or_path=full, max_steps=4, save_strategy="steps", save_steps=1)
    whole = kit.run(tmp_path / "whole", "iiiitiii", **changes)
    step = LLaVATrainer.training_step

    def step_until_three(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LLaVATrainer, "training_step", step_until_three)
        kit.run(tmp_path / "cut", "iiiitiii", **changes)
    load(tmp_path / "cut/checkpoint-3", full)  # a checkpoint is a whole adapter
    cut = kit.run(tmp_path / "cut", "iiiitiii", **changes)
    assert f"resuming from {tmp_path}/cut/checkpoint-3" in capsys.readouterr().out
    for got, want in zip(tiny.history(cut), tiny.history(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        first, second = load_file(whole / name), load_file(cut / name)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_start_from_an_adapter(kit, full, adapter, tmp_path, spy, capsys):
    changes = LORA | NO_TOWER | dict(model_name_or_path=full, max_steps=1)
    kit.run(tmp_path / "out", lora_weight_path=adapter, **changes)
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        peft_name = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        assert value.equal(spy.before[peft_name]), name
    for name, value in load_file(adapter / "non_lora_trainables.safetensors").items():
        assert value.equal(spy.before[name]), name
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "other", lora_weight_path=adapter, **(changes | {"lora_r": 8}))
    error = capsys.readouterr().err
    assert "lora_A.weight is (4, " in error and "the model has (8, " in error and "expected lora_r" in error


def test_llavas_own_files(adapter, full, tmp_path):
    """`non_lora_trainables.bin`, `adapter_model.bin`, and a config that does not keep adapters out of the tower."""
    expected = load(adapter, full)[1]
    old = tmp_path / "llava-lora"
    shutil.copytree(adapter, old)
    for stem in ("non_lora_trainables", "adapter_model"):
        torch.save(load_file(old / f"{stem}.safetensors"), old / f"{stem}.bin")
        (old / f"{stem}.safetensors").unlink()
    config = json.loads((old / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps(config | {"exclude_modules": None}))
    assert load(old, full)[1].equal(expected)


def test_wrong_folders(kit, full, adapter, tmp_path, capsys):
    wide = tmp_path / "wide"
    shutil.copytree(adapter, wide)
    weights = load_file(wide / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(weights | {name: torch.zeros(4, 48)}, wide / "adapter_model.safetensors")
    with pytest.raises(LlavaError, match="for 48 channels, the base model has 32: it is not the model"):
        load(wide, full)
    name = name.replace("layers.0", "layers.9")
    save_file(weights | {name: torch.zeros(4, 32)}, wide / "adapter_model.safetensors")
    with pytest.raises(LlavaError, match=r"layers\.9\.self_attn\.q_proj\.lora_A\.weight, which the base model has no"):
        load(wide, full)
    (wide / "non_lora_trainables.safetensors").unlink()
    with pytest.raises(LlavaError, match=r"non_lora_trainables\.safetensors: no such file"):
        load(wide, full)
    moved = tmp_path / "moved"
    shutil.copytree(full, moved)
    capsys.readouterr()
    load(adapter, moved)
    assert f"was trained on {full}, loaded over {moved}" in capsys.readouterr().out


def test_refusals(kit, full, adapter, tmp_path, capsys):
    for changes, expected in [
        (dict(mm_tunable_parts="mm_mlp_adapter"), "mm_mlp_adapter alone is to be trained"),
        (dict(model_name_or_path=adapter, **NO_TOWER), "is a LoRA adapter, expected a model"),
        (dict(mm_use_im_start_end=True, **NO_TOWER), "LoRA adapters"),
        (dict(bits=3, **NO_TOWER), "bits is 3, expected 16, 8 or 4"),
        (dict(bits=4, lora_enable=False, **NO_TOWER), "expected lora_enable too"),
    ]:
        with pytest.raises(SystemExit):
            kit.run(tmp_path / "out", **({"model_name_or_path": full} | LORA | changes))
        assert expected in capsys.readouterr().err


def test_quantised_without_bitsandbytes(kit, full, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", model_name_or_path=full, bits=4, **LORA, **NO_TOWER)
    assert "bits 4: needs the bitsandbytes package" in capsys.readouterr().err


def test_half_precision_base(kit, full, tmp_path):
    """bf16 frozen weights with float32 trained ones, as on a GPU without DeepSpeed: same loss but for rounding."""
    from types import SimpleNamespace

    from llava.families.precision import Precision
    from llava.train.lora import adapt
    from llava.train.parts import set_trainable

    model, _ = load(full)
    settings = SimpleNamespace(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_weight_path="")
    rows = dict(
        input_ids=torch.tensor([[5, -200, 7, 11, 13]]),
        labels=torch.tensor([[-100, -100, 7, 11, 13]]),
        images=[torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)],
        image_sizes=[(28, 28)],
    )
    model.train()
    expected = model(**rows).loss.item()
    model = adapt(model.to(torch.bfloat16), SimpleNamespace(model_name_or_path=str(full)), settings)
    set_trainable(model, {"mm_mlp_adapter", "mm_language_model"})
    Precision(trained=torch.float32, frozen=torch.bfloat16).apply(model)
    model.train()
    rows["images"] = [image.to(torch.bfloat16) for image in rows["images"]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**rows).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())
    assert any(p.grad.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
