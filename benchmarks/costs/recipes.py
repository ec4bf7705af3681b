"""From a train config to what the cost model asks: config of the model, batches, plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from costs.facts import (
    DATA,
    ELSE_TOKENS,
    GLOBAL_BATCH,
    GLOBAL_BATCH_ELSE,
    LARGEST,
    LONGEST_TEXT,
    MEASURED,
    MODELS,
    PICTURE,
    TOWERS,
    Data,
)
from costs.model import Batch, Plan, memory, step
from llava.errors import LlavaError

_VISION = (
    *("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type", "s2"),
    *("image_size", "vision_tower_stage"),
    *("s2_scales", "image_aspect_ratio", "image_grid_pinpoints", "use_token_compression", "compression_input_size"),
    *("compression_output_size", "min_pixels", "max_pixels", "mm_vision_tower_type"),
)


class Recipe(NamedTuple):
    """data: a `facts.Data`; usual, largest: batches of the picture that is taken for the mean, and of the largest."""

    name: str
    config: object
    plan: Plan
    usual: Batch
    largest: Batch
    data: object
    epochs: float
    global_batch: int


def read_recipe(path: str, gpu, devices: int) -> Recipe:
    """A train config as a run on `devices` of a kind, of the global batch that it was published with.

    Raises:
        LlavaError: it cannot be resolved, or its model, encoder or data are not known here.
    """
    name = Path(path).stem
    return _recipe([path], name, gpu, devices, GLOBAL_BATCH.get(name, GLOBAL_BATCH_ELSE))


def read_run(argv: list[str], name: str, gpu, devices: int) -> Recipe:
    """A training run's command line, CONFIG.yaml --key value ..., as a run on `devices` of a kind.

    Where the command line says how many samples a step has, that is the global batch, else the published one.

    Raises:
        LlavaError: as `read_recipe`.
    """
    from llava.config.resolve import resolve

    run = resolve(argv)
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if run.config is None or any(run.source(key) not in (run.config, "default") for key in keys):
        batch = run[keys[0]] * run[keys[1]] * devices
    else:
        batch = GLOBAL_BATCH.get(Path(run.config).stem, GLOBAL_BATCH_ELSE)
    return _recipe(argv, name, gpu, devices, batch)


def _recipe(argv: list[str], name: str, gpu, devices: int, batch: int) -> Recipe:
    from llava.config.resolve import resolve
    from llava.families.settings import trained_parts

    run = resolve(argv)
    data = _data(run, name)
    config, sizes = _model(run, name)
    zero, offload = _zero(run["deepspeed"])
    rows = run["per_device_train_batch_size"]
    plan = Plan(
        gpu=gpu,
        devices=devices,
        parts=frozenset(trained_parts(run)),
        zero=zero,
        offload=offload,
        checkpointing=run["gradient_checkpointing"],
        lora_rank=run["lora_r"] if run["lora_enable"] else 0,
        accumulation=max(1, round(batch / (rows * devices))),
    )
    limit, (usual, largest) = run["model_max_length"], (sizes(size) for size in (PICTURE, LARGEST))
    most = max(data.text, LONGEST_TEXT)
    batches = [
        _batch(rows, usual, data.text, data.labels, limit),
        _batch(rows, largest, most, most * data.labels // data.text, limit),
    ]
    epochs = run["num_train_epochs"]
    if run["max_steps"] > 0:
        epochs = run["max_steps"] * rows * devices * plan.accumulation / data.samples
    return Recipe(name, config, plan, *batches, data, epochs, batch)


def _data(run, name: str):
    """What is known of a run's data, or can be counted."""
    path = Path(run["data_path"] or "")
    data = DATA.get(path.name)
    if data is None and path.is_file():
        from llava.data.records import load_records

        count = len(load_records(str(path), run["seed"]))
        return Data(count, *ELSE_TOKENS, f"records of {path}; token counts assumed")
    if data is None:
        raise LlavaError(
            f"{name}: size of {run['data_path']} is not known, expected a file or one of {', '.join(DATA)}"
        )
    return data


def _batch(rows: int, picture: tuple[int, list], text: int, labels: int, limit: int) -> Batch:
    visual, patches = picture
    return Batch([min(visual + text, limit)] * rows, patches * rows, supervised=labels * rows)


def _zero(deepspeed) -> tuple[int | None, bool]:
    if not deepspeed:
        return None, False
    settings = json.loads(Path(deepspeed).read_text())["zero_optimization"]
    return settings["stage"], "offload_optimizer" in settings


def _model(run, where: str):
    """The model's config, and a function (width, height) -> (visual tokens, vision sequences) of one picture."""
    name = run["model_name_or_path"]
    file = Path(name) / "config.json"
    if name not in MODELS and not file.is_file():
        raise LlavaError(f"{where}: size of {name} is not known, expected a folder or one of {', '.join(MODELS)}")
    values = dict(MODELS[name].values) if name in MODELS else json.loads(file.read_text())
    if "vision_config" in values:
        return own_vision(values, run["min_pixels"], run["max_pixels"])
    if run["vision_tower"] is None:
        raise LlavaError(f"{where}: found no vision_tower, expected a vision-language model")
    return llava_model(values, run["vision_tower"], **{key: run[key] for key in _VISION})


def own_vision(values: dict, least: int, most: int):
    """Of Qwen-VL: pictures keep their aspect, sides are multiples of two patches; all patches are kept."""
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    config = AutoConfig.for_model(**values)
    patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size

    def sizes(size):
        height, width = smart_resize(size[1], size[0], patch * merge, least, most)
        grid = 1, height // patch, width // patch
        return grid[1] * grid[2] // merge**2 + 2, [grid]

    return config, sizes


def llava_model(values: dict, tower: str, **vision):
    """Of LLaVA: the project's own count of what a picture becomes."""
    from llava.families.llava_layout import vision_layout
    from llava.images.processing import pixel_shape
    from llava.model.families import model_classes, resolve_architecture
    from llava.model.multimodal_encoder.published import PUBLISHED

    _, config_class = model_classes(resolve_architecture(values))
    given = {key: value for key, value in values.items() if key != "model_type"}
    config = config_class(**given, mm_vision_tower=tower, **vision)
    encoder, processor = TOWERS.get(tower) or PUBLISHED.get(tower) or (None,) * 2
    if processor and "crop_size" in processor and (side := vision.get("image_size")):  # as a run has it made
        processor = processor | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    config.mm_vision_config, config.mm_image_processor_config = encoder, processor
    layout = vision_layout(config)

    def sizes(size):
        shape = pixel_shape(size, layout.tower.image_processor, layout.pixels, 1)
        crops = shape[0] if len(shape) == 4 else 1
        grids = layout.tower.grids(*shape[-2:])
        return layout.counter(shape, size, "image"), [rows * columns for rows, columns in grids] * crops

    return config, sizes


def measured_config():
    """Of the step that was measured."""
    vision = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
    return llava_model(dict(MODELS[MEASURED.model].values), "openai/clip-vit-large-patch14-336", **vision)[0]


def fit(recipe: Recipe, hours: float, usable: float) -> dict:
    """Whether a recipe fits in memory and in time, and which of them breaks."""
    held = memory(recipe.config, recipe.largest, recipe.plan)
    seconds = step(recipe.config, recipe.usual, recipe.plan)
    samples = recipe.data.samples * recipe.epochs
    needed = samples / seconds["samples_per_s"] / 3600
    limits = {"memory": held["total"] <= recipe.plan.gpu.memory * 1e9 * usable, "time": needed <= hours}
    breaks = [name for name, holds in limits.items() if not holds]
    return {"memory": held, "step": seconds, "hours": needed, "samples": samples, "breaks": breaks}


def least_devices(recipe: Recipe, hours: float, usable: float, most: int = 1024) -> int | None:
    """The fewest devices (a power of two) on which it fits; None: not on `most` either."""
    devices, rows = 1, len(recipe.usual.tokens)
    while devices <= most:
        times = max(1, round(recipe.global_batch / (rows * devices)))
        if rows * devices > recipe.global_batch:  # more would be another run
            return None
        plan = replace(recipe.plan, devices=devices, accumulation=times)
        if not fit(recipe._replace(plan=plan), hours, usable)["breaks"]:
            return devices
        devices *= 2
    return None
