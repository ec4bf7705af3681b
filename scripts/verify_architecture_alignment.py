"""Hold the HEVC-ViT encoders against each other and against what shares no code with them.

    python scripts/verify_architecture_alignment.py [--verbose] [--hub-dir D] [--config C]

Sides: the project's models; the models in the files of a Hub folder (`--hub-dir`, or one assembled here), loaded as
`trust_remote_code` does; the published values in tests/golden/hevc_vit; the plain formulas of
`llava.tools.vit.reference` in float64; the published defaults in `tests.support.vit.published`. Compared are configs,
names and shapes, weights to the last bit, and outputs, which must agree within 1e-5 in float32. `--config` adds the
models of a config.json with random weights. Exit status: 0 if everything holds, 1 if not.
"""

import argparse
import contextlib
import functools
import hashlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # first, for `tests` is a common name

from llava.errors import LlavaError, report_errors  # noqa: E402
from llava.tools.folders import quiet  # noqa: E402
from tests.support.vit import golden, published  # noqa: E402
from tests.support.vit.check_table import Report, facts, identical, near, same, shapes, under  # noqa: E402
from tests.support.vit.golden import golden_config, golden_folder, golden_state, read_json, read_model_config  # noqa: E402
from tests.support.vit.sides import MODELS, ONEVISION, PACKED, PADDED, Side, formulas  # noqa: E402

MOST_PARAMETERS = 400e6  # a --config with more is compared in structure alone
# type of a folder -> the models that read it
READERS = {PADDED: (PADDED, PACKED), PACKED: (PACKED, PADDED), ONEVISION: (ONEVISION, PADDED, PACKED)}


def readings() -> list[tuple[str, str]]:
    return [(stored_as, model_type) for stored_as, readers in READERS.items() for model_type in readers]


# --- configs and weights ----------------------------------------------------------------------------------------------


def check_configs(report: Report, sides: list[Side]) -> None:
    report.title("configs")
    for side in sides:
        report.check("published defaults", side.name, default_values, side)
        report.check("named sizes, constants", side.name, constants, side)
        report.check("configs of published values", side.name, golden_values, side)
        report.check("configs of other types", side.name, converted_values, side)


def default_values(side: Side) -> list:
    result = []
    for model_type, expected in published.DEFAULTS.items():
        result += under(model_type, facts(vars(side.model_class(model_type).config_class()), expected))
    return result


def constants(side: Side) -> list:
    config, conversion = side.module(PADDED, "configuration_llava_vit"), side.module(PADDED, "conversion")
    sizes = {
        name: [tuple(size[key] for key in published.SIZE_KEYS) for size in sizes]
        for name, sizes in config.SIZES.items()
    }
    found = {
        "image_mean": list(config.IMAGE_MEAN),
        "image_std": list(config.IMAGE_STD),
        "eps of source norms": conversion.SOURCE_EPS["layer_norm_eps"],
        "eps of the source head": conversion.SOURCE_EPS["head_norm_eps"],
    }
    return same(sizes, published.SIZES) + same(found, published.CONSTANTS)


def golden_values(side: Side) -> list:
    """Configs of loaded models: the file's values, and the published defaults of the file's type."""
    result = []
    for stored_as, model_type in readings():
        full = published.DEFAULTS[stored_as] | golden_config(stored_as)
        expected = {key: full.get(key, value) for key, value in published.DEFAULTS[model_type].items()}
        found = vars(side.golden(model_type, stored_as).config)
        result += under(f"{model_type} from {stored_as}", facts(found, expected))
    return result


def converted_values(side: Side) -> list:
    """No value is lost or changed where a model reads the config of another type."""
    result = []
    for stored_as, model_type in readings():
        config_class, convert = side.model_class(model_type).config_class, side.module(model_type, "conversion")
        config = convert.convert_config({"model_type": stored_as} | published.NO_DEFAULTS, config_class)
        result += under(f"{model_type} from {stored_as}", facts(vars(config), published.NO_DEFAULTS))
    return result


def check_weights(report: Report, sides: list[Side]) -> None:
    report.title("names, shapes and weights")
    files = {name: hashlib.sha256((golden.GOLDEN / name).read_bytes()).hexdigest() for name in published.GOLDEN_SHA256}
    report.check("files of published values", "golden", facts, files, published.GOLDEN_SHA256)
    for side in sides:
        for stored_as in MODELS:
            report.check(published.GOLDEN_FOLDERS[stored_as], side.name, golden_weights, side, stored_as)
        report.check("eps of every norm", side.name, norm_eps, side)


def golden_weights(side: Side, stored_as: str) -> list:
    """Weights of the models that read a folder are those of the file that has them under the same names."""
    result = []
    for model_type in READERS[stored_as]:
        state = side.golden(model_type, stored_as).state_dict()
        if stored_as == ONEVISION:  # for which there is no file with packed names
            result += under(model_type, identical(side.convert(state, ONEVISION), golden_state(ONEVISION)))
        else:
            result += under(model_type, identical(state, golden_state(model_type)))
    return result


def norm_eps(side: Side) -> list:
    """eps of the norms, as the modules have it; the probes below see what is computed with."""
    result = []
    for stored_as, model_type in readings():
        model, layers = side.golden(model_type, stored_as), golden_config(stored_as)["num_hidden_layers"]
        names = ["layernorm_pre", "layernorm_post", "head.norm"]
        names += [f"encoder.layers.{i}.layer_norm{k}" for i in range(layers) for k in (1, 2)]
        found = {name: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}
        result += under(model_type, same(found, dict.fromkeys(names, published.DEFAULTS[stored_as]["layer_norm_eps"])))
    return result


# --- outputs ----------------------------------------------------------------------------------------------------------

GOLDEN_CASES = (  # name, type of the folder, prefix in its io.safetensors
    ("image", PADDED, "image"),
    ("video", PADDED, "video"),
    ("sparse video", PADDED, "video_sparse"),
    ("mixed sizes", PACKED, "packed"),
    ("explicit positions", PACKED, "packed_positions"),
    ("onevision image", ONEVISION, "image"),
    ("onevision video", ONEVISION, "video"),
)


def check_golden(report: Report, sides: list[Side]) -> None:
    report.title("outputs against published values")
    for name, stored_as, prefix in GOLDEN_CASES:
        report.check(name, "formulas", golden_formulas, stored_as, prefix)
        for side in sides:
            report.check(name, side.name, golden_models, side, stored_as, prefix)


def read_case(stored_as: str, prefix: str):
    from tests.support.vit.cases import read_golden_case

    values = published.DEFAULTS[stored_as] | golden_config(stored_as)
    path = golden_folder(stored_as) / "io.safetensors"
    return read_golden_case(path, prefix, values["patch_size"], values["num_hidden_layers"])


def golden_formulas(stored_as: str, prefix: str) -> list:
    case, expected = read_case(stored_as, prefix)
    expected.pop("hidden_states_in", None)  # rows of patches, which the formulas do not have
    return near(formulas(golden_state(stored_as), golden_config(stored_as), case), expected)


def golden_models(side: Side, stored_as: str, prefix: str) -> list:
    from tests.support.vit.cases import run_case

    case, expected = read_case(stored_as, prefix)
    rows, result = expected.pop("hidden_states_in", None), []
    for model_type in READERS[stored_as]:
        found = run_case(side.golden(model_type, stored_as), case)
        result += under(model_type, near(found, expected))
        if rows is not None and model_type == PACKED:
            result += under(model_type, near(found, {"hidden_states_in": rows}))
    return result


def check_cases(report: Report, sides: list[Side], stored_as: str) -> None:
    """Models with published weights on more cases: against the formulas, and against the project's first model."""
    from tests.support.vit.cases import build_cases, run_case

    report.title(f"outputs, weights of {published.GOLDEN_FOLDERS[stored_as]}")
    full = published.DEFAULTS[stored_as] | golden_config(stored_as)
    state, project = golden_state(stored_as), sides[0]
    for case in build_cases(3, full["patch_size"], full.get("rope_temporal_size")):
        expected = {
            "formulas": functools.cache(functools.partial(formulas, state, full, case)),
            "project": functools.cache(lambda case=case: run_case(project.golden(stored_as, stored_as), case)),
        }
        for side in sides:
            report.check(case.name, side.name, one_case, side, stored_as, case, expected)


def one_case(side: Side, stored_as: str, case, expected: dict) -> list:
    from tests.support.vit.cases import LONG_TIME_AXIS, run_case

    result = []
    for model_type in READERS[stored_as]:
        if case.name == LONG_TIME_AXIS and model_type == PADDED:
            continue  # a long time axis is OneVision-Encoder's; the packed model takes the places themselves
        found = run_case(side.golden(model_type, stored_as), case)
        for name, outputs in expected.items():
            result += under(f"{model_type} against {name}:", near(found, outputs()))
    return result


def check_probes(report: Report, sides: list[Side]) -> None:
    """Random weights that make every eps matter, under configs that make every value matter."""
    from tests.support.vit.cases import random_state

    report.title("outputs, random weights")
    for name, values in published.PROBES.items():
        state = random_state(sides[0].empty(PADDED, values).state_dict(), small=True)
        expected = expected_outputs(state, values)
        for side in sides:
            report.check(name, side.name, random_models, side, values, state, expected)


def expected_outputs(state: dict, values: dict) -> list:
    """[(case, outputs of the formulas)] for an encoder."""
    from tests.support.vit.cases import build_cases

    full = published.DEFAULTS[values.get("model_type", PADDED)] | values
    cases = build_cases(full["num_channels"], full["patch_size"])
    return [(case, formulas(state, full, case)) for case in cases]


def random_models(side: Side, values: dict, state: dict, expected: list, scaled: bool = False) -> list:
    """The models of a side with the same weights, one at a time."""
    result = []
    for model_type in MODELS:
        result += under(model_type, all_cases(side.build(model_type, values, state), expected, scaled))
    return result


def all_cases(model, expected: list, scaled: bool) -> list:
    from tests.support.vit.cases import run_case

    result = []
    for case, outputs in expected:
        result += under(f"{case.name}:", near(run_case(model, case), outputs, scaled))
    return result


# --- a Hub folder, a config -------------------------------------------------------------------------------------------


def check_hub_folder(report: Report, project: Side, hub: Side) -> None:
    """Its own weights, which need not be the published ones, in its own model and in the project's."""
    from llava.tools.vit.checkpoint import read_state

    report.title("the Hub folder's own weights")
    folder = hub.hub_folder
    values, state = read_model_config(Path(folder) / "config.json"), read_state(folder)
    report.check("config.json", "hub", hub_configs, folder, values)
    report.check("the published ones or others", "hub", hub_weights, project, state)
    expected = functools.cache(functools.partial(expected_outputs, state, values))
    for side, model_type in ((hub, values["model_type"]), (project, PADDED), (project, PACKED)):
        report.check(model_type, side.name, hub_model, side, model_type, folder, state, expected)


def hub_weights(project: Side, state: dict) -> list:
    """Weights that have the shapes of the published ones are the published ones, to the last bit."""
    packed, known = project.convert(state, PACKED), golden_state(PACKED)
    return identical(packed, known) if shapes(packed) == shapes(known) else [("others", None, None)]


def hub_model(side: Side, model_type: str, folder: str, state: dict, expected) -> list:
    """A model that reads the folder has its weights, and the outputs of the formulas."""
    import torch

    model = side.model_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()
    result = identical(side.convert(model.state_dict(), PACKED), side.convert(state, PACKED))
    return result + all_cases(model, expected(), scaled=True)


def hub_configs(folder: str, values: dict) -> list:
    """What transformers finds the code by, and how pictures are to be prepared."""
    preprocessor = read_json(Path(folder) / "preprocessor_config.json")
    module, model = MODELS[values["model_type"]]
    side = values["image_size"]
    expected = {"AutoModel": f"{module}.{model}", "AutoConfig": f"configuration_llava_vit.{model[:-5]}Config"}
    statistics = {key: published.CONSTANTS[key] for key in ("image_mean", "image_std")}
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3}
    return facts(values["auto_map"], expected) + facts(preprocessor, statistics | sizes)


def check_config(report: Report, sides: list[Side], path: str) -> None:
    """The models of a config.json, with random weights."""
    from tests.support.vit.cases import random_state

    values = read_model_config(path)
    values = published.DEFAULTS[values["model_type"]] | values
    try:
        empty = sides[0].empty(PADDED, values)
    except ValueError as error:
        raise LlavaError(f"{path}: {error}") from None
    report.title(f"config {path}")
    for side in sides:
        report.check("names and shapes", side.name, mapped_shapes, side, values)
    if empty.num_parameters() > MOST_PARAMETERS:
        size, most = empty.num_parameters() / 1e6, MOST_PARAMETERS / 1e6
        print(f"  outputs: not compared, {size:.0f} M parameters are more than {most:.0f} M")
        return
    state = random_state(empty.state_dict())
    expected = expected_outputs(state, values)
    for side in sides:
        report.check("outputs, random weights", side.name, random_models, side, values, state, expected, True)


def mapped_shapes(side: Side, values: dict) -> list:
    """The padded model's names and shapes, mapped, are the packed one's, and the other way round."""
    states = {model_type: side.empty(model_type, values).state_dict() for model_type in MODELS}
    result = []
    for a in MODELS:
        for b in MODELS:
            result += under(f"{a} as {b}:", same(shapes(side.convert(states[a], b)), shapes(states[b])))
    return result


# --- the command ------------------------------------------------------------------------------------------------------


def assemble_hub_folder(work: str) -> str:
    """A folder as `upload_llava_vit` makes it, of the published weights."""
    from llava.tools.upload_llava_vit import assemble
    from llava.tools.vit.checkpoint import read_checkpoint

    folder = Path(work) / "llava_vit_tiny"
    folder.mkdir()
    checkpoint = read_checkpoint(str(golden_folder(PADDED)))
    assemble(str(folder), checkpoint, "padded", "example/llava_vit_tiny")
    return str(folder)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Hold the HEVC-ViT encoders against each other and published values.")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every value and tensor that is compared")
    parser.add_argument("--hub-dir", help="folder of upload_llava_vit (default: one is assembled of published weights)")
    parser.add_argument("--config", help="config.json of any size, whose models are compared with random weights")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.hub_dir and not (Path(args.hub_dir) / "config.json").is_file():
        raise LlavaError(f"{args.hub_dir}: found no config.json, expected a folder of upload_llava_vit")
    quiet()
    report = Report(args.verbose)
    with contextlib.ExitStack() as stack:
        folder = args.hub_dir or assemble_hub_folder(stack.enter_context(tempfile.TemporaryDirectory()))
        project, hub = Side("project"), Side("hub", folder)
        sides = [project, hub]
        check_configs(report, sides)
        check_weights(report, sides)
        check_golden(report, sides)
        for stored_as in (PADDED, ONEVISION):
            check_cases(report, sides, stored_as)
        check_probes(report, sides)
        check_hub_folder(report, project, hub)
        if args.config:
            check_config(report, sides, args.config)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
