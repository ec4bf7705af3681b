"""`python -m llava.tools.visualize_patches`: files, figures, colours of the lines, faults."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.images import load_image
from llava.model.adaptive_patches import (
    patch_entropy,
    select_patches_by_budget,
    select_patches_by_threshold,
    select_patches_by_threshold_v2,
)
from llava.tools.visualize_patches import main, resized
from tests.model.adaptive_patches.pictures import GOLDEN


def run(tmp_path, *flags, source=GOLDEN / "image_2.png"):
    """(exit status, stats.json)."""
    out = tmp_path / "out"
    status = main(["--input-image", str(source), "--output-dir", str(out), *map(str, flags)])
    return status, json.loads((out / "stats.json").read_text())


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]


def test_a_budget_on_one_picture(tmp_path, capsys):
    status, stats = run(tmp_path, "--patch-selection-method", "budget", "--alpha", 0.3)
    assert status == 0 and stats["failed"] == []
    masks, _ = select_patches_by_budget(patch_entropy(pixels_of(GOLDEN / "image_2.png"), 14), 0.3)
    counts = {str(size): int(mask.sum()) for size, mask in masks.items()}
    assert stats["pictures"] == [
        {
            "file": "image_2.png",
            "size": [224, 224],
            "resized": [224, 224],
            "counts": counts,
            "tokens": 76,
            "all_tokens": 256,
            "merged_tokens": counts["14"] // 4 + counts["28"] + counts["56"],
            "all_merged_tokens": 64,
            "retention": 76 / 256,
            "target_retention": 0.3,
            "budget": {
                "base_tokens": 16, "base_small_tokens": 256, "budget": 77, "k": 20, "alpha": 0.3, "used_tokens": 76,
            },
        }
    ]  # fmt: skip
    assert stats["options"]["alpha"] == 0.3 and stats["options"]["patch_selection_method"] == "budget"
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "target 30.0%, real 29.7% (76 of 256 tokens" in out[0]
    names = {"image_2_patches.png", "image_2_importance.png", "image_2_side_by_side.png", "stats.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    patches, heat, both = (
        Image.open(tmp_path / "out" / f"image_2_{name}.png") for name in ("patches", "importance", "side_by_side")
    )
    assert both.width >= patches.width + heat.width and both.height == max(patches.height, heat.height)
    assert patches.width == 5 * 224  # 1,200 / 224, rounded


def test_v2_and_another_size_of_patches(tmp_path, capsys):
    flags = ["--patch-selection-method", "v2", "--alpha", 0.9, "--patch-size", 16, "--num-scales", 2]
    _, stats = run(tmp_path, *flags)
    found = stats["pictures"][0]
    masks, _ = select_patches_by_threshold_v2(patch_entropy(pixels_of(GOLDEN / "image_2.png"), 16, 2), 0.9)
    assert found["counts"] == {str(size): int(mask.sum()) for size, mask in masks.items()}
    assert found["target_retention"] is None and found["budget"] is None
    assert "no target, real" in capsys.readouterr().out


@pytest.mark.parametrize("importance, thresholds", [("laplacian", (0.3, 0.2)), ("reconstruction", (0.002, 0.001))])
def test_other_importances(tmp_path, importance, thresholds):
    flags = ["--patch-selection-method", "v1", "--importance", importance, "--thresholds", *thresholds]
    _, stats = run(tmp_path, *flags)
    assert all(stats["pictures"][0]["counts"].values())
    assert stats["options"]["thresholds"] == list(thresholds)
    heat = Image.open(tmp_path / "out" / "image_2_importance.png").crop((0, 0, 1120, 1120))
    assert len(heat.getcolors(100_000)) > 20


@pytest.mark.parametrize("flags, thresholds", [([], [3.0, 2.0]), (["--num-scales", 2], [3.0])])
def test_thresholds_that_are_known(tmp_path, flags, thresholds):
    _, stats = run(tmp_path, "--patch-selection-method", "v1", "--alpha", 0.3, *flags)  # which v1 does not use
    assert stats["options"]["thresholds"] == thresholds
    maps = patch_entropy(pixels_of(GOLDEN / "image_2.png"), 14, len(thresholds) + 1)
    masks, _ = select_patches_by_threshold(maps, thresholds)
    assert stats["pictures"][0]["counts"] == {str(size): int(mask.sum()) for size, mask in masks.items()}


def test_a_budget_below_the_largest_patches_says_so(tmp_path, capsys):
    run(tmp_path, "--alpha", 0.01)
    assert "target 1.0%, real 6.2%" in (line := capsys.readouterr().out) and "alone are 16 tokens" in line


def test_a_folder_with_a_broken_file(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.open(GOLDEN / "image_2.png").resize((120, 90))
    for ending in ("jpg", "png", "webp", "bmp", "tiff"):
        image.save(folder / f"a_{ending}.{ending}")
    image.save(folder / "same.jpg")
    image.convert("L").save(folder / "same.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("P").save(folder / "palette.PNG")
    data = (folder / "same.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (402, 2)).save(folder / "thin.png")
    (folder / "notes.txt").write_text("not a picture")
    status, stats = run(tmp_path, "--alpha", 0.5, source=folder)
    assert status == 1
    assert [entry["file"] for entry in stats["failed"]] == ["broken.jpg", "thin.png"]
    assert "broken.jpg: cannot be read" in stats["failed"][0]["error"]
    files = ["a_bmp.bmp", "a_jpg.jpg", "a_png.png", "a_tiff.tiff", "a_webp.webp", "palette.PNG", "rgba.png"]
    assert [entry["file"] for entry in stats["pictures"]] == [*files, "same.jpg", "same.png"]
    # two of one name but for the ending do not write over each other
    assert len(list((tmp_path / "out").glob("*_patches.png"))) == 9
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2 and "error: image" in captured.err
    assert captured.out.splitlines()[-1].startswith("9 of 11 pictures in ")


def test_runs_are_equal(tmp_path):
    run(tmp_path, "--alpha", 0.4)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(tmp_path, "--alpha", 0.4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_the_size_is_that_of_the_stock_image_processor():
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    for size in [(300, 200), (1900, 1100), (30, 31)]:
        image = Image.effect_noise(size, 60).convert("RGB")
        _, rows, columns = processor(image, return_tensors="pt")["image_grid_thw"][0].tolist()
        assert resized(image, 14, 56 * 56, 28 * 28 * 1280).size == (14 * columns, 14 * rows)


def test_pictures_are_read_as_in_training(tmp_path):
    """Orientation tags and transparency too: what is shown is what a model sees."""
    image = Image.open(GOLDEN / "image_2.png").crop((0, 0, 112, 56))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    _, stats = run(tmp_path, "--alpha", 1.0, source=tmp_path / "turned.jpg")
    assert tuple(stats["pictures"][0]["size"]) == load_image(str(tmp_path / "turned.jpg")).size


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--alpha", "-1"], "alpha: found -1"),
        (["--alpha", "nan"], "alpha: found nan"),
        ([], "--alpha: missing, which budget needs"),
        (["--patch-selection-method", "v1", "--thresholds", "3"], "thresholds: found [3.0], expected 2"),
        (["--patch-selection-method", "v1", "--importance", "laplacian"], "--thresholds: missing"),
        (["--patch-selection-method", "v1", "--num-scales", "4"], "--thresholds: missing"),
        (["--alpha", "0.3", "--num-scales", "9"], "--num-scales: found 9, expected a whole number from 1 to 8"),
        (["--alpha", "0.3", "--importance", "reconstruction"], "the reconstruction error of all base patches is 0"),
        (
            ["--alpha", "0.3", "--min-pixels", "9999", "--max-pixels", "99"],
            "--min-pixels, --max-pixels: found 9999, 99",
        ),
        (["--alpha", "0.3", "--patch-size", "0"], "base_patch_size: found 0"),
        (["--alpha", "0.3", "--input-image", "nowhere.png"], "--input-image nowhere.png: no such file"),
        (["--alpha", "0.3", "--input-image", "tests/golden"], "found no pictures in the folder"),
        (["--alpha", "0.3", "--input-image", "."], "found no pictures"),
    ],
)
def test_bad_options_end_with_one_line(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(GOLDEN.parents[2])
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *flags)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_do_not_go_among_the_pictures(tmp_path, capsys):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        main(["--input-image", str(tmp_path), "--output-dir", str(tmp_path), "--alpha", "0.3"])
    assert "is the folder of the pictures" in capsys.readouterr().err


# --- without --output-dir ---

NAMES = {"p_patches.png", "p_importance.png", "p_side_by_side.png", "p_stats.json"}
FLAGS = ["--patch-selection-method", "budget", "--alpha"]


@pytest.fixture
def picture(tmp_path):
    Image.open(GOLDEN / "image_2.png").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_beside_the_picture(tmp_path, picture, monkeypatch, capsys):
    before = picture.read_bytes()
    for source in (["--input-image", str(picture)], [str(picture)]):
        assert main([*source, *FLAGS, "0.3"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == NAMES | {"p.png"} and picture.read_bytes() == before
    first = json.loads((tmp_path / "p_stats.json").read_text())
    assert first["pictures"][0]["tokens"] == 76 and str(tmp_path) in capsys.readouterr().out.splitlines()[-1]
    run(tmp_path, *FLAGS, 0.3, source=picture)  # the same files in a folder
    for path in tmp_path.glob("p_*"):
        name = "stats.json" if path.suffix == ".json" else path.name
        assert path.read_bytes() == (tmp_path / "out" / name).read_bytes()
    monkeypatch.chdir(tmp_path)
    assert main(["p.png", *FLAGS, "0.5"]) == 0  # what this command left it writes over
    assert json.loads((tmp_path / "p_stats.json").read_text())["pictures"][0]["tokens"] > 76


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_other_file_is_written_over(tmp_path, picture, capsys, name):
    (tmp_path / name).write_text('{"pictures": []}')
    with pytest.raises(SystemExit) as error:
        main(["--input-image", str(picture), *FLAGS, "0.3"])
    assert error.value.code == 2 and (tmp_path / name).read_text() == '{"pictures": []}'
    assert {path.name for path in tmp_path.iterdir()} == {"p.png", name}
    printed = capsys.readouterr().err
    assert (
        printed.count("\n") == 1 and f"{name}: exists, and no earlier run on" in printed and "--output-dir" in printed
    )


def test_a_run_that_was_cut_short(tmp_path, picture, monkeypatch):
    """What it left is its own, and the next one writes it over."""

    def stop(self, path, *rest):
        (tmp_path / path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        main([str(picture), *FLAGS, "0.3"])
    monkeypatch.undo()
    stats = json.loads((tmp_path / "p_stats.json").read_text())
    assert stats["pictures"] == [] and stats["failed"] == [{"file": "p.png", "error": "not drawn yet"}]
    assert main([str(picture), *FLAGS, "0.3"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == NAMES | {"p.png"}
    Image.open(tmp_path / "p_patches.png").load()


def test_a_pipe_in_place_of_the_figures(tmp_path, picture, capsys):
    os.mkfifo(tmp_path / "p_stats.json")
    with pytest.raises(SystemExit):
        main([str(picture), *FLAGS, "0.3"])
    assert "p_stats.json: exists, and no earlier run" in capsys.readouterr().err


def test_a_picture_of_the_same_name(tmp_path, picture, capsys):
    assert main([str(picture), *FLAGS, "0.3"]) == 0
    Image.open(picture).convert("RGB").save(tmp_path / "p.jpg")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "p.jpg"), *FLAGS, "0.3"])
    assert "exists, and no earlier run on" in capsys.readouterr().err


def test_beside_a_folder(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    monkeypatch.chdir(folder)
    for source in (["--input-dir", str(folder)], ["--input-image", "."]):
        assert main([*source, *FLAGS, "0.5"]) == 0
        assert [path.name for path in folder.iterdir()] == ["a.png"]
        assert (tmp_path / "in_patches" / "stats.json").is_file() and (
            tmp_path / "in_patches" / "a_patches.png"
        ).is_file()


def test_a_folder_that_cannot_be_written_to(tmp_path, picture, capsys, monkeypatch):
    def fault(*flags):
        with pytest.raises(SystemExit) as error:
            main(["--input-image", str(picture), *FLAGS, "0.3", *flags])
        printed = capsys.readouterr().err
        assert error.value.code == 2 and printed.count("\n") == 1
        return printed

    (tmp_path / "file").touch()
    assert f"--output-dir {tmp_path}/file: cannot be written to (File exists)" in fault("-o", f"{tmp_path}/file")
    assert "cannot be written to (Not a directory)" in fault("--output", f"{tmp_path}/file/below")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write where others may not
    message = f"--output-dir {tmp_path}: cannot be written to (Permission denied); name a folder with --output-dir"
    assert message in fault()
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "(No space left on device)" in fault()
    assert {path.name for path in tmp_path.iterdir()} == {"p.png", "file", "p_stats.json"}


def test_all_patches(tmp_path, capsys):
    status, stats = run(tmp_path, "--patch-selection-method", "all")
    assert status == 0 and stats["pictures"][0]["counts"] == {"14": 256, "28": 0, "56": 0}
    assert "no target, real 100.0%" in capsys.readouterr().out


def test_one_picture_is_asked_for(capsys):
    for source in ([], ["a.png", "--input-image", "b.png"]):
        with pytest.raises(SystemExit) as error:
            main([*source, *FLAGS, "0.3"])
        assert error.value.code == 2
    assert "one of the arguments --input-image" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys, llava.tools.visualize_patches as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--patch-selection-method" in out and out.endswith("[]\n")
