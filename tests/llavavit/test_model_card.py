"""llavavit/README.md: its snippets run, its tables are true, and a folder made by hand of its list stands alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil
from transformers.dynamic_module_utils import get_relative_import_files

import llavavit
from llava.tools.upload_llava_vit import AUTO_MAPS
from llavavit.configuration_llava_vit import IMAGE_MEAN, IMAGE_STD
from tests.support.pages import ROOT, blocks, run_snippets
from tests.support.vit.golden import GOLDEN

PACKAGE = Path(llavavit.__file__).parent
CARD = (PACKAGE / "README.md").read_text()
CODE = sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
LISTED = re.findall(r"^\| `([\w.]+\.\w+)` \| (.*) \|$", CARD, re.MULTILINE)
*MAPS, PREPROCESSOR = [json.loads(block) for block in blocks(CARD, "json")]
TYPES = ["llava_vit", "onevision_encoder", "llava_vit_packing"]
CLASSES = [llavavit.LlavaViTModel, llavavit.OneVisionEncoderModel, llavavit.LlavaViTPackingModel]


def test_snippets():
    run_snippets(CARD, {})


def test_tables():
    sizes = dict(re.findall(r"^\| `(hf_\w+)` \| (.*) \|$", CARD, re.MULTILINE))
    assert sizes.keys() == llavavit.SIZES.keys()
    for name, row in sizes.items():
        patch, hidden, heads, layers, mlp = map(int, row.split(" | "))
        config = llavavit.named_config(name)
        assert (patch, hidden, heads) == (config.patch_size, config.hidden_size, config.num_attention_heads)
        assert (layers, mlp) == (config.num_hidden_layers, config.intermediate_size)
    second = llavavit.SIZES["hf_llava_vit_huge_ln"][1]
    said = map(int, re.search(r"patch (\d+), D (\d+), (\d+) heads, (\d+) layers, MLP (\d+)", CARD).groups())
    assert list(second.values()) == list(said)
    for name, values in (("mean", IMAGE_MEAN), ("standard deviation", IMAGE_STD)):
        assert f"| {name} | {' | '.join(map(str, values))} |" in CARD
    assert "Apache-2.0" in CARD and "license: apache-2.0" in CARD
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    models = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", CARD, re.MULTILINE)
    assert {(name, getattr(llavavit, name).config_class.model_type) for name, _ in models} == set(models)


def test_the_list_is_exact():
    """Every file of the package that a model's code imports, and none besides."""
    code = [name for name, _ in LISTED if name.endswith(".py")]
    assert sorted(code) == CODE and len(LISTED) == len(CODE) + 3
    needed = {}
    for model_type, auto_map in zip(TYPES, MAPS, strict=True):
        modules = {path.partition(".")[0] for path in auto_map["auto_map"].values()}
        found = {f"{module}.py" for module in modules}
        for module in modules:
            found |= {os.path.basename(path) for path in get_relative_import_files(PACKAGE / f"{module}.py")}
        needed[model_type] = found
    assert sorted(needed["llava_vit_packing"]) == CODE
    for model_type in TYPES[:2]:
        assert needed[model_type] == set(CODE) - {"modeling_llava_vit_packing.py"}
    assert MAPS[0]["auto_map"] == AUTO_MAPS["padded"] and MAPS[2]["auto_map"] == AUTO_MAPS["packed"]


def by_hand(folder: Path, model, auto_map: dict) -> Path:
    """A folder of the files that the card lists, each from where the card says."""
    model.save_pretrained(folder)
    for name, source in LISTED:
        if source == "below":
            (folder / name).write_text(json.dumps(PREPROCESSOR))
        elif source.startswith("this package"):
            shutil.copyfile(PACKAGE / name, folder / name)
        else:
            assert source.startswith("`model.save_pretrained(FOLDER)`") and (folder / name).is_file()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | auto_map))
    assert sorted(path.name for path in folder.iterdir()) == sorted(name for name, _ in LISTED)
    return folder


ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llava", "llavavit", "tests"):
            raise ModuleNotFoundError(f"{name}: this program runs without it")
sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel
for kind in sys.argv[1:]:
    model = AutoModel.from_pretrained(kind, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        out = model(**load_file(f"{kind}.inputs"))
    save_file({"last": out.last_hidden_state, "pooled": out.pooler_output}, f"{kind}.outputs")
    processor = AutoImageProcessor.from_pretrained(kind)
    print(type(processor).__name__, processor.size["shortest_edge"], processor.image_mean[0])
"""
# folder of published values -> (prefix in its io.safetensors, inputs of the model by their names there)
INPUTS = {
    "llava_vit": (
        "video_sparse",
        {"pixel_values": "video.pixel_values", "visible_indices": "video_sparse.visible_indices"},
    ),
    "onevision_encoder": ("video", {"pixel_values": "video.pixel_values", "patch_positions": "video.patch_positions"}),
    "llava_vit_packing": ("packed", {"hidden_states": "packed.hidden_states_in", "grid_thw": "packed.grid_thw"}),
}


def test_a_folder_made_by_hand_stands_alone(tmp_path):
    """Loaded by its own code in a Python that has none of this project; the outputs are the published ones."""
    published = {}
    for model_type, model_class, auto_map in zip(TYPES, CLASSES, MAPS, strict=True):
        golden = GOLDEN / f"{model_type}_tiny"
        by_hand(tmp_path / model_type, model_class.from_pretrained(golden), auto_map)
        prefix, names = INPUTS[model_type]
        values = load_file(golden / "io.safetensors")
        save_file({name: values[key] for name, key in names.items()}, tmp_path / f"{model_type}.inputs")
        published[model_type] = values[f"{prefix}.last_hidden_state"], values[f"{prefix}.pooler_output"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, *TYPES], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3 and all(line[0].startswith("CLIPImageProcessor") for line in lines)
    assert all(line[1:] == ["448", str(IMAGE_MEAN[0])] for line in lines)
    for model_type, (last, pooled) in published.items():
        found = load_file(tmp_path / f"{model_type}.outputs")
        torch.testing.assert_close(found["last"], last, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["pooled"], pooled, atol=1e-5, rtol=0)


def test_the_pixels(tmp_path):
    """preprocessor_config.json on the card is the image processor of an encoder without one of its own."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = CLIPImageProcessorPil(
        size={"shortest_edge": 448},
        crop_size={"height": 448, "width": 448},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    image = Image.effect_noise((600, 500), 60).convert("RGB")
    assert torch.equal(
        processor(image, return_tensors="pt").pixel_values, expected(image, return_tensors="pt").pixel_values
    )
    assert PREPROCESSOR["rescale_factor"] == expected.rescale_factor  # the factor is 1/255 to the last bit


def test_the_card_is_installed():
    import tomllib

    packaging = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "README.md" in packaging["package-data"]["llavavit"]
