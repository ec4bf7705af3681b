"""A pytest plugin: torchvision without its compiled operators, as its wheel for CUDA is beside a CPU build of torch.

torchvision cannot be imported then, since it describes its operator `nms` to torch; with a name for it here it can. timm
takes transforms and a frozen batch norm from it, both plain Python.
"""

import torch

torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
