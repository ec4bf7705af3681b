"""One training run of a token compressor on images: set up, steps, held-out measures, checkpoints, probe."""

import json
import math
import os

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors.torch import save_file
from tqdm import tqdm

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import COMPRESSED, build_vision_tower
from llava.model.multimodal_encoder.token_compressor import (
    TokenCompressor,
    grid_metadata,
    load_token_compressor,
)
from llava.train.toconv.config import ToConvConfig
from llava.train.toconv.images import ImageTokens, epoch_batches, find_images, hold_out, image_class
from llava.train.toconv.objectives import OBJECTIVES
from llava.train.toconv.probe import draw_heat_map, probe, similarity_sum

# may differ between a stopped run and its resumption
FREE_KEYS = {"output_dir", "num_workers", "feature_cache", "save_steps", "heatmap_epochs", "probe_images", "resume"}
FREE_KEYS |= {"report_to"}


def learning_rate(step: int, steps_per_epoch: int, config: ToConvConfig) -> float:
    """Linear warm-up from the first step on, then a cosine down to min_learning_rate at the last step."""
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total - 1 - warmup, 1)
    low, high = config.min_learning_rate, config.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * min(progress, 1))) / 2


class ToConvRun:
    """Everything a run holds. `train` does all of it.

    Processes compute on their share of each batch and average their gradients; the compressor is the same on all.
    """

    def __init__(self, config: ToConvConfig):
        self.config = config
        if config.report_to == "wandb":
            _require_wandb()
        self.accelerator = Accelerator(log_with="wandb" if config.report_to == "wandb" else None)
        if config.batch_size % self.accelerator.num_processes:
            raise LlavaError(
                f"batch_size: found {config.batch_size}, expected a multiple of the {self.accelerator.num_processes} "
                "processes"
            )
        set_seed(config.seed)
        self._find_images()
        self.tower = self._load_tower()
        torch.manual_seed(config.seed)  # however much randomness the tower took
        side, width = self.tower.num_patches_per_side, self.tower.feature_size
        if side != config.compression_input_size:
            raise LlavaError(
                f"compression_input_size: found {config.compression_input_size}, expected {side}, the side of the "
                f"token grid of {config.vision_tower}"
            )
        device = self.accelerator.device
        self.compressor = TokenCompressor(side, config.compression_output_size, width).to(device)
        self.untrained = {name: value.clone() for name, value in self.compressor.state_dict().items()}
        self.objective = OBJECTIVES[config.objective](self.compressor, config).to(device)
        self.parameters = [*self.compressor.parameters()]
        if config.objective == "wgan_gp":
            self.parameters += self.objective.decoder.parameters()
        betas = config.adam_beta1, config.adam_beta2
        self.optimizer = torch.optim.AdamW(self.parameters, betas=betas, weight_decay=config.weight_decay)
        self.step, self.best = 0, math.inf
        self._open_images()

    def _find_images(self):
        config = self.config
        self.train_paths = find_images(config.image_folder, "image_folder")
        self.eval_root = config.eval_folder or config.image_folder
        if config.eval_folder is not None:
            self.eval_paths = find_images(config.eval_folder, "eval_folder")
        else:
            self.train_paths, self.eval_paths = hold_out(self.train_paths, config.eval_share, config.seed)

    def _load_tower(self):
        kind = self.config.mm_vision_tower_type
        cfg = {
            "mm_vision_tower": self.config.vision_tower,
            # of a tower config with compression: the same tower, whose compressor is made here
            "mm_vision_tower_type": kind and kind.removesuffix(COMPRESSED),
            "mm_vision_select_layer": self.config.mm_vision_select_layer,
        }
        tower = build_vision_tower(cfg).requires_grad_(False).eval()
        return tower.to(self.accelerator.device, torch.bfloat16 if self.config.bf16 else torch.float32)

    def _open_images(self):
        config = self.config
        self.train_images = ImageTokens(self.train_paths, self.tower, config.num_workers)
        self.eval_images = ImageTokens(self.eval_paths, self.tower, config.num_workers)
        if config.feature_cache is not None:
            size = config.batch_size // self.accelerator.num_processes
            for name, images in (("train", self.train_images), ("eval", self.eval_images)):
                images.use_cache(os.path.join(config.feature_cache, name), self.accelerator, size)

    # --- training ---

    def train(self) -> None:
        """Train from where `last/` ended, to the last epoch; then the probe."""
        config, main = self.config, self.accelerator.is_main_process
        os.makedirs(config.output_dir, exist_ok=True)
        per_epoch = len(epoch_batches(len(self.train_images), config.batch_size, config.seed, 0))
        if config.resume:
            self._resume()
        self._trim_log()
        if config.report_to == "wandb":
            self.accelerator.init_trackers("toconv", config=config.model_dump())
        if main:
            print(f"{len(self.train_images)} training images, {len(self.eval_images)} held out")
            print(self.compressor.extra_repr())
        with tqdm(total=config.epochs * per_epoch, initial=self.step, unit="step", disable=not main) as bar:
            for epoch in range(self.step // per_epoch, config.epochs):
                self._train_epoch(epoch, per_epoch, bar)
                self._finish_epoch(epoch)
        self._finish()

    def _train_epoch(self, epoch: int, per_epoch: int, bar) -> None:
        config, accelerator = self.config, self.accelerator
        batches = epoch_batches(len(self.train_images), config.batch_size, config.seed, epoch)
        batches = batches[self.step - epoch * per_epoch :]  # after a resumption, those still to come
        mine = [batch[accelerator.process_index :: accelerator.num_processes] for batch in batches]
        for good, tokens in self.train_images.batches(mine):
            rate = learning_rate(self.step, per_epoch, config)
            if self._any_empty(good):
                values = {"skipped": 1.0}
            else:
                values = self._train_step(tokens, rate)
            self.step += 1
            self._record({"step": self.step, "epoch": epoch, "learning_rate": rate, **values})
            bar.update(1)
            bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", refresh=False)
            # the end of an epoch is saved after its evaluation
            if config.save_steps and self.step % config.save_steps == 0 and self.step % per_epoch:
                self.save("last")

    def _any_empty(self, good: list[int]) -> bool:
        """Whether a process has no readable image in this step, which then none of them takes."""
        empty = torch.tensor(float(not good), device=self.accelerator.device)
        return bool(self.accelerator.reduce(empty, "sum"))

    def _train_step(self, tokens, rate: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # draws of its own for each step, so that a resumed run draws the same
        number = self.step * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        tokens = tokens.float()
        compressed = self.compressor(tokens)
        critic = self.objective.update_critic(compressed, tokens, generator, self._average)
        loss, parts = self.objective(self.compressor, compressed, tokens)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self._average(self.parameters)
        self.optimizer.step()
        values = {"loss": loss, **parts, **critic}
        means = self.accelerator.reduce(torch.stack([value.detach() for value in values.values()]), "mean").tolist()
        return dict(zip(values, means, strict=True))

    def _average(self, parameters) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _finish_epoch(self, epoch: int) -> None:
        config = self.config
        values, similarity = self.evaluate()
        self._record({"step": self.step, "epoch": epoch, **values})
        last = epoch == config.epochs - 1
        if config.heatmap_epochs and (last or (epoch + 1) % config.heatmap_epochs == 0) and self._is_main:
            path = self._path(f"heatmap_{self.step:07d}.png")
            draw_heat_map(similarity, path, f"receptive-field cosine, step {self.step}")
        if values["eval_measure"] < self.best:
            self.best = values["eval_measure"]
            self.save("best")
        self.save("last")

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], torch.Tensor]:
        """(means over the held-out images, similarity of each output token [M])."""
        accelerator, size = self.accelerator, self.config.batch_size // self.accelerator.num_processes
        mine = list(range(len(self.eval_images)))[accelerator.process_index :: accelerator.num_processes]
        similarity = torch.zeros(self.compressor.output_grid_size**2, device=accelerator.device)
        totals = torch.zeros(3, device=accelerator.device)  # loss, measure, images
        for _, tokens in self.eval_images.batches([mine[i : i + size] for i in range(0, len(mine), size)]):
            if len(tokens):
                tokens = tokens.float()
                compressed = self.compressor(tokens)
                loss, parts = self.objective(self.compressor, compressed, tokens)
                one = torch.ones_like(loss)
                totals += len(tokens) * torch.stack([loss, self.objective.measure(loss, parts), one])
                similarity += similarity_sum(self.compressor, compressed, tokens)
        totals, similarity = accelerator.reduce(totals, "sum"), accelerator.reduce(similarity, "sum")
        if not totals[2]:
            raise LlavaError(f"{self.eval_root}: none of the {len(self.eval_images)} held-out images can be read")
        loss, measure = (totals[:2] / totals[2]).tolist()
        similarity = similarity / totals[2]
        return {"eval_loss": loss, "eval_measure": measure, "eval_similarity": similarity.mean().item()}, similarity

    def _record(self, values: dict) -> None:
        if self._is_main:
            with open(self._path("log.jsonl"), "a") as file:
                file.write(json.dumps(values) + "\n")
        if self.config.report_to == "wandb":
            self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=self.step)

    # --- checkpoints ---

    def save(self, name: str) -> None:
        """Write the folder `name`; `last` also holds what a resumption needs, which is written last."""
        if not self._is_main:
            return
        folder = self._path(name)
        os.makedirs(folder, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in self.compressor.state_dict().items()}
        about = {
            "input_grid_size": self.compressor.input_grid_size,
            "output_grid_size": self.compressor.output_grid_size,
            "hidden_dim": self.compressor.hidden_dim,
            "kernel_size": self.compressor.kernel_size,
            "stride": self.compressor.stride,
            "padding": self.compressor.padding,
            "step": self.step,
            "vision_tower": self.config.vision_tower,
            "mm_vision_select_layer": self.config.mm_vision_select_layer,
            "training": self.config.model_dump(),
        }
        grids = grid_metadata(self.compressor)
        _replace(os.path.join(folder, "token_compressor.safetensors"), lambda path: save_file(weights, path, grids))
        _replace(os.path.join(folder, "config.json"), lambda path: _write_json(about, path))
        if name == "last":
            state = {
                "step": self.step,
                "best": self.best,
                "config": self.config.model_dump(),
                "compressor": weights,
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            if self.config.objective == "wgan_gp":
                state["critic_optimizer"] = self.objective.critic_optimizer.state_dict()
            _replace(os.path.join(folder, "training_state.pt"), lambda path: torch.save(state, path))

    def _resume(self) -> None:
        path = self._path(os.path.join("last", "training_state.pt"))
        if not os.path.exists(path):
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self.config.model_dump().items():
            if name not in FREE_KEYS and state["config"].get(name) != value:
                raise LlavaError(
                    f"{path}: {name}: found {state['config'].get(name)}, expected {value} as in this run; use another "
                    "output_dir, or resume: false"
                )
        self.compressor.load_state_dict(state["compressor"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "critic_optimizer" in state:
            self.objective.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step, self.best = state["step"], state["best"]
        if self._is_main:
            print(f"resuming from {path}, step {self.step}")

    def _trim_log(self) -> None:
        """Leave out of log.jsonl what comes after the step to start from, which is done again."""
        path = self._path("log.jsonl")
        if self._is_main and os.path.exists(path):
            with open(path) as file:
                # a stopped process may have left half a line behind
                lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            with open(path, "w") as file:
                file.writelines(line for line in lines if self.step)

    # --- the end ---

    def _finish(self) -> None:
        bad = {*gather_object([*self._bad_paths()])}
        if self._is_main:
            if bad:
                print(f"images left out: {len(bad)}")
            if self.config.probe_images:
                self._probe()
            print(f"saved to {self.config.output_dir}")
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _bad_paths(self):
        for images in (self.train_images, self.eval_images):
            yield from (str(images.paths[index]) for index in images.bad)

    def _probe(self) -> None:
        """Print and write how well classes are told from the tokens, of the best compressor."""
        names = {image_class(path, self.config.image_folder) for path in self.train_paths} - {None}
        classes = {name: number for number, name in enumerate(sorted(names))}
        train = self._labelled(self.train_images, self.config.image_folder, classes)
        test = self._labelled(self.eval_images, self.eval_root, classes)
        if len(set(train[1].tolist())) < 2 or not test[0]:
            print("no linear probe: it needs images of two or more classes, one subfolder each")
            return
        load_token_compressor(self.compressor, self._path("best"))
        found = probe(self.compressor, *train, *test)
        self.compressor.load_state_dict(self.untrained)
        found["compressed, before training"] = probe(self.compressor, *train, *test)["compressed"]
        print(f"linear probe: {len(train[0])} training images, {len(test[0])} held out, {len(classes)} classes")
        for name, accuracy in found.items():
            print(f"  {name:<28} {accuracy:.3f}")
        _write_json({"accuracy": found, "train": len(train[0]), "eval": len(test[0])}, self._path("probe.json"))

    def _path(self, name: str) -> str:
        return os.path.join(self.config.output_dir, name)

    def _labelled(self, images: ImageTokens, root: str, classes: dict[str, int]):
        """(tokens, class numbers) of at most `probe_images` images that have a known class."""
        labels = [classes.get(image_class(path, root), -1) for path in images.paths]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        chosen = [i for i in order if labels[i] >= 0][: self.config.probe_images]
        tokens, numbers = [], []
        for good, found in images.batches([chosen[i : i + 64] for i in range(0, len(chosen), 64)]):
            tokens += found.float().cpu()
            numbers += [labels[i] for i in good]
        return tokens, torch.tensor(numbers, dtype=torch.long)


def _require_wandb() -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise LlavaError("report_to: found wandb, which is not installed; pip install wandb") from None


def _replace(path: str, write) -> None:
    """Write a file that is either the old or the whole new one, also when the process is stopped."""
    write(f"{path}.part")
    os.replace(f"{path}.part", path)


def _write_json(content, path: str) -> None:
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
