"""List vision towers: what each one takes, gives and costs, found without any weights.

    python -m llava.tools.towers                              # all of configs/towers
    python -m llava.tools.towers configs/towers/hevc_vit.yaml openai/clip-vit-large-patch14-336
    python -m llava.tools.towers --json my_encoder/ my_vit.py:MyTower

A name is a tower YAML, a file of configs/towers without its ending, a class of your own, or the folder or hub id of an
encoder, whose features are then those of layer -2. GFLOPs are 2 x the multiply-adds of one image at the tower's own
size, up to the features that are used.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

from llava.errors import LlavaError, OutOfReach, report_errors

FOLDER = Path(__file__).parents[2] / "configs" / "towers"
FIELDS = (
    *("name", "model_type", "class", "patch", "image_size", "tokens", "grid", "hidden_size", "params", "gflops"),
    *("any_size", "video", "adaptive", "compression", "s2", "export_class", "loads", "reason"),
)
_TABLE = ("name", "model_type", "patch", "image_size", "tokens", "grid", "hidden_size", "params", "gflops")
_DROPPED = ("model_type", "grid", "hidden_size", "patch")  # in a narrow terminal, the first one first


def read_tower(name: str) -> SimpleNamespace:
    """The settings of a tower that is named as on the command line: its keys, and the defaults of the others.

    Raises:
        LlavaError: a YAML that is not there, or says what no tower YAML may.
    """
    from llava.config.files import read_yaml
    from llava.config.resolve import locate_own_tower
    from llava.config.schema import convert, own_keys

    keys = own_keys()
    values = {key: keys[key].default for key in keys if keys[key].tower}
    path = FOLDER / f"{name}.yaml"
    file = Path(name) if name.endswith((".yaml", ".yml")) else path if path.is_file() else None
    usual = {"vision_tower": name, "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
    content = usual if file is None else read_yaml(file)
    for key, value in content.items():
        own = "vision_tower" if key == "mm_vision_tower" else key
        if own not in keys or not keys[own].tower:
            raise LlavaError(f"{file}: {key}: no key of a tower, expected some of {', '.join(values)}")
        values[own] = convert(keys[own], value, str(file))
    locate_own_tower(values, str(file or name), file and str(file))
    if not values["vision_tower"]:
        raise LlavaError(f"{file}: names no vision_tower, expected one")
    return SimpleNamespace(**values, mm_vision_tower=values["vision_tower"])


def describe(name: str) -> dict:
    """The row of one tower, with all `FIELDS`; what cannot be known is None, and `reason` says why."""
    row = dict.fromkeys(FIELDS) | {"name": Path(name).stem if name.endswith((".yaml", ".yml")) else name}
    try:
        cfg = read_tower(name)
        if cfg.vision_tower.startswith("timm:") and importlib.util.find_spec("timm") is None:
            raise OutOfReach(f"{cfg.vision_tower}: needs the package timm, which brings torchvision along")
        tower = _empty(cfg)
        row |= _facts(tower, cfg)
    except OutOfReach as error:
        return row | {"loads": "needs_extra", "reason": str(error)}
    except LlavaError as error:
        return row | {"loads": "refused", "reason": str(error)}
    try:
        from llava.model.multimodal_encoder.flops import image_flops

        row["gflops"] = image_flops(tower) / 1e9
    except LlavaError as error:
        row["reason"] = str(error)
    return row | {"loads": "here"}


def _empty(cfg):
    """The tower without weights, by its own config alone: a crop and a patch do not tell what it costs."""
    import torch

    from llava.families.llava_layout import KNOWN, empty_tower
    from llava.model.multimodal_encoder.builder import build_vision_tower

    if cfg.mm_vision_tower not in KNOWN:
        return empty_tower(cfg)
    with torch.device("meta"):
        return build_vision_tower(cfg, delay_load=True)


def _facts(tower, cfg) -> dict:
    side = tower.image_size
    tokens, grid = tower.token_grid(side, side)
    if tower.patch_chooser is not None:
        grid = None  # how many tokens there are depends on the picture; `tokens` has all of them
    compressor = tower.token_compressor
    return {
        "model_type": getattr(tower.config, "model_type", None),
        "class": type(tower).__name__,
        "patch": tower.patch_size,
        "image_size": side,
        "tokens": tokens,
        "grid": grid and list(grid),
        "hidden_size": tower.hidden_size,
        "params": sum(parameter.numel() for parameter in tower.parameters()),
        "any_size": tower.any_size,
        "video": tower.sees_time,
        "adaptive": tower.takes_adaptive_patches,
        "compression": compressor and [compressor.input_grid_size, compressor.output_grid_size],
        "s2": getattr(tower, "s2_scales", None),
        "export_class": export_class(tower, cfg),
    }


def export_class(tower, cfg) -> str | None:
    """The class of transformers that a LLaVA-NeXT with this tower (anyres, spatial_unpad) is exported to; None where
    there is none."""
    from llava.tools.hf.layouts import choose_format

    config = SimpleNamespace(**vars(cfg))
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    with contextlib.suppress(LlavaError):
        return choose_format(tower.vision_tower_name, config, tower).model_class
    return None


def table(rows: list[dict], columns: int = 120) -> str:
    """Rows for people: numbers to the right, one tower to a line, and below it why a tower is not here.

    columns: of the terminal; what has no room (the type, the grid, the width) is left out.
    """
    dropped = []
    while True:
        lines = _lines(rows, [field for field in _TABLE if field not in dropped])
        if max(map(len, lines)) <= columns or len(dropped) == len(_DROPPED):
            break
        dropped.append(_DROPPED[len(dropped)])
    texts = lines[:1]
    for row, line in zip(rows, lines[1:], strict=True):
        texts.append(line)
        if row["reason"]:
            texts += textwrap.wrap(row["reason"], max(columns, 40), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(texts)


def _lines(rows: list[dict], fields: list[str]) -> list[str]:
    """The table's lines with these columns, and what a tower takes in the last."""
    heads = {"params": "params (M)", "gflops": "GFLOPs", "image_size": "pixels", "hidden_size": "width"}
    lines = [[heads.get(field, field) for field in fields] + ["takes"]]
    for row in rows:
        cells = [_cell(field, row[field]) for field in fields]
        takes = [word for word in ("any_size", "video", "adaptive", "compression", "s2") if row[word]]
        lines.append([*cells, " ".join(takes) if row["loads"] == "here" else row["loads"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [field in ("name", "model_type") for field in fields]
    for number, line in enumerate(lines):
        cells = [c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, widths, texts, strict=False)]
        lines[number] = "  ".join([*cells, line[-1]]).rstrip()
    return lines


def _cell(field: str, value) -> str:
    if value is None:
        return "-"
    if field == "params":
        return f"{value / 1e6:.2f}"
    if field == "gflops":
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _ask_no_hub_in_vain() -> None:
    """Without a network each hub id would be asked for again and again, half a minute long."""
    from urllib.parse import urlsplit

    if os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's package is imported, which it is not yet
        print(f"note: {address.hostname} is out of reach ({error}): the cache is looked at alone", file=sys.stderr)


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tools.towers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME | YAML", help="towers (default: all of configs/towers)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    for name in args.names:
        if name.endswith((".yaml", ".yml")) and not os.path.isfile(name):
            raise LlavaError(f"{name}: no such config file")
    names = args.names or [str(path) for path in sorted(FOLDER.glob("*.yaml"))]
    _ask_no_hub_in_vain()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the table's; what is imported, or a class, may print
        rows = [describe(name) for name in names]
    print(json.dumps(rows, indent=1) if args.json else table(rows, shutil.get_terminal_size((120, 24)).columns))


if __name__ == "__main__":
    main()
