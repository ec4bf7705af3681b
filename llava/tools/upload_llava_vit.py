"""Put an HEVC-ViT encoder on the Hugging Face Hub, in a folder that is proven equal to its weights and stands alone.

    python -m llava.tools.upload_llava_vit --model_name hf_llava_vit_large_ln --weight_path W --repo_id user/name

The folder holds the converted weights, the configs, the files of `llavavit` (so that `AutoModel.from_pretrained(...,
trust_remote_code=True)` needs nothing of this project) and a model card with the differences that were measured while
it was made. `--dry-run --output_dir D` writes it to D and does not touch the network.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile

from llava.errors import LlavaError, report_errors
from llava.tools.convert_vit import TARGETS
from llava.tools.folders import new_folder, quiet
from llava.tools.vit import reload_hub_folder
from llava.tools.vit.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from llava.tools.vit.model_card import model_card
from llava.tools.vit.outputs import (
    check_differences,
    describe_inputs,
    differences,
    model_inputs,
    random_images,
    run_converted,
    run_reference,
    unpack,
)

AUTO_MAPS = {
    "padded": {
        "AutoConfig": "configuration_llava_vit.LlavaViTConfig",
        "AutoModel": "modeling_llava_vit.LlavaViTModel",
    },
    "packed": {
        "AutoConfig": "configuration_llava_vit.LlavaViTPackingConfig",
        "AutoModel": "modeling_llava_vit_packing.LlavaViTPackingModel",
    },
}


def assemble(folder: str, checkpoint: Checkpoint, layout: str, repo_id: str, image_size=None) -> dict:
    """Fill a folder for the Hub and measure it.

    Args:
        folder: an empty one.
        checkpoint: of the weights.
        layout: of the model that `AutoModel` is to give: padded or packed.
        repo_id: told in the model card.
        image_size: side in pixels for the configs, where it is not the checkpoint's.

    Returns:
        What was compared with the formulas of `llava.tools.vit.reference` -> the largest difference of each output.

    Raises:
        LlavaError: one of them is above the limit of 1e-4.
    """
    import llavavit

    write_checkpoint(folder, checkpoint, layout, image_size, auto_map=AUTO_MAPS[layout])
    package = os.path.dirname(llavavit.__file__)
    for name in sorted(os.listdir(package)):
        if name.endswith(".py"):
            shutil.copyfile(os.path.join(package, name), os.path.join(folder, name))

    pixels = random_images(checkpoint.config)
    expected = run_reference(checkpoint, pixels)
    sides = {
        "padded model": lambda: run_converted(checkpoint, "padded", pixels),
        "packed model": lambda: run_converted(checkpoint, "packed", pixels),
        "this folder": lambda: run_alone(folder, checkpoint.config, layout, pixels),
    }
    measured = {}
    for name, outputs in sides.items():  # one model in memory at a time
        measured[name] = differences(outputs(), expected)
        check_differences(measured[name], name)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(model_card(repo_id, checkpoint.config, layout, measured, describe_inputs(checkpoint.config)))
    return measured


def run_alone(folder: str, config, layout: str, pixels):
    """`Outputs` of a folder in a Python of its own, which has this project's packages only from that folder."""
    from safetensors.torch import load_file, save_file

    from llava.tools.vit.checkpoint import model_class
    from llavavit.conversion import convert_config

    config = convert_config(config.to_dict(), model_class(layout).config_class)
    with tempfile.TemporaryDirectory() as work:
        inputs, outputs = os.path.join(work, "inputs.safetensors"), os.path.join(work, "outputs.safetensors")
        save_file(model_inputs(config, pixels), inputs)
        # transformers copies remote code to where this variable says, and would leave the copy there
        done = subprocess.run(
            [sys.executable, reload_hub_folder.__file__, folder, inputs, outputs],
            env={**os.environ, "HF_MODULES_CACHE": os.path.join(work, "modules")},
            cwd=work,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise LlavaError(f"{folder}: AutoModel.from_pretrained fails without this project: {last}")
        saved = load_file(outputs)
    states = [saved[f"hidden_states.{i}"] for i in range(config.num_hidden_layers + 1)]
    return unpack(saved["last_hidden_state"], saved.get("pooler_output"), states, len(pixels))


def upload(folder: str, repo_id: str, token: str | None, private: bool) -> str:
    """Make the repository if there is none, and upload the folder; returns the address.

    Raises:
        LlavaError: the Hub cannot be reached or says no.
    """
    import httpx
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the account has it
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="HEVC-ViT encoder, verified")
    except (OSError, httpx.HTTPError) as error:  # what huggingface_hub raises is one of them
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LlavaError(f"{repo_id}: not uploaded: {reason}") from None
    return str(address)


def print_measured(measured: dict[str, dict[str, float]], config) -> None:
    """A row for each side, a column for each output."""
    names = list(next(iter(measured.values())))
    print(f"largest differences from the formulas on {describe_inputs(config)}:")
    print(f"  {'':<14}" + "".join(f"{name:>19}" for name in names))
    for side, values in measured.items():
        print(f"  {side:<14}" + "".join(f"{values[name]:>19.1e}" for name in names))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Assemble an HEVC-ViT encoder for the Hub, verify it and upload it.")
    parser.add_argument(
        "--model_name", required=True, help="size that the weights must have: hf_llava_vit_large_ln, ..."
    )
    parser.add_argument("--weight_path", required=True, help="folder, .safetensors, or .pth, in any layout")
    parser.add_argument("--repo_id", required=True, help="repository on the Hub: user/name")
    parser.add_argument("--token", help="access token (default: that of `hf auth login`)")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--to", default="padded", choices=TARGETS, help="the model that AutoModel gives")
    parser.add_argument("--image_size", type=int, help="side in pixels to write into the configs")
    parser.add_argument("--output_dir", help="where to keep the folder (default: it is removed after the upload)")
    parser.add_argument("--dry-run", action="store_true", help="stop before the network; needs --output_dir")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.dry_run and not args.output_dir:
        raise LlavaError("--dry-run: needs --output_dir, where to leave the folder")
    _check_repo_id(args.repo_id)
    quiet()
    checkpoint = read_checkpoint(args.weight_path, args.model_name, image_size=args.image_size)
    print(f"read      {checkpoint}")
    with contextlib.ExitStack() as stack:
        output = args.output_dir or os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "hub")
        with new_folder(output, args.weight_path) as folder:
            measured = assemble(folder, checkpoint, TARGETS[args.to], args.repo_id, args.image_size)
        print(f"assembled {output}: {', '.join(sorted(os.listdir(output)))}")
        print_measured(measured, checkpoint.config)
        if args.dry_run:
            print("dry run: nothing is uploaded")
        else:
            print(f"uploaded  {upload(output, args.repo_id, args.token, args.private)}")


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LlavaError(f"--repo_id: {error}") from None


if __name__ == "__main__":
    main()
