"""Stand-alone training of the token compressor on a folder of images."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.errors import LlavaError
from llava.model.multimodal_encoder.token_compressor import TokenCompressor, load_token_compressor
from llava.train.toconv import run as toconv_run
from llava.train.toconv.config import KEYS, resolve
from llava.train.toconv.images import epoch_batches
from llava.train.toconv.probe import average_pooling, draw_heat_map, ridge_accuracy
from llava.train.train_toconv import main
from tests import tiny

ROOT = Path(__file__).parents[2]


def picture_folder(folder: Path, count: int = 20) -> Path:
    """Small pictures in two class folders: stripes across and stripes down."""
    rng = np.random.default_rng(0)
    for i in range(count):
        wave = (127 * (1 + np.sin(np.arange(60) / rng.uniform(1, 4)))).astype(np.uint8)
        pixels = np.repeat(wave[None], 60, axis=0)
        name = folder / ("across" if i % 2 else "down") / f"{i:03}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if i % 2 else pixels.T).convert("RGB").save(name)
    return folder


def digit_folder(folder: Path) -> Path:
    """scikit-learn's handwritten digits, each at a random size and place on a canvas of 56 x 56, a folder per digit."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        side = int(rng.integers(30, 46))
        digit = Image.fromarray((image * 15.9).astype(np.uint8)).resize((side, side), Image.BICUBIC)
        canvas = Image.new("L", (56, 56))
        canvas.paste(digit, tuple(int(v) for v in rng.integers(0, 56 - side + 1, 2)))
        name = folder / str(label) / f"{i:04}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(name)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("clip"), side=56)  # 4 x 4 tokens of 32 channels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def flags(tower, pictures, tmp_path):
    def make(**changes):
        values = {
            "vision_tower": tower,
            "image_folder": pictures,
            "output_dir": tmp_path / "out",
            "compression_input_size": 4,
            "compression_output_size": 2,
            "eval_share": 0.2,
            "epochs": 3,
            "batch_size": 4,
            "warmup_epochs": 0.5,
            "learning_rate": 3e-3,
            "num_workers": 0,
            "heatmap_epochs": 2,
            "sinkhorn_iterations": 10,
        }
        return [word for key, value in (values | changes).items() for word in (f"--{key}", str(value))]

    return make


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log(folder) if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "token_compressor.safetensors")


@pytest.mark.parametrize("objective", ["sinkhorn", "wgan_gp"])
def test_training(flags, tmp_path, capsys, objective):
    run = toconv_run.ToConvRun(resolve(flags(objective=objective, epochs=8, heatmap_epochs=4)))
    clip = {name: value.clone() for name, value in run.tower.state_dict().items()}
    before, _ = run.evaluate()
    run.train()
    assert all(value.equal(clip[name]) for name, value in run.tower.state_dict().items())

    out = tmp_path / "out"
    evals = [entry for entry in log(out) if "eval_loss" in entry]
    measure = "loss" if objective == "sinkhorn" else "reconstruction"
    steps = [entry[measure] for entry in log(out) if measure in entry]
    assert len(steps) == 8 * 4 and len(evals) == 8
    assert np.mean(steps[-4:]) < 0.9 * np.mean(steps[:4])
    assert evals[-1]["eval_measure"] < 0.9 * before["eval_measure"]
    assert sorted(path.name for path in out.glob("heatmap_*.png")) == ["heatmap_0000016.png", "heatmap_0000032.png"]

    last, start = weights(out / "last"), run.untrained
    assert set(last) == {"compress_conv.conv.weight", "norm.weight", "norm.bias", "pos_embed"}
    assert not any(last[name].equal(start[name]) for name in last)
    compressor = TokenCompressor(4, 2, 32)
    load_token_compressor(compressor, str(out / "best"))
    about = json.loads((out / "best" / "config.json").read_text())
    assert (about["input_grid_size"], about["output_grid_size"], about["hidden_dim"]) == (4, 2, 32)
    assert about["mm_vision_select_layer"] == -2 and "clip" in about["vision_tower"]
    best = min(evals, key=lambda entry: entry["eval_measure"])
    assert about["step"] == best["step"]
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in ("uncompressed", "average pooling", "compressed"))


def test_selected_layer_is_what_is_compressed(flags, tower):
    # named as in a tower config with compression
    first = toconv_run.ToConvRun(resolve(flags(mm_vision_tower_type="clip+toconv")))
    _, tokens = next(first.train_images.batches([[0, 1]]))
    from transformers import CLIPVisionModel

    pixels = torch.stack([first.train_images.pixels[i][1] for i in range(2)])
    with torch.no_grad():
        states = CLIPVisionModel.from_pretrained(tower)(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tokens, states[-2][:, 1:])


class Stop(Exception):
    pass


@pytest.mark.parametrize("objective", ["sinkhorn", "wgan_gp"])
@pytest.mark.parametrize("stop_at", [4, 6], ids=["end of epoch", "amid an epoch"])
def test_resume(flags, tmp_path, monkeypatch, objective, stop_at):
    main(flags(objective=objective, output_dir=tmp_path / "whole", probe_images=0))
    stopped = flags(objective=objective, output_dir=tmp_path / "stopped", probe_images=0, save_steps=2)
    record = toconv_run.ToConvRun._record

    def stop(self, values):
        if values["step"] == stop_at + 2 and "loss" in values:  # past the checkpoint
            raise Stop
        record(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(toconv_run.ToConvRun, "_record", stop)
        with pytest.raises(Stop):
            main(stopped)
    assert len(losses(tmp_path / "stopped")) == stop_at + 1
    main(stopped)
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    for name in ("best", "last"):
        whole, resumed = weights(tmp_path / "whole" / name), weights(tmp_path / "stopped" / name)
        assert all(value.equal(resumed[key]) for key, value in whole.items())


def test_resume_of_another_run_is_refused(flags, tmp_path, capsys):
    main(flags(epochs=1, probe_images=0))
    with pytest.raises(SystemExit):
        main(flags(epochs=1, probe_images=0, learning_rate=1.0))
    assert "learning_rate: found 0.003, expected 1.0" in capsys.readouterr().err
    main(flags(epochs=1, probe_images=0, learning_rate=1e-3, resume="false"))
    assert len(losses(tmp_path / "out")) == 4


def test_cache(flags, tmp_path, monkeypatch, capsys):
    main(flags(output_dir=tmp_path / "plain", probe_images=0))
    cached = {"feature_cache": tmp_path / "cache", "probe_images": 0}
    main(flags(output_dir=tmp_path / "filling", **cached))

    def no_more(self, pixels):
        raise AssertionError("the encoder ran although the cache is full")

    with monkeypatch.context() as patch:
        patch.setattr("llava.train.toconv.images.ImageTokens.encode", no_more)
        main(flags(output_dir=tmp_path / "full", **cached))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "filling"), abs=1e-5)
    assert losses(tmp_path / "filling") == losses(tmp_path / "full")
    with pytest.raises(SystemExit):
        main(flags(output_dir=tmp_path / "other", mm_vision_select_layer=-1, **cached))
    assert "mm_vision_select_layer: found -2, expected -1" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True])
def test_bad_images(flags, tmp_path, capsys, cached):
    folder = picture_folder(tmp_path / "some")
    bad = [folder / "down" / "zz1.png", folder / "across" / "zz2.jpg"]
    for path in bad:
        path.write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    changes = {"feature_cache": tmp_path / "cache"} if cached else {}
    main(flags(image_folder=folder, **changes))
    printed = capsys.readouterr().out
    assert "images left out: 2" in printed
    assert all(printed.count(f"left out: image {path}") == 1 for path in bad)
    assert len(losses(tmp_path / "out")) == 3 * 4
    if cached:  # a full cache names them as well, and what trains is what can be read
        main(flags(image_folder=folder, output_dir=tmp_path / "again", **changes))
        assert "images left out: 2" in capsys.readouterr().out
        main(flags(image_folder=folder, output_dir=tmp_path / "plain"))
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "again"), abs=1e-5)


def test_best_is_the_lowest_measure_of_all(flags, tmp_path, monkeypatch):
    measures = iter([3.0, 1.0, 2.0])
    similarity = torch.tensor([0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr(toconv_run.ToConvRun, "evaluate", lambda run: ({"eval_measure": next(measures)}, similarity))
    main(flags(probe_images=0))
    steps = [json.loads((tmp_path / "out" / name / "config.json").read_text())["step"] for name in ("best", "last")]
    assert steps == [8, 12]


def test_heat_map_shows_each_token_in_its_place(tmp_path):
    draw_heat_map(torch.tensor([1.0, 0.0, 0.0, 0.5]), str(tmp_path / "map.png"), "title")
    picture = Image.open(tmp_path / "map.png").convert("L")
    one, zero, also_zero, half = (picture.getpixel((x, y)) for y in (120, 360) for x in (120, 360))
    assert zero == also_zero < half - 40 and half + 40 < one


def test_step_without_a_readable_image_is_skipped(flags, tmp_path, pictures):
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"no picture")
    main(flags(image_folder=folder, eval_folder=pictures, epochs=1, batch_size=2))
    assert [entry["skipped"] for entry in log(tmp_path / "out") if "skipped" in entry] == [1.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_folder": "/no/such"}, "image_folder: found no folder /no/such"),
        ({"image_folder": ROOT / "configs"}, "image_folder: found no images in"),
        ({"compression_input_size": 6}, "compression_input_size: found 6, expected 4"),
        ({"compression_output_size": 5}, "output grid is larger"),
        ({"objectve": "sinkhorn"}, "unknown key 'objectve'; the nearest valid key is 'objective'"),
        ({"objective": "mmd"}, "objective is 'mmd', expected one of sinkhorn, wgan_gp"),
        ({"epochs": "many"}, "epochs is 'many', expected whole number"),
        ({"batch_size": 0}, "batch_size is 0, expected positive whole number"),
        ({"compression_input_size": 4, "report_to": "wandb"}, "report_to: found wandb, which is not installed"),
        ({"vision_tower": "/no/such"}, "vision tower '/no/such'"),
        ({"tower": "x.yaml"}, "unknown key 'tower'"),
        ({"mm_vision_tower": "x"}, "unknown key 'mm_vision_tower'"),
        ({"evaluation_strategy": "no"}, "unknown key 'evaluation_strategy'"),
    ],
)
def test_errors_are_one_line(flags, capsys, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(SystemExit) as stop:
        main(flags(**changes))
    assert stop.value.code == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert not any("error" in line for line in progress)


def test_config_files(tmp_path):
    for name in ("clip_l336_24to12", "demo"):
        config = resolve(["--config", str(ROOT / f"configs/toconv/{name}.yaml"), "--image_folder", "somewhere"])
        assert config.image_folder == "somewhere" and config.objective == "sinkhorn"
    reference = resolve(
        ["--config", str(ROOT / "configs/toconv/clip_l336_24to12.yaml"), "--image-folder=x", "--batch_size", "64"]
    )
    assert (reference.learning_rate, reference.min_learning_rate, reference.weight_decay) == (1e-4, 1e-6, 0.05)
    assert (reference.adam_beta1, reference.adam_beta2, reference.warmup_epochs) == (0.9, 0.999, 3.0)
    assert (reference.batch_size, reference.lambda_gp, reference.critic_steps) == (64, 10.0, 5)
    assert all(key.description for key in KEYS.values()) and not any(key.only_default for key in KEYS.values())


def test_a_config_is_given_like_a_training_runs():
    demo = str(ROOT / "configs/toconv/demo.yaml")
    given = resolve(["--config", demo])
    assert given == resolve([demo]) == resolve([f"--config={demo}"]) and given.resume is True
    assert resolve([demo, "--no_resume"]).resume is False
    with pytest.raises(LlavaError, match="two config files"):
        resolve(["--config", demo, demo])
    with pytest.raises(LlavaError, match="missing image_folder, output_dir; training images"):
        resolve(["--vision_tower", "a"])


def test_learning_rate():
    config = resolve(["--vision_tower=a", "--image_folder=b", "--output_dir=c", "--epochs=10"])
    rates = [toconv_run.learning_rate(step, 20, config) for step in range(200)]
    assert rates[0] == pytest.approx(1e-4 / 60) and rates[59] == pytest.approx(1e-4) == pytest.approx(max(rates))
    assert rates[-1] == pytest.approx(1e-6) and rates[60:] == sorted(rates[60:], reverse=True)


def test_every_image_once_an_epoch():
    first, second = epoch_batches(10, 3, 0, 0), epoch_batches(10, 3, 0, 1)
    assert [len(batch) for batch in first] == [3, 3, 3] and len({*first[0], *first[1], *first[2]}) == 9
    assert first != second and first == epoch_batches(10, 3, 0, 0)


def test_ridge_tells_separable_classes_and_only_those():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (200,), generator=generator)
    noise = torch.randn(200, 150, generator=generator)
    signal = noise.clone()
    signal[:, :3] += 6 * torch.nn.functional.one_hot(classes, 3)
    found = [ridge_accuracy(x[:120], classes[:120], x[120:], classes[120:]) for x in (signal, noise)]
    assert found[0] > 0.8 and found[1] < 0.5


def test_average_pooling_keeps_row_major_order():
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert average_pooling(tokens, 4, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_trained_compressor_tells_digits_better_than_average_pooling(tmp_path):
    from playground.make_demo_model import make_tower

    torch.manual_seed(0)
    tower = tmp_path / "clip"
    tower.mkdir()
    make_tower(tower, "clip")
    images = digit_folder(tmp_path / "digits")
    command = (
        f"--vision_tower {tower} --image_folder {images} --output_dir {tmp_path / 'out'} --eval_share 0.4 --epochs 8 "
        f"--batch_size 64 --learning_rate 5e-4 --warmup_epochs 1 --compression_input_size 4 "
        f"--compression_output_size 2 --feature_cache {tmp_path / 'cache'} --num_workers 0 --sinkhorn_iterations 50"
    )
    main(command.split())
    found = json.loads((tmp_path / "out" / "probe.json").read_text())["accuracy"]
    assert found["compressed"] > found["average pooling"] > 0.2
    evals = [entry["eval_loss"] for entry in log(tmp_path / "out") if "eval_loss" in entry]
    assert evals[-1] < 0.9 * evals[0]


def test_two_processes_give_the_losses_of_one(flags, forks, tmp_path):
    # the cosine loss alone: a mean over images, while the root in the transport is taken once per process
    changes = {"sinkhorn_weight": 0.0, "probe_images": 0, "learning_rate": 1e-4}
    main(flags(output_dir=tmp_path / "one", **changes))
    words = flags(output_dir=tmp_path / "two", **changes)
    status, said = forks.ranks(
        2, words, tmp_path / "log", "llava.train.train_toconv:main", env={"ACCELERATE_USE_CPU": "true"}
    )
    assert status == 0, said[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_help_lists_every_key(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in KEYS)
