"""Settings that fit no picture, tower or projector are refused before weights are read, by show and by training."""

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.config import resolve
from llava.config.__main__ import main as config_command
from llava.errors import LlavaError
from llava.families import get_family
from tests import tiny

LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))
FAMILY = get_family("llava")
ASPECTS = ("square", "pad", "anyres", "anyres_max_2", "native")
MERGES = ("flat", "spatial", "spatial_unpad", "spatial_maxpool2x2", "spatial_unpad_nobase")
PROJECTORS = ("linear", "mlp2x_gelu", "identity", "pooler", "patch_merger", "spatial_merge")
FEATURES = ("patch", "cls_patch")
GRIDS = ("(1x1),...,(2x2)", "[[56, 112], [112, 56]]", "[[28, 56]]", "[[24, 48], [48, 24]]")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """name -> keys that choose it; grids of 1x1 to 4x4 tokens, odd ones too."""
    folder = tmp_path_factory.mktemp("towers")
    made = {
        "clip": tiny.tower(folder / "clip"),
        "clip_fine": tiny.tower(folder / "clip_fine", side=56),
        "clip_odd": tiny.tower(folder / "clip_odd", side=42),
        "clip_one": tiny.tower(folder / "clip_one", side=14),
        "siglip": tiny.tower(folder / "siglip", kind="siglip"),
        "hevc_vit": tiny.tower(folder / "hevc_vit", kind="hevc_vit"),
        "packing": tiny.tower(folder / "packing", kind="hevc_vit_packing"),
    }
    found = {name: {"vision_tower": path} for name, path in made.items()}
    found["clip_s2"] = {"vision_tower": made["clip"], "s2": True, "s2_scales": "28,56"}
    compression = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
    found["clip_toconv"] = {"vision_tower": made["clip_fine"], **compression}
    return found


def truth(run, data_path: Path, clip: bool) -> str | None:
    """What goes wrong when the model is really built, and trained on one batch of every kind of picture."""
    import torch

    from llava.data import read_records
    from llava.data.dataset import BadRecord, LazySupervisedDataset
    from llava.families.settings import arguments
    from llava.train.arguments import make_training_arguments

    args = arguments(run)
    args.data_path, args.image_folder = str(data_path), str(data_path.parent / "images")
    args.video_folder = args.image_folder
    training_args = make_training_arguments(run)
    try:
        loaded, sample_args = FAMILY.prepare(args, args, training_args)
        records = read_records(args, version=run["version"], refused={})
        data = LazySupervisedDataset(records, FAMILY, loaded, sample_args)
        numbers = [at for at, record in enumerate(records) if bool(record.get("video")) == clip]
        samples = [data[at] for at in numbers]
        bad = next((sample for sample in samples if isinstance(sample, BadRecord)), None)
        if bad is not None:
            return str(bad)
        batch = FAMILY.collate(samples, loaded, sample_args)
        with torch.no_grad():
            loss = loaded.model(**batch).loss
    except (LlavaError, RuntimeError) as error:
        return str(error)
    assert torch.isfinite(loss)
    return None


def refusal(run, kinds=()) -> str | None:
    try:
        FAMILY.check(run)
        FAMILY.check_fit(run)
        FAMILY.check_media(run, set(kinds))
    except LlavaError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One picture, two in one record, text, a picture of each candidate's size, and a clip as a folder of frames."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    path = Path(tiny.records(folder, "iimit"))
    records = json.loads(path.read_text())
    (folder / "images/clip").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(folder / f"images/clip/{number}.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A clip."}]
    records.append({"id": "clip", "video": "clip", "conversations": talk})
    for width, height in {(20, 20), (28, 56), (56, 28), (56, 112), (112, 56), (24, 48), (48, 24), (14, 14)}:
        name = f"{width}x{height}.png"
        Image.new("RGB", (width, height)).save(folder / "images" / name)
        records.append({"id": name, "image": name, "conversations": talk})
    path.write_text(json.dumps(records))
    return path


def resolved(kit, **changes):
    base = {"version": "qwen_1_5", "mm_use_im_patch_token": False, "output_dir": "none", "model_max_length": 512}
    flags = {"model_name_or_path": kit.llm, **base, **changes}
    return resolve([f"--{key}={value}" for key, value in flags.items() if value is not None])


NAMES = ("clip", "clip_fine", "clip_odd", "clip_one", "siglip", "hevc_vit", "packing", "clip_s2", "clip_toconv")
COMBINATIONS = list(itertools.product(NAMES, ASPECTS, MERGES, PROJECTORS, FEATURES, GRIDS))


@settings(
    max_examples=400 if LONG else 45,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(combination=st.sampled_from(COMBINATIONS), clip=st.booleans())
def test_what_is_refused_is_what_cannot_be_trained(kit, towers, data, combination, clip):
    """Against the model itself, built with weights and given every kind of picture."""
    tower, aspect, merge, projector, feature, grid = combination
    run = resolved(
        kit,
        **towers[tower],
        image_aspect_ratio=aspect,
        mm_patch_merge_type=merge,
        mm_projector_type=projector,
        mm_vision_select_feature=feature,
        image_grid_pinpoints=grid,
    )
    said = refusal(run, ["video"] if clip else [])
    if said is None:
        assert truth(run, data, clip) is None
    elif refusal(run) is None:  # the clip alone is refused
        assert truth(run, data, clip) is not None, said
        assert truth(run, data, False) is None
    else:
        assert truth(run, data, False) is not None, said


def both_refuse(kit, capsys, monkeypatch, out, **changes) -> str:
    """The line with which `config show` and training end; training has read no weights by then."""
    from transformers import PreTrainedModel

    from llava.train.train import train

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    flags = kit.flags(out, "iitt", **changes)
    with pytest.raises(SystemExit) as stop:
        config_command(["show", *flags])
    assert stop.value.code == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", no_weights)
        with pytest.raises(SystemExit) as stop:
            train(flags)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and shown == said
    assert not (out / "trainer_state.json").exists()
    return said[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_grid_pinpoints": "[[24, 48], [48, 24]]"}, ("image_grid_pinpoints", "24x48", "28")),
        ({"image_grid_pinpoints": None}, ("image_grid_pinpoints", "anyres")),
        ({"mm_vision_select_feature": "cls_patch"}, ("class token", "mm_vision_select_feature")),
        ({"mm_vision_select_layer": -9}, ("mm_vision_select_layer", "4 hidden states")),
        ({"mm_projector_type": "mlp2x_gleu"}, ("mm_projector_type", "mlp2x_gleu")),
        ({"image_aspect_ratio": "native"}, ("native", "one size")),
        ({"mm_tunable_parts": "mm_language_model"}, ("projector", "new and random", "pretrain_mm_mlp_adapter")),
        ({"mm_tunable_parts": "mm_token_compressor"}, ("nothing to train", "mm_token_compressor")),
        ({"lora_enable": True, "mm_tunable_parts": "mm_mlp_adapter"}, ("lora_enable", "mm_mlp_adapter alone")),
        ({"bits": 4}, ("bits", "lora_enable")),
        ({"supervise": "llava_next", "version": "mpt"}, ("supervise", "mpt")),
        ({"attn_implementation": "fancy"}, ("attn_implementation", "fancy")),
        ({"optim": "lion_80bit"}, ("lion_80bit",)),
        ({"lr_scheduler_type": "cosinus"}, ("cosinus",)),
        ({"model_class_name": "LlavaMamba"}, ("model_class_name", "LlavaMamba")),
        (
            {"use_token_compression": True, "compression_input_size": 2, "compression_output_size": 1}
            | {"freeze_mm_token_compressor": True},
            ("token compressor is new and random", "pretrain_token_compressor"),
        ),
        ({"pretrain_token_compressor": "nowhere.pth", "use_token_compression": True}, ("compression_input_size",)),
    ],
)
def test_show_and_training_refuse_alike_and_before_weights(kit, tmp_path, capsys, monkeypatch, changes, words):
    said = both_refuse(kit, capsys, monkeypatch, tmp_path / "out", **changes)
    assert all(word in said for word in words), said


def test_deepspeed_files(kit, tmp_path, capsys, monkeypatch):
    file = tmp_path / "zero.json"
    for content, words in (
        ("{", ("not valid JSON",)),
        ("[]", ("list", "mapping")),
        ('{"zero_optimization": {"stage": 4}}', ("zero_optimization", "0 to 3")),
        ('{"zero_optimisation": {"stage": 3}}', ("zero_optimisation", "zero_optimization")),
        ('{"gradient_clipping": 0.5}', ("gradient_clipping", "max_grad_norm", "1.0")),
        ('{"optimizer": {"params": {"lr": 0.5}}}', ("optimizer.params.lr", "learning_rate", "0.001")),
        ('{"bf16": {"enabled": true}}', ("bf16.enabled", "False")),
    ):
        file.write_text(content)
        said = both_refuse(kit, capsys, monkeypatch, tmp_path / "out", deepspeed=file)
        assert str(file) in said and all(word in said for word in words), said
    said = both_refuse(kit, capsys, monkeypatch, tmp_path / "out", deepspeed=tmp_path / "none.json")
    assert "none.json: no such file" in said


def test_a_projector_file_that_does_not_fit(kit, tmp_path, capsys, monkeypatch):
    changes = dict(pretrain_mm_mlp_adapter=kit.projector, mm_projector_type="linear")
    said = both_refuse(kit, capsys, monkeypatch, tmp_path / "out", **changes)
    assert kit.projector in said and "does not fit mm_projector_type linear" in said


def test_videos_are_asked_about_where_there_are_some(kit, data, tmp_path, capsys, monkeypatch):
    """A newline in each row needs a newline token, which merge kind spatial has not; pictures have no such rows."""
    changes = dict(mm_patch_merge_type="spatial", mm_newline_position="grid", image_aspect_ratio="pad", max_steps=1)
    kit.run(tmp_path / "pictures", "iitt", **changes)
    capsys.readouterr()
    flags = dict(data_path=data, video_folder=data.parent / "images")
    said = both_refuse(kit, capsys, monkeypatch, tmp_path / "out", **changes, **flags)
    assert "mm_newline_position" in said and "newline token" in said


def test_show_leaves_out_what_is_not_on_this_machine(kit, tmp_path, capsys):
    for changes in (
        {"model_name_or_path": "nobody/no-model"},
        {"vision_tower": "nobody/clip-none"},
        {"pretrain_mm_mlp_adapter": "checkpoints/none/mm_projector.bin"},
    ):
        flags = kit.flags(tmp_path / "out", "iitt", **changes)
        config_command(["show", *flags])
        told = capsys.readouterr()
        (value,) = changes.values()
        assert "note: not on this machine" in told.err and value in told.err and value in told.out
        with pytest.raises(SystemExit):
            kit.run(tmp_path / "out", "iitt", **changes)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and value in said
    # the rest is checked all the same
    flags = kit.flags(tmp_path / "out", model_name_or_path="nobody/no-model", image_grid_pinpoints="[[24, 48]]")
    with pytest.raises(SystemExit):
        config_command(["show", *flags])
    assert "image_grid_pinpoints" in capsys.readouterr().err


def test_readmes_tower_goes_with_the_shipped_configs(tmp_path, capsys):
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    block = text.split("A tower YAML holds what belongs to the encoder:")[1].split("| `configs/towers/`")[0]
    (tmp_path / "tower.yaml").write_text("\n".join(line[4:] for line in block.splitlines() if line.startswith("    ")))
    config_command(["show", str(root / "configs/train/finetune_next.yaml"), "--tower", str(tmp_path / "tower.yaml")])
    assert "openai/clip-vit-large-patch14-336" in capsys.readouterr().out


def test_what_is_refused_costs_no_earlier_run(kit, tmp_path, capsys):
    out = kit.run(tmp_path / "out", "iitt", max_steps=1, save_strategy="steps", save_steps=1)
    kept = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    again = dict(overwrite_output_dir=True, save_strategy="steps", save_steps=1)
    for wrong in (
        dict(data_path=tmp_path / "none.json"),
        dict(image_grid_pinpoints="[[24, 48]]"),
        dict(resume_from_checkpoint=out / "checkpoint-1"),
    ):
        with pytest.raises(SystemExit) as stop:
            kit.run(out, "iitt", **again, **wrong)
        assert stop.value.code == 2
        assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == kept
    capsys.readouterr()
    kit.run(out, "iitt", max_steps=2, overwrite_output_dir=True)
    assert len(tiny.history(out)) == 2 and not (out / "checkpoint-1").exists()
    assert "resuming" not in capsys.readouterr().out


# --- where the weights of a part come from ---


def origins(printed: str) -> dict[str, str]:
    found = (line.partition(": ") for line in printed.splitlines() if line.startswith("mm_"))
    return {part: text for part, _, text in found}


def test_each_part_says_where_it_starts_from(kit, tmp_path, capsys):
    first = kit.run(tmp_path / "first", "iitt", max_steps=1)
    told = origins(capsys.readouterr().out)
    assert told["mm_mlp_adapter"] == "new and random (trained)"
    assert told["mm_vision_tower"] == f"{kit.clip} (trained)" and told["mm_language_model"] == f"{kit.llm} (trained)"

    again = dict(model_name_or_path=first, max_steps=1, mm_tunable_parts="mm_language_model")
    kit.run(tmp_path / "again", "iitt", **again)  # the projector is the checkpoint's
    told = origins(capsys.readouterr().out)
    assert told["mm_mlp_adapter"] == told["mm_vision_tower"] == f"{first} (frozen)"

    kit.run(tmp_path / "other", "iitt", **again | {"vision_tower": kit.clip_other})  # whose width fits
    told = origins(capsys.readouterr().out)
    assert told["mm_vision_tower"] == f"{kit.clip_other} (frozen)"
    assert told["mm_mlp_adapter"].startswith(f"{first}, where it was trained behind another tower (mm_vision_tower ")

    with pytest.raises(SystemExit):
        kit.run(tmp_path / "wide", "iitt", **again | {"vision_tower": kit.hevc_vit})  # 64 channels
    assert "projector is new and random" in capsys.readouterr().err

    kit.run(
        tmp_path / "file", "iitt", **again | {"vision_tower": kit.clip_other, "pretrain_mm_mlp_adapter": kit.projector}
    )
    assert origins(capsys.readouterr().out)["mm_mlp_adapter"] == f"{kit.projector} (frozen)"


def test_a_checkpoint_that_lacks_this_projects_own_keys_keeps_its_tower(kit, tmp_path, capsys):
    """LLaVA-NeXT's checkpoints say nothing of s2_scales and compression; that is no other tower."""
    first = kit.run(tmp_path / "first", "iitt", max_steps=1)
    path = first / "config.json"
    config = json.loads(path.read_text())
    for key in ("s2", "s2_scales", "use_token_compression", "compression_input_size", "compression_output_size"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    capsys.readouterr()
    kit.run(tmp_path / "again", "iitt", model_name_or_path=first, max_steps=1)
    told = origins(capsys.readouterr().out)
    assert told["mm_vision_tower"] == told["mm_mlp_adapter"] == f"{first} (trained)"


# --- what is shown at the start ---


def test_a_sample_is_shown_with_what_is_supervised(kit, tmp_path, capsys):
    kit.run(tmp_path / "out", "iitt", max_steps=1, supervise="answers_only")
    printed = capsys.readouterr().out
    shown = [line.removeprefix("  | ") for line in printed.splitlines() if line.startswith("  | ")]
    assert shown == [
        *("<|im_start|>system", "You are a helpful assistant.<|im_end|>", "<|im_start|>user", "<image>"),
        *("What is shown?<|im_end|>", "<|im_start|>assistant", "«A temple in China.<|im_end|>", "»"),
    ]
    share = next(line for line in printed.splitlines() if line.startswith("supervised: "))
    from transformers import AutoTokenizer

    tokenizer, said, words = AutoTokenizer.from_pretrained(kit.llm), 0, 0
    for number, kind in enumerate("iitt"):
        answer = tokenizer(" ".join(["A temple in China."] * (1 + number % 3)) + "<|im_end|>\n").input_ids
        question = "\nWhat is shown?" if kind == "i" else "What is shown?"
        pieces = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>user\n", question)
        rest = [tokenizer(piece).input_ids for piece in (*pieces, "<|im_end|>\n", "<|im_start|>assistant\n")]
        said, words = said + len(answer), words + len(answer) + sum(map(len, rest))
    assert share == f"supervised: {said / words:.0%} of the text tokens of 4 samples"


def test_data_without_a_single_sample_stop_before_the_first_step(kit, tmp_path, capsys):
    path = Path(tiny.records(tmp_path / "data", "ii"))
    for number in range(2):
        (path.parent / f"images/{number}_0.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", None, data_path=path)
    assert "none of the 2 records that were looked at gives a sample; the first is r0: image" in capsys.readouterr().err
