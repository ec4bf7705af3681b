"""What is measured of a comparison's models, against counts of the models themselves."""

import contextlib
import json
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from llava.compare import asking, cost, stepping
from llava.compare.cost import FIGURES, Subject, measure, read_subjects, spread
from llava.config import resolve
from llava.errors import LlavaError
from llava.inference.engine import Inference
from llava.tools.towers import describe
from llava.train.train import train
from tests import tiny
from tests.eval import common
from tests.model import own_encoders, small
from tests.support.families import FamilyKit

FROZEN = "mm_mlp_adapter,mm_language_model"


def subject(kit, out: Path, **changes) -> Subject:
    flags = kit.flags(output_dir=out, mm_tunable_parts=FROZEN, **changes)
    return Subject(str(kit.checkpoint), flags, str(kit.records), str(kit.folder / "records/images"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return FamilyKit("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    """A packed tower that chooses patches, in a folder as `FamilyKit`'s."""
    folder = tmp_path_factory.mktemp("adaptive")
    found = FamilyKit("llava", folder)
    tower = tiny.tower(folder / "packing", "hevc_vit_packing", side=56)
    found.keys |= {"vision_tower": tower, "image_aspect_ratio": "pad", "adaptive_patches": '{"method": "v1"}'}
    found.keys.pop("image_grid_pinpoints")
    changes = {"vocab_size": 703, "adaptive_patches": {"method": "v1"}, "image_aspect_ratio": "pad"}
    model = small.model(tower, conversation_template="qwen_1_5", **changes)
    model.save_pretrained(folder / "trained")
    common.load_tokenizer(str(tiny.TOKENIZER)).save_pretrained(folder / "trained")
    found.checkpoint = folder / "trained"
    first = Path(pictures_in(found.records)[0]["image"])  # beside others of noise, whose patches are all kept
    Image.new("RGB", (40, 40), (90, 120, 60)).save(folder / "records/images" / first)
    return found


def pictures_in(records: str) -> list[dict]:
    return [record for record in json.loads(Path(records).read_text()) if isinstance(record.get("image"), str)]


def prepared(kit, inference) -> list[dict]:
    """The inputs of one question for each picture."""
    from llava.images.reading import load_image

    prompt = inference.prompt([("human", "<image>\nWhat is shown?")])
    shown = [load_image(kit.folder / "records/images" / record["image"]) for record in pictures_in(kit.records)]
    return [inference.inputs([prompt], [[picture]]) for picture in shown]


def merged_tokens(inference, inputs: dict) -> int:
    """Tokens that LLaVA's merge puts in the place of a picture."""
    ids = inputs["input_ids"]
    media = inputs["images"], inputs["modalities"], inputs["image_sizes"]
    with torch.no_grad():
        embeds = inference.model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, *media)[4]
    return embeds.shape[1] - ids.shape[1] + 1


def test_figures_of_llava(llava, tmp_path):
    found, notes = measure({"clip": subject(llava, tmp_path / "out", pack_sequences=True)}, rounds=1)
    (figures,) = found.values()
    assert tuple(figures) == FIGURES and None not in figures.values() and len(notes) == 1

    inference = Inference.load(str(llava.checkpoint))
    merged = [merged_tokens(inference, inputs) for inputs in prepared(llava, inference)]
    assert len(set(merged)) > 1 and figures["visual_tokens"] == statistics.fmean(merged)
    tower = sum(parameter.numel() for parameter in inference.model.get_vision_tower().parameters())
    total = sum(parameter.numel() for parameter in inference.model.parameters())
    assert (figures["tower_params"], figures["total_params"]) == (tower, total)
    assert figures["trained_params"] == total - tower
    assert figures["tower_gflops"] == describe(str(llava.folder / "clip"))["gflops"] > 0
    for name in ("ttft_ms", "train_samples_per_s", "peak_memory_mb"):
        assert 0 < figures[name]["p25"] <= figures[name]["median"] <= figures[name]["p75"]


def test_questions_of_the_training_data(llava, tmp_path):
    """Without questions of its own a subject is asked those of its stage; here a mixture, whose parts have folders."""
    words, seen = tmp_path / "words.json", tmp_path / "seen.json"
    records = json.loads(Path(llava.records).read_text())
    words.write_text(json.dumps([record for record in records if "image" not in record]))
    seen.write_text(json.dumps([record for record in records if "image" in record] * 2))
    parts = [{"json_path": str(words)}, {"json_path": str(seen), "image_folder": f"{llava.folder}/records/images"}]
    (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": parts}))
    argv = llava.flags(output_dir=tmp_path / "out", data_path=tmp_path / "mixture.yaml", image_folder=tmp_path)
    unit = asking.Asking(Subject(str(llava.checkpoint), argv), resolve(argv), "cpu")
    unit.load()
    shown = [record["image"] for record in pictures_in(llava.records)]
    assert [question.images for question in unit.questions] == [[name] for name in shown]
    unit.measure()
    assert len(unit.seconds) == min(asking.ASKED, len(shown))

    argv += ["--data_path", str(words)]
    unit = asking.Asking(Subject(str(llava.checkpoint), argv), resolve(argv), "cpu")
    with pytest.raises(LlavaError, match=r"words\.json: found no record with one picture"):
        unit.load()


def test_a_tower_that_chooses_patches(adaptive, tmp_path):
    """Its tokens and operations depend on the pictures and on the choice."""
    one = subject(adaptive, tmp_path / "out")
    every = Subject(one.model, one.argv, one.data_path, one.image_folder, selection="none")
    found, _ = measure({"v1": one, "all": every}, rounds=1)
    inference = Inference.load(str(adaptive.checkpoint))
    merged = [merged_tokens(inference, inputs) for inputs in prepared(adaptive, inference)]
    assert found["v1"]["visual_tokens"] == statistics.fmean(merged)
    inference.family.choose_patches(inference.loaded, None)
    whole = [merged_tokens(inference, inputs) for inputs in prepared(adaptive, inference)]
    assert found["all"]["visual_tokens"] == statistics.fmean(whole) > statistics.fmean(merged)
    share = statistics.fmean(merged) / statistics.fmean(whole)
    # layers take as many times fewer operations, attention fewer still
    assert share**2 < found["v1"]["tower_gflops"] / found["all"]["tower_gflops"] <= share < 1
    assert found["v1"]["train_samples_per_s"] is not None


@pytest.mark.parametrize("kind", ["compressed", "own", "s2"])
def test_towers_of_more_than_an_encoder(llava, tmp_path, kind):
    """A tower's parameters and operations are those of its row in `llava.tools.towers`."""
    tower, keys = tiny.tower(tmp_path / "clip", side=56), {"mm_vision_select_layer": -2}
    if kind == "compressed":
        keys |= {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
    elif kind == "s2":
        keys |= {"mm_vision_tower_type": "clip_s2", "s2_scales": "56,112"}
    else:
        (tmp_path / "mine.py").write_text(own_encoders.FILE)
        tower, keys = f"{tmp_path}/mine.py:Plain", keys | {"vision_tower_image": own_encoders.IMAGE}
    keys |= {"vision_tower": tower}
    (tmp_path / "tower.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    row = describe(str(tmp_path / "tower.yaml"))
    argv = llava.flags(output_dir=tmp_path / "out", tower=tmp_path / "tower.yaml", max_steps=1)
    argv = [part for flag, part in pairs(argv) if flag not in ("--vision_tower", "--mm_vision_select_layer")]
    argv += ["--model_name_or_path", tiny.llm(tmp_path / "llm"), "--save_strategy", "no"]
    train(argv)

    one = Subject(str(tmp_path / "out"), argv, llava.records, str(llava.folder / "records/images"))
    unit = asking.Asking(one, resolve(argv), "cpu")
    unit.load()
    assert unit.facts()["tower_params"] == row["params"] > 0
    assert unit.gflops() == (row["gflops"], True) and row["gflops"] > 0
    unit.measure()
    unit.measure()
    assert len(unit.seconds) == 2 * min(asking.ASKED, len(pictures_in(llava.records)))


def pairs(argv: list[str]):
    """(flag, itself or its value) of each word of a command line of flags with one value."""
    return [(argv[at - at % 2], word) for at, word in enumerate(argv)]


def test_an_encoder_without_a_size_of_its_own(tmp_path):
    kit = FamilyKit("qwen2_vl", tmp_path / "kit")
    found, notes = measure({"qwen": subject(kit, tmp_path / "out")}, rounds=1)
    figures = found["qwen"]
    assert None not in figures.values() and "pictures on average" in notes[1]

    inference = Inference.load(str(kit.checkpoint), attn_implementation="eager")
    model, inputs = inference.model, prepared(kit, inference)
    pads = [int((row["input_ids"] == model.config.image_token_id).sum()) for row in inputs]
    assert figures["visual_tokens"] == statistics.fmean(pads)
    merger = {id(parameter) for parameter in model.model.visual.merger.parameters()}
    sizes = [parameter.numel() for parameter in model.model.visual.parameters() if id(parameter) not in merger]
    assert figures["tower_params"] == sum(sizes)
    assert figures["total_params"] == sum(parameter.numel() for parameter in model.parameters())

    operations = 0
    for row in inputs:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.model.visual(row["pixel_values"], grid_thw=row["image_grid_thw"])
        counted = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
        operations += counter.get_total_flops() - max(v for name, v in counted.items() if name.endswith("merger"))
    assert figures["tower_gflops"] == pytest.approx(operations / len(inputs) / 1e9, rel=1e-6)


@pytest.fixture
def stubs(monkeypatch):
    """Measurements that take no time; `turns` is who had which, in order, and `loaded` who holds a model."""
    seen = SimpleNamespace(turns=[], loaded=Counter(), most=0)

    def make(kind):
        class Stub:
            rows, trained_params, figures = 4, 1, {}

            def __init__(self, first, *rest):
                self.name = first.model if kind == "ask" else first[-1]
                self.there = False

            def load(self):
                if not self.there:
                    seen.loaded[self.name, kind] += 1
                self.there = True

            def facts(self):
                return {"total_params": 1}

            def gflops(self):
                return 1.0, True

            def measure(self):
                assert self.there
                seen.turns.append((self.name, kind))

            def rest(self):
                pass

            def drop(self):
                self.there = False

        return Stub

    monkeypatch.setattr(asking, "Asking", make("ask"))
    monkeypatch.setattr(stepping, "Stepping", make("step"))
    return seen


@pytest.mark.parametrize("kept", [True, False])
def test_turns_are_interleaved_and_rotated(stubs, monkeypatch, kept):
    monkeypatch.setattr(cost, "_fit", lambda subjects: kept)
    subjects = {name: Subject(name, ["--run_name", name]) for name in "abc"}
    _, notes = measure(subjects, rounds=4, device="cpu")
    order = [name for name, kind in stubs.turns if kind == "ask"]
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert stubs.turns == [(name, kind) for name in order for kind in ("ask", "step")]
    assert set(stubs.loaded.values()) == {1 if kept else 4}
    assert ("in the host's memory" in notes[0]) is kept and ("not loaded" in notes[0]) is not kept


def test_one_that_fails_is_told_and_the_others_are_measured(llava, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_fit", lambda subjects: False)  # loaded anew in each round
    good = subject(llava, tmp_path / "out")
    lost = Subject(str(tmp_path / "nowhere"), good.argv, good.data_path, good.image_folder)
    blind = Subject(good.model, [*good.argv, "--vision_tower", str(tmp_path / "no_tower")], good.data_path, None)
    wrong = Subject(good.model, ["--no_such_key", "1"])
    found, notes = measure({"lost": lost, "good": good, "blind": blind, "wrong": wrong}, rounds=2)
    assert None not in found["good"].values()
    assert found["lost"]["ttft_ms"] is None and found["lost"]["train_samples_per_s"] is not None
    assert found["blind"]["ttft_ms"] is None and found["blind"]["train_samples_per_s"] is None
    assert set(found["wrong"].values()) == {None}
    said = {name: [note for note in notes if note.startswith(f"{name}: ")] for name in found}
    assert not said["good"] and len(said["lost"]) == len(said["wrong"]) == 1 and len(said["blind"]) == 2
    assert "asking it cannot be measured" in said["lost"][0] and "nowhere" in said["lost"][0]
    assert "no_tower" in " ".join(said["blind"]) and "no_such_key" in said["wrong"][0]
    assert all("\n" not in note for note in notes)


@pytest.mark.parametrize("packing", [{}, {"pack_sequences": True}])
def test_a_rate_is_of_the_samples_of_its_steps(llava, tmp_path, monkeypatch, packing):
    ticks = iter(range(1000))
    monkeypatch.setattr(stepping, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    grown = contextlib.nullcontext(SimpleNamespace(grown=1000))
    monkeypatch.setattr("llava.train.peak_memory.PeakMemory", lambda device: grown)
    argv = subject(llava, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=3, **packing).argv
    unit = stepping.Stepping(argv, str(tmp_path / "out"), "cpu")
    unit.load()
    for _ in range(2):
        unit.measure()
    assert unit.trainer.args.gradient_accumulation_steps == 1
    assert unit.rates == [3, 3, 3, 3]  # two timed ones in each turn: a step is one tick of this clock
    held = [*unit.trainer.model.parameters(), *unit.trainer.model.buffers()]
    assert unit.peaks == [sum(tensor.nbytes for tensor in held) + 1000] * 2
    assert unit.trainer.optimizer is None and not unit.trainer.accelerator._optimizers
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_batch_that_does_not_fit_is_halved(llava, tmp_path, monkeypatch):
    steps, tried = stepping.Stepping._steps, []

    def short_of_memory(unit):
        tried.append(unit.rows)
        if unit.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps(unit)

    monkeypatch.setattr(stepping.Stepping, "_steps", short_of_memory)
    one = subject(llava, tmp_path / "out", per_device_train_batch_size=8)
    found, notes = measure({"large": one}, rounds=1)
    assert tried[:3] == [8, 4, 2] and found["large"]["train_samples_per_s"] is not None
    assert notes[1] == "large: a batch of 8 does not fit, its steps are of 2"

    monkeypatch.setattr(stepping.Stepping, "_steps", lambda unit: short_of_memory(SimpleNamespace(rows=3)))
    found, notes = measure({"large": one}, rounds=1)
    assert found["large"]["train_samples_per_s"] is None and "one sample does not fit" in notes[1]


def test_quartiles():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 20):
        values = rng.random(count).tolist()
        found = spread(values)
        expected = np.percentile(values, [50, 25, 75])
        assert list(found) == ["median", "p25", "p75"] and np.allclose(list(found.values()), expected, rtol=1e-5)
    assert spread([2.0]) == {"median": 2.0, "p25": 2.0, "p75": 2.0}
    assert spread([]) is None and spread([1.0, None]) is None


def test_the_program(stubs, tmp_path, capsys):
    file, out = tmp_path / "subjects.json", tmp_path / "made/cost.json"
    file.write_text(json.dumps({"subjects": {"a": {"model": "a", "argv": ["--run_name", "a"]}}, "rounds": 2}))
    cost.main([str(file), str(out)])
    written = json.loads(out.read_text())
    assert written["schema"] == 1 and written["costs"]["a"]["tower_gflops"] == 1.0 and len(stubs.turns) == 4
    assert tuple(written["costs"]["a"]) == FIGURES and written["host"] and written["notes"][0].startswith("cost: 2 ")
    assert [path.name for path in out.parent.iterdir()] == ["cost.json"]

    for content in ("{", "[]", '{"subjects": {"a": {"model": "x"}}}', '{"subjects": {"a": {"model": 1, "argvs": 2}}}'):
        file.write_text(content)
        with pytest.raises(LlavaError, match=r"subjects\.json"):
            read_subjects(str(file))
    with pytest.raises(LlavaError, match="cannot be read"):
        read_subjects(str(tmp_path / "none.json"))
    with pytest.raises(LlavaError, match="at least one"):
        measure({}, rounds=1)
