"""Half precision on the CPU: every tower and family, plain and under DeepSpeed, with LoRA and without, takes its steps,
saves, loads and goes on as it does on a GPU, in the dtypes that `Precision` says."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava.families.precision import Precision
from llava.model.multimodal_encoder.builder import TOWERS
from tests import tiny
from tests.model.qwen2_vl.parts import picture
from tests.support.forks import Forks
from tests.support.runs import WITH_FLOAT16

ROOT = Path(__file__).parents[2]
BOUND = 2.5e-2  # of losses of 6 to 8, where the next bfloat16 is 0.03 away
S2 = {"s2_scales": f"{tiny.SIDE},{2 * tiny.SIDE}", "image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}
ADAPTIVE = {"image_aspect_ratio": "native", "adaptive_patches": '{"method": "budget", "alpha": 0.5}'}
ADAPTIVE |= {"mm_projector_type": "spatial_merge", "min_pixels": 56 * 56}
COMPRESSED = {"use_token_compression": True, "compression_input_size": 2, "compression_output_size": 1}
# name -> kind of its tower, keys
ENCODERS = {kind: (kind, S2 if kind == "clip_s2" else {}) for kind in TOWERS}
ENCODERS |= {"adaptive": ("hevc_vit_packing", ADAPTIVE), "toconv": ("clip", COMPRESSED)}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PARTS = {
    "whole": {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"},
    "projector": {"mm_tunable_parts": "mm_mlp_adapter"},
    "lora": {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model", "lora_enable": True, "lora_r": 4},
}
WAYS = {"plain": None, "zero2": "scripts/zero2.json", "zero3": "scripts/zero3.json"}
OFFLOAD = ("clip", "whole", "offload")
ALL = [(model, "whole", way) for model in (*ENCODERS, *FAMILIES) for way in ("plain", "zero3")]
ALL += [(model, parts, way) for model in ("clip", *FAMILIES) for parts in ("projector", "lora") for way in WAYS]
ALL += [("clip", "whole", "zero2"), ("qwen2_vl", "whole", "zero2"), OFFLOAD]
# the suite's are these; all of them are tried by scripts/test_long.sh
CASES = [(model, "whole", "plain") for model in ENCODERS] + [(model, "whole", "zero3") for model in FAMILIES]
CASES += [("clip", "whole", way) for way in ("zero2", "zero3")] + [("adaptive", "whole", "zero3"), OFFLOAD]
CASES += [("clip", "lora", way) for way in ("plain", "zero3")] + [("clip", "projector", "plain")]
CASES += [("qwen2_vl", "projector", "plain"), ("qwen2_vl", "lora", "zero3")]
RESUMED = [("clip", "whole", "zero3"), ("clip", "projector", "plain"), ("clip", "lora", "zero3")]
RESUMED += [("qwen2_vl", "projector", "plain"), ("qwen2_vl", "lora", "zero3")]
TWO_RANKS = [("clip", "whole", "plain"), ("qwen2_vl", "lora", "zero3")]
FLOAT16 = [("clip", "lora", "zero3")]
if os.environ.get("LLAVA_LONG_TESTS"):
    CASES, RESUMED = ALL, [case for case in ALL if case != OFFLOAD]
    TWO_RANKS = [("clip", parts, way) for parts in PARTS for way in WAYS] + [("qwen2_vl", "lora", "zero3")]
    FLOAT16 = [("clip", parts, way) for parts in PARTS for way in ("zero2", "zero3")]

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="DeepSpeed compiles an extension at first use: no C++ compiler"
)


def name_of(case) -> str:
    return "-".join(case)


@dataclass
class Kit:
    """Tiny models and records; `batch` runs several cases in one process, or in two."""

    folder: Path
    forks: Forks
    parts: dict[str, str] = field(default_factory=dict)

    def keys(self, case) -> dict:
        model, parts, way = case
        keys = {
            "deepspeed": self.offload if case == OFFLOAD else WAYS[way] and ROOT / WAYS[way],
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        keys |= {"data_path": self.records, "image_folder": Path(self.records).parent / "images"}
        if model in FAMILIES:
            own = ("version", "vision_tower", "mm_vision_select_layer", "mm_projector_type", "mm_patch_merge_type")
            own += ("image_aspect_ratio", "image_grid_pinpoints", "mm_use_im_patch_token")
            return keys | dict.fromkeys(own) | {"model_name_or_path": self.part(model)} | PARTS[parts]
        kind, of_encoder = ENCODERS[model]
        keys |= {"vision_tower": self.part(kind), "mm_vision_tower_type": kind, "model_name_or_path": self.part("llm")}
        return keys | of_encoder | PARTS[parts]

    @property
    def offload(self) -> Path:
        """With PyTorch's optimizer: DeepSpeed's own takes minutes to compile, which a long test does."""
        values = json.loads((ROOT / "scripts/zero3_offload.json").read_text())
        path = self.folder / "zero3_offload.json"
        path.write_text(json.dumps(values | {"zero_force_ds_cpu_optimizer": False}))
        return path

    @property
    def records(self) -> str:
        if "records" not in self.parts:
            self.parts["records"] = tiny.records(self.folder / "records", "iitiitti")
        return self.parts["records"]

    def part(self, kind: str) -> str:
        if kind not in self.parts:
            make = {"llm": tiny.llm, **dict.fromkeys(FAMILIES, tiny.qwen2_vl)}.get(kind, tiny.tower)
            self.parts[kind] = make(self.folder / kind, *([] if kind == "llm" else [kind]))
        return self.parts[kind]

    def batch(self, name: str, cases: list, ranks: int = 1, change=None, resume_from=None, **changes) -> Path:
        """The folder that holds a folder for each case."""
        out = self.folder / name
        flags = []
        for case in cases:
            if resume_from is not None:
                first = Path("checkpoint-1")
                shutil.copytree(resume_from / name_of(case) / first, out / name_of(case) / first)
            keys = self.keys(case) | {"use_cpu": True, "output_dir": out / name_of(case)} | changes
            flags.append(tiny.train_flags(self.folder, **keys))
        status, said = self.forks.runs(ranks, flags, self.folder, name, change=change)
        assert status == 0, said[-9000:]
        return out


@pytest.fixture(scope="module")
def kit(forks, tmp_path_factory):
    return Kit(tmp_path_factory.mktemp("precision"), forks)


@pytest.fixture(scope="module")
def float32(kit):
    plain = {(model, parts, "plain") for model, parts, _ in CASES}
    return kit.batch("float32", sorted(plain), save_strategy="no")


@pytest.fixture(scope="module")
def bfloat16(kit):
    return kit.batch("bfloat16", CASES, bf16=True)


@pytest.fixture(scope="module")
def resumed(kit, bfloat16):
    return kit.batch("resumed", RESUMED, bf16=True, resume_from=bfloat16)


@pytest.fixture(scope="module")
def two_ranks(kit):
    return kit.batch("two_ranks", TWO_RANKS, 2, bf16=True, per_device_train_batch_size=2)


@pytest.fixture(scope="module")
def float16(kit):
    return kit.batch("float16", FLOAT16, change=WITH_FLOAT16, fp16=True)


def losses(folder: Path, case) -> list[float]:
    return [step["loss"] for step in tiny.history(folder / name_of(case))]


def near(folder, float32, case) -> bool:
    """Both losses are float32's within the bound; but DeepSpeed rounds the weights themselves after each step, which
    may change what it brings by a quarter."""
    found, expected = losses(folder, case), losses(float32, (*case[:2], "plain"))
    rounding = 0 if case[2] == "plain" else (expected[0] - expected[1]) / 4
    return abs(found[0] - expected[0]) <= BOUND and abs(found[1] - expected[1]) <= BOUND + rounding


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_bfloat16(bfloat16, float32, case):
    _, parts, way = case
    assert near(bfloat16, float32, case)
    weights = saved(bfloat16 / name_of(case))
    dtypes = {value.dtype for value in weights.values()}
    trained = torch.float32 if way == "plain" else torch.bfloat16
    assert dtypes == {trained} or (way == "plain" and dtypes == {trained, torch.bfloat16})
    of_projector = {value.dtype for name, value in weights.items() if "mm_projector" in name or "merger" in name}
    assert of_projector == {trained}, parts
    # rounded to bfloat16, as DeepSpeed 0.19.0 does, they would be wrong by whole turns at far positions
    buffers = json.loads((bfloat16 / name_of(case) / "buffers.json").read_text())
    angles = {dtype for name, dtype in buffers.items() if "inv_freq" in name}
    assert angles == {"torch.float32"}


@needs_compiler
@pytest.mark.parametrize("case", RESUMED, ids=name_of)
def test_resumed_in_bfloat16(bfloat16, resumed, case):
    # which bfloat16 kernels a process takes depends on what ran in it before
    assert losses(resumed, case)[-1] == pytest.approx(losses(bfloat16, case)[-1], abs=2e-4)
    whole, again = saved(bfloat16 / name_of(case)), saved(resumed / name_of(case))
    assert whole.keys() == again.keys()
    moved = torch.cat([(value.float() - again[name].float()).abs().flatten() for name, value in whole.items()])
    assert moved.mean() <= 1e-5  # an optimizer that starts anew moves every weight by 1e-3


@needs_compiler
@pytest.mark.parametrize("case", TWO_RANKS, ids=name_of)
def test_bfloat16_on_two_ranks(two_ranks, float32, case):
    assert near(two_ranks, float32, case)


@needs_compiler
@pytest.mark.parametrize("case", FLOAT16, ids=name_of)
def test_float16(float16, float32, case):
    assert near(float16, float32, case)
    assert {value.dtype for value in saved(float16 / name_of(case)).values()} == {torch.float16}


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "projector" or case[0] in FAMILIES], ids=name_of)
@needs_compiler
def test_loaded_for_inference(kit, bfloat16, case):
    """A saved folder answers a question in bfloat16, and in float32 with logits close to those."""
    from llava.families import family_of

    folder = str(bfloat16 / name_of(case))
    family = family_of(folder)
    shown = picture(60, 40)
    logits = []
    for dtype in ("float32", "bfloat16"):
        loaded = family.load(folder, dtype=dtype, device="cpu")
        inputs = family.inputs([family.prompt([("human", "<image>\nWhat is shown?")], loaded)], [[shown]], loaded)
        with torch.no_grad():
            answer = loaded.model.generate(
                **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        logits.append(answer.logits[0].float())
    assert logits[0].isfinite().all() and (logits[0] - logits[1]).norm() <= 0.05 * logits[0].norm()


@pytest.mark.parametrize("half", ["bf16", "fp16", None])
@pytest.mark.parametrize("deepspeed", [None, "zero3.json"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_rule(half, deepspeed, parts):
    args = SimpleNamespace(bf16=half == "bf16", fp16=half == "fp16", deepspeed=deepspeed, lora_enable=parts == "lora")
    precision = Precision.of(args)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[half]
    assert precision == Precision(trained=low if deepspeed else torch.float32, frozen=low)
    read_in = precision.to_load(args, set(PARTS[parts]["mm_tunable_parts"].split(",")))
    assert read_in == (precision.trained if parts == "whole" else low)

    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2).double() for name in ("trained", "frozen")})
    model["frozen"].requires_grad_(False)
    model["frozen"].register_buffer("angles", torch.ones(2))
    model["frozen"].codes = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    precision.apply(model)
    assert {value.dtype for value in model["trained"].parameters()} == {precision.trained}
    assert {value.dtype for value in model["frozen"].parameters()} == {low, torch.uint8}
    assert model["frozen"].angles.dtype == torch.float32
