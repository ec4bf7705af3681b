"""An optimizer's state by parameter, which any number of processes can take up: DeepSpeed's universal checkpoints.

A folder of this kind holds, as DeepSpeed reads it (https://arxiv.org/abs/2406.18820),

    latest_universal                                  "global_stepN"
    global_stepN/zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt  {"param": the whole tensor}
    global_stepN/zero/NAME/step.pt                    how many steps Adam has taken
    global_stepN/zero/optimizer_state.pt              what belongs to no parameter, for ZeRO-1, 2 and 3 alike
    global_stepN/*model_states.pt                     the engine's counters

`python -m llava.train.universal CHECKPOINT` writes one into the current folder, of ZeRO's state in a checkpoint.
Adam's state is all that DeepSpeed knows to convert.
"""

import argparse
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from llava.errors import report_errors

MOMENTS = ("exp_avg", "exp_avg_sq")
_GLOBAL = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")  # of float16 and of clipping
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")


class Universal:
    """A folder of such a state.

    Args:
        folder: of the whole.
        step: N in its names.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.tag = Path(folder), f"global_step{step}"
        self.zero = self.folder / self.tag / "zero"

    def names(self) -> Iterator[str]:
        """Of the parameters that have moments."""
        return (path.parent.name for path in sorted(self.zero.glob(f"*/{MOMENTS[0]}.pt")))

    def get(self, name: str, kind: str):
        """A parameter's `fp32`, `exp_avg` or `exp_avg_sq` on the CPU, flat under ZeRO-3; or its `step`."""
        import torch

        value = torch.load(self.zero / name / f"{kind}.pt", map_location="cpu", weights_only=True)
        return value["param"] if isinstance(value, dict) else value

    def put(self, name: str, kind: str, value) -> None:
        """Write what `get` reads."""
        import torch

        (self.zero / name).mkdir(parents=True, exist_ok=True)
        torch.save(value if kind == "step" else {"param": value}, self.zero / name / f"{kind}.pt")

    def finish(self, step: float, shared: dict, counters: dict) -> None:
        """Write what belongs to no parameter.

        Args:
            step: how many steps Adam has taken.
            shared: entries of ZeRO's own state.
            counters: of DeepSpeed's engine, and its schedule's state.
        """
        import torch
        from deepspeed import __version__

        # hyperparameters are those of the run that reads it: for each of its groups nothing is said
        nothing = [{"params": []} for _ in self.names()]
        inner = {"state": {0: {"step": step}}, "param_groups": nothing}
        shared = {**shared, "ds_version": __version__, "param_groups": nothing, "optimizer_state_dict": inner}
        torch.save(shared, self.zero / "optimizer_state.pt")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # ZeRO-1 and 2; 3
            torch.save({**counters, "dp_world_size": 1, "mp_world_size": 1}, self.folder / self.tag / name)
        (self.folder / "latest_universal").write_text(self.tag)


def convert(checkpoint: Path) -> None:
    """Write ZeRO's state of a checkpoint into the current folder. It is unpickled: the run's own only."""
    import torch
    from deepspeed.checkpoint import ds_to_universal

    tag = (checkpoint / "latest").read_text().strip()
    made, source = Universal(Path("."), int(tag.removeprefix("global_step"))), Path("input")
    counters = _without_weights(checkpoint / tag, source)
    # names without a folder's: DeepSpeed takes them for patterns
    ds_to_universal.main(
        SimpleNamespace(
            **{"input_folder": str(source), "output_folder": made.tag, "keep_temp_folder": False, "strict": True},
            **{"num_extract_workers": 1, "num_merge_workers": 1, "inject_missing_state": True},
        )
    )
    for path in Path(made.tag).glob("*model_states.pt"):
        path.unlink()
    state = torch.load(made.zero / "optimizer_state.pt", map_location="cpu", weights_only=False)
    step = _adam_step(made, state)
    for name in made.names():
        if not (made.zero / name / "step.pt").exists():  # ZeRO-3 has it once; its tensors are no mappings
            made.put(name, "step", step)
            for kind in ("fp32", *MOMENTS):
                made.put(name, kind, made.get(name, kind))
    made.finish(step, {key: state[key] for key in _GLOBAL if key in state}, counters)
    shutil.rmtree(source)


def _without_weights(state: Path, folder: Path) -> dict:
    """Make a folder of ZeRO's state in which the model's weights, which are saved elsewhere too, are left out; gives
    the engine's counters."""
    import torch

    folder.mkdir()
    counters = {}
    for path in sorted(state.iterdir()):
        if not path.name.endswith("_model_states.pt"):
            os.symlink(path, folder / path.name)
            continue
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        counters = counters or {key: content.get(key) for key in _COUNTERS}
        content.update(module=None, frozen_param_fragments=None)
        torch.save(content, folder / path.name)
    return counters


def _adam_step(made: Universal, state: dict):
    """How many steps the optimizer has taken: fewer than the run where fp16 skipped some."""
    if state.get("zero_stage") == 3:
        return state["optimizer_state_dict"]["state"][0]["step"]
    for name in made.names():
        if (made.zero / name / "step.pt").exists():
            return made.get(name, "step")
    return state["param_groups"][0]["step"]  # of some optimizers for CUDA


def _end_with(parent: int) -> None:
    """End this process when its parent has gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Bring a checkpoint of DeepSpeed into a universal form.")
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    convert(checkpoint)


if __name__ == "__main__":
    main()
