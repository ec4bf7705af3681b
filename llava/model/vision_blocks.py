"""The blocks of a vision encoder: what a run that trains a part of it, or each block at a rate of its own, counts in.

A level says where in the encoder a parameter lies: -1 before the first block (patch embedding, positions, class token,
their norm), i in block i or between it and the next, `len(blocks)` behind the last (a norm).
"""

import re
from collections.abc import Iterable

import torch.nn as nn

_LISTED = re.compile(r"\.\d+\.")
_BEFORE = ("embed", "patch", "position", "pos_", "token", "stem")


def find_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks that gradient checkpointing works on, first to last; of an encoder without such, the longest of its
    lists of modules of one class; none where there is no such list."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found, within = [], set()
    for module in encoder.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in within:
            found.append(module)
            within.update(module.modules())
    if found:
        return found
    lists = [list(m) for m in encoder.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    alike = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    return max(alike, key=len, default=[])


def stage_blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks of one stage of a hierarchical encoder: the first of its own lists of modules of one class."""
    lists = [list(part) for part in stage.children() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    return next((blocks for blocks in lists if len({type(block) for block in blocks}) == 1), [])


def used_blocks(encoder: nn.Module, unused: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of an encoder's blocks that are not wholly `unused`, first to last."""
    without = {id(parameter) for module in unused for parameter in _parameters(module)}
    return [b for b in find_blocks(encoder) if any(id(parameter) not in without for parameter in b.parameters())]


def block_levels(encoder: nn.Module, blocks: list[nn.Module]) -> dict[int, int]:
    """id of a parameter of the encoder -> its level.

    Outside the blocks by the order in which the encoder defines its modules, which need not be that of its forward:
    what is named as an embedding is before the first block wherever it is defined, unless it is one of a list, as the
    patch embedding of a later stage is.
    """
    levels, level = {}, -1
    of_block = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    left = len(of_block)
    for name, parameter in encoder.named_parameters():
        if id(parameter) in of_block:
            level, left = of_block[id(parameter)], left - 1
            levels[id(parameter)] = level
        elif any(word in _LISTED.split(name)[0] for word in _BEFORE):
            levels[id(parameter)] = -1
        else:
            levels[id(parameter)] = level if left else len(blocks)
    return levels


def block_rate(rate: float, decay: float, depth: int, level: int) -> float:
    """The learning rate of a level: `rate` is the encoder's, `decay` what each of its `depth` blocks takes off it.

    As in ELECTRA (arXiv 2003.10555) and BEiT (arXiv 2106.08254): block i, counted from 0, has rate x decay^(depth - i),
    what is before block 0 one power more, and what is behind the last block the rate itself.
    """
    return rate * decay ** (depth - level)


def _parameters(part) -> Iterable:
    return part.parameters() if isinstance(part, nn.Module) else (part,)
