"""Learning rates of the parts of a model, and of the blocks of its vision tower."""

from llava.model.vision_blocks import block_levels, block_rate


def tower_rate(args) -> float:
    """What the layer-wise decay of the vision tower starts from."""
    return args.learning_rate if args.mm_vision_tower_lr is None else args.mm_vision_tower_lr


def split_by_rate(family, groups: list[dict], model, args) -> list[dict]:
    """As `Family.parameter_groups`."""
    rates = {
        "mm_vision_tower": args.mm_vision_tower_lr,
        "mm_token_compressor": args.mm_token_compressor_lr,
        "mm_mlp_adapter": args.mm_projector_lr,
    }
    decay, blocks, levels = args.mm_vision_tower_layer_decay, [], {}
    if decay != 1:
        encoder, blocks = family.vision_blocks(model)
        levels = block_levels(encoder, blocks)
    if not levels and all(rate is None for rate in rates.values()):
        return groups
    part = {id(parameter): family.part_of(name) for name, parameter in model.named_parameters()}
    split = []
    for group in groups:
        by_rate: dict[float, list] = {}
        for parameter in group["params"]:
            rate = rates.get(part[id(parameter)])
            rate = group["lr"] if rate is None else rate
            if part[id(parameter)] == "mm_vision_tower" and id(parameter) in levels:
                rate = block_rate(rate, decay, len(blocks), levels[id(parameter)])
            by_rate.setdefault(rate, []).append(parameter)
        split += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    return split


def decay_preview(family, model, args) -> str | None:
    """The rates that a run with layer-wise decay gives to the levels of its vision tower that learn, in a line; None
    without decay. What has one rate (a block, what is before or behind them all) is told once."""
    decay = args.mm_vision_tower_layer_decay
    if decay == 1:
        return None
    encoder, blocks = family.vision_blocks(model)
    levels, depth = block_levels(encoder, blocks), len(blocks)
    learning = sorted({levels[id(p)] for p in encoder.parameters() if p.requires_grad})
    names = {-1: "before the blocks", depth: "behind them"}
    told = [f"{names.get(level, level)} {block_rate(tower_rate(args), decay, depth, level):.2e}" for level in learning]
    return f"vision tower, learning rates of {depth} blocks (layer decay {decay:g}): {', '.join(told)}"
