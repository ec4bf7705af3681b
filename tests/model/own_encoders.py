"""Encoders as users write them: plain modules in mine.py and vision towers in towers.py, sound ones and others."""

import json
import sys

import pytest
import torch

from llava.model.multimodal_encoder.builder import build_vision_tower
from tests.model import small

IMAGE = {"size": 42, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
SIDE, CHANNELS = 42, 32
FILE = """
import torch
import torch.nn as nn

torch.ran = getattr(torch, "ran", 0) + 1


class Plain(nn.Module):
    def __init__(self, width=32, wrong=None):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Conv2d(3, width, 14, 14)
        self.register_buffer("position", torch.arange(9 * width).view(1, 9, width) / width, persistent=False)
        self.scale = torch.linspace(0.5, 1, width)  # no buffer
        self.gamma = nn.Parameter(torch.ones(width))
        self.block = nn.TransformerEncoderLayer(width, 2, 48, batch_first=True)
        self.behind = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.lone = nn.Parameter(torch.ones(3))

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return change(self.block(x) * self.gamma * self.scale.to(x), self.wrong)


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 14, 14)

    def forward(self, images):
        return self.embed(images)


class NoForward(nn.Module):
    pass


class NoWeights(nn.Module):
    def forward(self, images):
        return images


class NoModule:
    pass


def change(x, wrong):
    if wrong == "class token":
        return torch.cat([x, x[:, :1]], dim=1)
    if wrong == "two dimensions":
        return x[:, 0]
    if wrong == "tuple":
        return (x,)
    if wrong == "dtype":
        return x.double()
    if wrong == "nan":
        return x * float("nan")
    if wrong == "device":
        return x.to("meta")
    if wrong == "raises":
        raise KeyError("lost")
    return x
"""
TOWER = """
import json, os
from types import SimpleNamespace
import torch
import torch.nn as nn
from transformers import CLIPImageProcessorPil
from llava.model.multimodal_encoder.base import VisionTower, select_layers


class Half(VisionTower):
    def read_config(self, args):
        pass


class Forgetful(VisionTower):
    \"\"\"Reads its folder, whatever the checkpoint says.\"\"\"

    def read_config(self, args):
        with open(os.path.join(self.vision_tower_name, "config.json")) as file:
            self.keep(json.load(file), None)

    def keep(self, values, processor):
        self.config = values
        square = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
        self.image_processor = CLIPImageProcessorPil.from_dict(processor or square)

    def build_empty(self):
        width = self.config.hidden_size
        blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(self.config.num_hidden_layers))
        extra = nn.ParameterList([torch.randn(1 + self.tower_args.get("registers", 2), width)])
        self.vision_tower = nn.ModuleDict({"embed": nn.Conv2d(3, width, 14, 14), "blocks": blocks, "extra": extra})

    def load_model(self, device_map=None):
        if not self.is_loaded:
            self.build_empty()
            self.vision_tower.requires_grad_(False)
            self.is_loaded = True

    def encode(self, images):
        parts = self.vision_tower
        x = parts["embed"](images).flatten(2).transpose(1, 2)
        extra = parts["extra"][0]
        states = [torch.cat([extra.expand(len(x), -1, -1), x], dim=1)]
        for block in parts["blocks"]:
            states.append(states[-1] + block(states[-1]).tanh() + states[-1].mean(1, keepdim=True))
        (layer,) = select_layers(self.select_feature, self.select_layer, len(states))
        return states[layer][:, len(extra) :]


class Restoring(Forgetful):
    def read_config(self, args):
        stored = getattr(args, "mm_vision_config", None)
        if stored is None:
            super().read_config(args)
        self.keep(stored or self.config, getattr(args, "mm_image_processor_config", None))
        kind = self.tower_args.get("config")
        if kind == "namespace":
            self.config = SimpleNamespace(**self.config)
"""


@pytest.fixture(name="here", autouse=True)
def working_folder(tmp_path, monkeypatch):
    """A working directory with the classes in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.py").write_text(FILE)
    (folder / "towers.py").write_text(TOWER)
    (folder / "encoder").mkdir()
    values = {"image_size": 42, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 3}
    (folder / "encoder" / "config.json").write_text(json.dumps(values))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(torch, "ran", 0, raising=False)
    for name in ("mine", "towers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def build(name="mine.py:Plain", delay_load=False, **values):
    return build_vision_tower({"mm_vision_tower": name, "vision_tower_image": IMAGE, **values}, delay_load=delay_load)


def plain_tower(name="towers.py:Restoring", **values):
    return build_vision_tower({"mm_vision_tower": "encoder", "mm_vision_tower_type": name, **values})


def saved(folder, name, **changes):
    model = small.model(name, image_aspect_ratio="pad", **changes)
    model.get_model().describe_vision()
    with torch.no_grad():  # other weights than the constructor's, as after training
        for parameter in model.get_vision_tower().parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder)
    return model
