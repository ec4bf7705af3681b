"""A pytest plugin: torchvision without its compiled operators, as its wheel for CUDA is beside a CPU build of torch.

torchvision cannot be imported then, since it describes two of its operators to torch; with names for them here it can.
timm takes transforms and a frozen batch norm from it, both plain Python.
"""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
