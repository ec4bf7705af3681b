"""Train a token compressor (ToConv) on a folder of images, in front of a frozen vision encoder.

    python -m llava.train.train_toconv --config configs/toconv/clip_l336_24to12.yaml [--key value ...]
    accelerate launch -m llava.train.train_toconv --config ...                        (several processes)

Writes to output_dir: `best/` and `last/` (config.json and token_compressor.safetensors, which a tower takes as
pretrain_token_compressor), heatmap_*.png, log.jsonl and, for images in class folders, probe.json. A stopped run goes on
from `last/`.
"""

import sys

from llava.errors import report_errors, report_interrupts
from llava.train.launcher import under_launcher


@under_launcher
@report_errors
@report_interrupts
def main(argv: list[str] | None = None) -> None:
    from llava.train.toconv.config import help_text, resolve

    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nkeys:\n{help_text()}")
        return
    config = resolve(argv)

    from accelerate.utils import parse_flag_from_env

    from llava.train.devices import usable_devices
    from llava.train.toconv.run import ToConvRun
    from llava.train.train import leave_process_group

    if not parse_flag_from_env("ACCELERATE_USE_CPU"):
        usable_devices(on_cpu="ACCELERATE_USE_CPU=true")
    try:
        ToConvRun(config).train()
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
