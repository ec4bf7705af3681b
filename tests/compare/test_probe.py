"""From a folder of pictures to a row for each tower, and how far two rankings of towers agree."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from llava.compare import probe_features, probe_fits
from llava.compare.probe import agreement, probe, wilson
from llava.compare.probe_folder import Pictures, read_folder
from llava.errors import LlavaError
from llava.images.processing import process_image
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests import tiny

COLOURS = {"blue": (30, 40, 200), "green": (40, 190, 60), "red": (210, 40, 30)}


def draw(path: Path, colour, seed: int) -> None:
    """A disc of a colour somewhere on grey."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(30, 60, 2))
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    x, y = rng.integers(0, width - 20), rng.integers(0, height - 20)
    ImageDraw.Draw(picture).ellipse((x, y, x + 20, y + 20), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def discs(folder: Path, count: int = 10, first: int = 0) -> str:
    for place, (name, colour) in enumerate(COLOURS.items()):
        for number in range(count):
            draw(folder / name / f"{number:02d}.png", colour, first + 100 * place + number)
    return str(folder)


# --- the folder ---


def paths_of(pictures: Pictures, part: str) -> list[str]:
    return [pictures.paths[i] for i in pictures.of(part)]


def test_each_class_is_dealt_by_the_seed(tmp_path):
    folder = discs(tmp_path / "a")
    found = read_folder(folder)
    assert found.classes == ["blue", "green", "red"]
    for name in found.classes:
        parts = [part for path, part in zip(found.paths, found.parts, strict=True) if path.startswith(name)]
        assert [parts.count(part) for part in ("fit", "validation", "test")] == [6, 2, 2]
    assert all(found.classes[y] == path.split("/")[0] for y, path in zip(found.labels, found.paths, strict=True))
    assert read_folder(folder) == found and read_folder(folder, seed=1).parts != found.parts


def test_other_classes_do_not_change_how_one_is_dealt(tmp_path):
    folder = discs(tmp_path / "a")
    before = {path for path in paths_of(read_folder(folder), "test") if not path.startswith("green")}
    shutil.rmtree(tmp_path / "a" / "green")
    assert set(paths_of(read_folder(folder), "test")) == before


@pytest.mark.parametrize("held", ["val", "test"])
def test_a_folder_may_say_what_is_asked(tmp_path, held):
    discs(tmp_path / "train", 5)
    discs(tmp_path / held, 2, first=50)
    found = read_folder(str(tmp_path))
    assert all(path.startswith(held) for path in paths_of(found, "test")) and len(found.of("test")) == 6
    assert len(found.of("validation")) == 3 and len(found.of("fit")) == 12
    assert all(path.startswith("train") for path in paths_of(found, "fit"))


def test_with_both_the_pictures_of_val_decide(tmp_path):
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        discs(tmp_path / name, count)
    found = read_folder(str(tmp_path))
    for part, name in (("fit", "train"), ("validation", "val"), ("test", "test")):
        assert {path.split("/")[0] for path in paths_of(found, part)} == {name}


def test_classes_called_train_and_val_are_classes(tmp_path):
    for name in ("train", "val"):
        for number in range(2):
            draw(tmp_path / name / f"{number}.png", COLOURS["red"], number)
    assert read_folder(str(tmp_path)).classes == ["train", "val"]


def test_two_pictures_of_a_class_are_enough(tmp_path):
    found = read_folder(discs(tmp_path / "a", 2))
    assert [len(found.of(part)) for part in ("fit", "validation", "test")] == [3, 0, 3]


def test_unreadable_pictures_are_left_out_and_named_once(tmp_path, capsys):
    folder = discs(tmp_path / "a")
    bad = tmp_path / "a" / "red" / "03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    record = tmp_path / "out" / "pictures.json"
    found = read_folder(folder, record=record)
    assert found.left_out == 1 and "red/03.png" not in found.paths and len(found.paths) == 29
    assert capsys.readouterr().out.count(f"left out: image {bad}: cannot be read") == 1
    assert read_folder(folder, record=record) == found  # from the record: see below
    content = json.loads(record.read_text())
    content["unreadable"] = {}
    record.write_text(json.dumps(content))
    assert read_folder(folder, record=record).left_out == 0
    draw(bad, COLOURS["red"], 7)  # another picture: all is read again
    assert read_folder(folder, record=record).left_out == 0
    assert json.loads(record.read_text())["pictures"] != content["pictures"]


def no_folder(tmp_path):
    return tmp_path / "none", "found no folder"


def no_classes(tmp_path):
    draw(tmp_path / "a.png", COLOURS["red"], 0)
    return tmp_path, "found no pictures in folders of classes, expected two or more: FOLDER/CLASS/PICTURE"


def one_class(tmp_path):
    discs(tmp_path)
    shutil.rmtree(tmp_path / "red")
    shutil.rmtree(tmp_path / "blue")
    return tmp_path, "found one class, green, expected two or more"


def empty_class(tmp_path):
    discs(tmp_path)
    (tmp_path / "yellow").mkdir()
    (tmp_path / "yellow" / "notes.txt").write_text("none yet")
    return tmp_path, "yellow: found no pictures, expected some of .png"


def small_class(tmp_path):
    discs(tmp_path)
    draw(tmp_path / "yellow" / "0.png", (200, 200, 0), 0)
    return tmp_path, "found 1 picture of the class yellow, expected two or more"


def broken_class(tmp_path):
    discs(tmp_path, 2)
    (tmp_path / "red" / "01.png").write_text("no picture")
    return tmp_path, r"found 1 picture of the class red \(1 more cannot be read\), expected two or more"


def unknown_class(tmp_path):
    discs(tmp_path / "train", 2)
    discs(tmp_path / "val", 2)
    draw(tmp_path / "val" / "yellow" / "0.png", (200, 200, 0), 0)
    return tmp_path, "found 0 pictures of the class yellow to train on, expected two or more"


FAULTS = [no_folder, no_classes, one_class, empty_class, small_class, broken_class, unknown_class]


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_no_probe_can_be_made_of(tmp_path, fault):
    folder, message = fault(tmp_path / "p")
    with pytest.raises(LlavaError, match=message) as caught:
        read_folder(str(folder))
    assert "\n" not in str(caught.value)


# --- towers ---


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    kinds = {"clip": ("clip", 28), "large": ("clip", 56), "packed": ("hevc_vit_packing", 56)}
    return {name: tiny.tower(folder / name, kind, side=side) for name, (kind, side) in kinds.items()}


@pytest.fixture
def towers(encoders):
    """Settings of towers of every kind of output: so many tokens for all, compressed, or as many as a picture asks."""

    def settings(folder, **values):
        usual = dict(mm_vision_select_layer=-2, mm_vision_select_feature="patch", image_aspect_ratio="square")
        return SimpleNamespace(vision_tower=folder, mm_vision_tower=folder, **usual | values)

    squeezed = dict(use_token_compression=True, compression_input_size=4, compression_output_size=2)
    return {
        "clip": settings(encoders["clip"]),
        "compressed": settings(encoders["large"], **squeezed),
        "packed": settings(encoders["packed"]),
        "adaptive": settings(encoders["packed"], adaptive_patches={"method": "v1"}),
    }


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(probe_fits, "LEAST_STEPS", 60)
    monkeypatch.setattr(probe_fits, "EPOCHS", 1)
    monkeypatch.setattr(probe_fits, "RATES", (1e-2,))


def test_towers_of_every_kind_get_their_row(tmp_path, towers, short, capsys):
    folder = discs(tmp_path / "discs", 15)
    towers["gone"] = SimpleNamespace(**vars(towers["clip"]) | {"mm_vision_tower": str(tmp_path / "no_tower")})
    towers["gone"].mm_vision_tower_type = "clip"
    found = probe(towers, folder, str(tmp_path / "out"), images={"image_aspect_ratio": "pad"})
    assert list(found) == list(towers)
    gone = found.pop("gone")
    assert "no_tower" in gone["error"] and "\n" not in gone["error"]
    assert gone["linear"] is gone["knn"] is gone["attentive"] is None
    assert f"gone: no probe: {gone['error']}" in capsys.readouterr().out
    for name, row in found.items():
        assert row["error"] is None and (row["n"], row["n_classes"], row["left_out"]) == (9, 3, 0)
        for kind in ("linear", "knn", "attentive"):  # a disc of another colour is told by any tower
            low, high = row["intervals"][kind]
            assert low <= row[kind] <= high
            # in so narrow a compressor each group of its norm is one channel, whose mean it takes away
            assert row[kind] > 0.6 or name == "compressed", (name, kind)
    assert [found[name]["tokens"] for name in ("clip", "compressed", "packed")] == [4, 4, 16]
    assert 1 < found["adaptive"]["tokens"] < 16
    assert "untrained" in found["compressed"]["note"] and not found["clip"]["note"]
    assert json.loads(json.dumps(found)) == found
    said = [json.loads(path.read_text())["settings"] for path in (tmp_path / "out").glob("features/*/about.json")]
    assert [values["image_aspect_ratio"] for values in said] == ["pad"] * 4


def expected(settings, folder, path, aspect_ratio):
    """Tokens of one picture by the tower itself."""
    torch.manual_seed(0)
    tower = build_vision_tower(settings).eval()
    picture = Image.open(Path(folder) / path)
    pixels = process_image(picture, tower.image_processor, aspect_ratio, "[[28, 56], [56, 28], [56, 56]]")
    crops = pixels if pixels.ndim == 4 else pixels[None]
    with torch.no_grad():
        return torch.cat([tower([crop])[0] for crop in crops])


OTHERS = [(name, "pad") for name in ("compressed", "packed", "adaptive")]


@pytest.mark.parametrize(
    ("name", "aspect_ratio"),
    [("clip", aspect_ratio) for aspect_ratio in ("pad", "square", "anyres")] + OTHERS,
)
def test_features_are_what_the_tower_gives_the_projector(tmp_path, towers, monkeypatch, name, aspect_ratio):
    monkeypatch.setattr(probe_features, "IN_FILE", 7)
    monkeypatch.setattr(probe_features, "AT_ONCE", 3)
    pictures = read_folder(discs(tmp_path / "discs", 4))
    grid = {"image_grid_pinpoints": "[[28, 56], [56, 28], [56, 56]]"} if aspect_ratio == "anyres" else {}
    settings = SimpleNamespace(**vars(towers[name]) | {"image_aspect_ratio": aspect_ratio} | grid)
    features, *_ = probe_features.tower_features(settings, pictures, tmp_path / "out", "cpu", quiet=True)
    rows = [0, 3, 11]
    tokens, mask = features.batch(rows)
    for row, own, there in zip(rows, tokens, mask, strict=True):
        asked = expected(settings, pictures.folder, pictures.paths[row], aspect_ratio)
        assert own[there].shape == asked.shape
        assert torch.allclose(own[there], asked, rtol=2e-3, atol=2e-3)  # kept as float16
        assert torch.allclose(features.means[row].float(), asked.mean(0), atol=1e-5)


def test_a_second_call_computes_nothing(tmp_path, towers, monkeypatch):
    pictures = read_folder(discs(tmp_path / "discs", 4))
    computed = []
    monkeypatch.setattr(probe_features, "IN_FILE", 5)
    tokens = probe_features._Encoder._tokens

    def counted(self, pixels):
        computed.append(len(pixels))
        return tokens(self, pixels)

    monkeypatch.setattr(probe_features._Encoder, "_tokens", counted)

    def again(settings=towers["clip"], pictures=pictures):
        computed.clear()
        found, *_ = probe_features.tower_features(settings, pictures, tmp_path / "out", "cpu", quiet=True)
        return found.means, sum(computed)

    first, count = again()
    assert count == 12
    second, count = again()
    assert count == 0 and torch.equal(first, second)
    files = sorted((tmp_path / "out").glob("*/*.safetensors"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:100])
    assert again()[1] == 5  # the broken one alone
    files[2].unlink()
    assert again()[1] == 2
    monkeypatch.setattr(probe_features, "IN_FILE", 7)
    assert again()[1] == 12  # files of other pictures
    # whatever the features depend on makes them anew
    layer = SimpleNamespace(**vars(towers["clip"]) | {"mm_vision_select_layer": -1})
    assert again(layer)[1] == 12
    assert again(SimpleNamespace(**vars(layer) | {"image_aspect_ratio": "pad"}))[1] == 12
    draw(tmp_path / "discs" / "red" / "00.png", COLOURS["green"], 9)
    assert again()[1] == 12


def test_other_weights_make_other_features(tmp_path, towers):
    pictures = read_folder(discs(tmp_path / "discs", 2))
    folder = tmp_path / "tower"
    settings = SimpleNamespace(**vars(towers["clip"]) | {"vision_tower": str(folder), "mm_vision_tower": str(folder)})
    means = []
    for seed in (1, 2):
        tiny.tower(folder, seed=seed)
        features, *_ = probe_features.tower_features(settings, pictures, tmp_path / "out", "cpu", quiet=True)
        means.append(features.means)
    assert not torch.allclose(*means) and len(list((tmp_path / "out").iterdir())) == 2


def test_what_a_killed_run_has_computed_is_kept(tmp_path, towers, monkeypatch):
    pictures = read_folder(discs(tmp_path / "discs", 4))
    monkeypatch.setattr(probe_features, "IN_FILE", 4)
    content, done = probe_features._Encoder._content, []

    def killed(self, parts):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(parts))
        return content(self, parts)

    monkeypatch.setattr(probe_features._Encoder, "_content", killed)
    with pytest.raises(KeyboardInterrupt):
        probe_features.tower_features(towers["clip"], pictures, tmp_path / "out", "cpu", quiet=True)
    done.clear()
    probe_features.tower_features(towers["clip"], pictures, tmp_path / "out", "cpu", quiet=True)
    assert done == [4]


def test_large_features_are_kept_in_full():
    encoder = probe_features._Encoder(SimpleNamespace(vision_tower_name="own"), None, "")
    tokens = [torch.tensor([[1.0, 3e5], [2.0, -3e5]])]
    assert torch.equal(encoder._content(tokens)["tokens"], tokens[0])
    with pytest.raises(LlavaError, match="own: its features are not finite"):
        encoder._content([torch.tensor([[1.0, math.nan]])])


def test_a_trained_compressor_is_the_one_that_counts(tmp_path, towers):
    from safetensors.torch import save_file

    settings = towers["compressed"]
    torch.manual_seed(7)
    compressor = build_vision_tower(settings).token_compressor
    for parameter in compressor.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "token_compressor.safetensors"
    save_file({name: p.detach().clone() for name, p in compressor.named_parameters()}, path)
    settings.pretrain_token_compressor = str(path)
    tower, _, note = probe_features.load_tower(settings, "cpu")
    assert note == ""
    pairs = zip(tower.token_compressor.parameters(), compressor.parameters(), strict=True)
    assert all(torch.equal(own, theirs) for own, theirs in pairs)


def test_a_second_call_fits_nothing_anew(tmp_path, towers, short, monkeypatch):
    one, folder, output = {"clip": towers["clip"]}, discs(tmp_path / "discs", 4), str(tmp_path / "out")
    fitted, linear = [], probe_fits.linear_probe

    def counted(*args):
        fitted.append(args)
        return linear(*args)

    monkeypatch.setattr(probe_fits, "linear_probe", counted)
    first = probe(one, folder, output)
    assert probe(one, folder, output) == first and len(fitted) == 1
    monkeypatch.setattr(probe_fits, "NEIGHBOURS", 1)
    assert probe(one, folder, output)["clip"]["chosen"]["knn"] == 1 and len(fitted) == 2
    probe(one, folder, output, seed=1)
    assert len(fitted) == 3
    (kept,) = Path(output).glob("features/*/scores.json")
    kept.unlink()
    assert probe(one, folder, output, seed=1) == probe(one, folder, output, seed=1) and len(fitted) == 4


def test_the_same_call_gives_the_same_row(tmp_path, towers, short):
    one, folder = {"adaptive": towers["adaptive"]}, discs(tmp_path / "discs", 6)
    rows = [probe(one, folder, str(tmp_path / name)) for name in ("a", "b")]
    assert rows[0] == rows[1] and rows[0]["adaptive"]["error"] is None


def test_an_untrained_compressor_is_the_same_each_time(towers):
    made = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        tower, *_ = probe_features.load_tower(towers["compressed"], "cpu")
        made.append(torch.cat([parameter.flatten() for parameter in tower.token_compressor.parameters()]))
    assert torch.equal(*made)


def test_code_that_raises_stops_no_other_tower(tmp_path, towers, short, monkeypatch, capsys):
    tokens = probe_features._Encoder._tokens

    def failing(self, pixels):
        if type(self.tower).__name__ != "CLIPVisionTower":
            raise RuntimeError("out of something\nand more")
        return tokens(self, pixels)

    monkeypatch.setattr(probe_features._Encoder, "_tokens", failing)
    two = {name: towers[name] for name in ("packed", "clip")}
    found = probe(two, discs(tmp_path / "discs", 3), str(tmp_path / "out"))
    assert found["packed"]["error"] == "RuntimeError: out of something"
    assert "Traceback" in capsys.readouterr().out
    assert found["clip"]["error"] is None


# --- intervals and agreement ---


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the demo's extra")
    for right, total in ((0, 9), (9, 9), (3, 7), (180, 359)):
        theirs = stats.binomtest(right, total).proportion_ci(method="wilson")
        assert np.allclose(wilson(right, total), theirs)


def named(values) -> dict:
    return {f"tower{i}": value for i, value in enumerate(values)}


def test_agreement_is_scipys_also_with_ties():
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the demo's extra")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 9).tolist(), rng.integers(0, 4, 9).tolist()
        found = agreement(named(a), named(b))
        assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
        r = found["spearman"]
        reach = stats.norm.ppf(0.975) * math.sqrt((1 + r * r / 2) / 6)
        assert found["low"] == pytest.approx(math.tanh(math.atanh(r) - reach))
        assert found["high"] == pytest.approx(math.tanh(math.atanh(r) + reach))
        assert (found["n_towers"], found["note"]) == (9, "")


def test_intervals_hold_the_true_correlation_95_times_in_100():
    """Of normal pairs of correlation p, Spearman's is 6 / pi asin(p / 2)."""
    rng, p, held = np.random.default_rng(1), 0.6, 0
    truth = 6 / math.pi * math.asin(p / 2)
    for _ in range(1000):
        a, b = rng.multivariate_normal([0, 0], [[1, p], [p, 1]], 15).T
        found = agreement(named(a.tolist()), named(b.tolist()))
        held += found["low"] <= truth <= found["high"]
    assert 930 <= held <= 975


def test_below_eight_towers_there_is_too_little_to_say():
    found = agreement(named(range(7)), named([0, 1, 2, 3, 4, 6, 5]))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (7 * 48))
    assert (found["low"], found["high"], found["n_towers"]) == (None, None, 7)
    assert found["note"] == "7 towers: too few to say"
    found = agreement(named(range(8)), named([0, 1, 2, 3, 4, 5, 7, 6]))
    assert found["low"] is not None and found["note"] == ""


def test_towers_without_both_scores_do_not_count():
    a, b = named(range(10)), named(range(10))
    a["tower0"], b["tower1"] = None, math.nan
    del b["tower2"]
    b["other"] = 5
    assert agreement(a, b)["n_towers"] == 7
    assert agreement({"tower3": 1.0}, b) == dict(
        spearman=None, low=None, high=None, n_towers=1, note="1 tower: too few to say"
    )
    assert agreement({}, {})["n_towers"] == 0


def test_ranks_that_agree_wholly_are_not_taken_for_certain():
    up, down = agreement(named(range(8)), named(range(8))), agreement(named(range(8)), named(range(8, 0, -1)))
    assert up["spearman"] == 1 and up["high"] == 1 and 0.5 < up["low"] < 0.95
    assert down["spearman"] == -1 and down["low"] == -1 and -up["low"] == pytest.approx(down["high"])


def test_equal_scores_have_no_ranks():
    found = agreement(named([1.0] * 9), named(range(9)))
    assert found["spearman"] is None and found["note"] == "9 towers with equal scores: no ranks to compare"
