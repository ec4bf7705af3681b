"""A user's own encoder in a run's settings: where its files are, and what its pixels are."""

import pytest

from llava.config.own_tower import ClassPath, check_image, same_class
from llava.config.resolve import resolve
from llava.errors import LlavaError

IMAGE = {"size": 56, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "interpolation": "bicubic"}


@pytest.fixture
def yaml(tmp_path, monkeypatch):
    """A tower YAML with a class and weights beside it, in another folder than the working directory."""
    folder, work = tmp_path / "towers", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    (folder / "vit.py").write_text("")
    (folder / "w.safetensors").write_text("")
    lines = ["vision_tower: vit.py:ViT", "tower_args: {depth: 3, names: [a]}", "vision_tower_weights: w.safetensors"]
    (folder / "t.yaml").write_text("\n".join(lines))
    return folder / "t.yaml"


def test_files_beside_the_yaml(yaml, tmp_path):
    run = resolve(["--tower", str(yaml)])
    assert run["vision_tower"] == f"{yaml.parent}/vit.py:ViT" and run["tower_args"] == {"depth": 3, "names": ["a"]}
    assert run["vision_tower_weights"] == str(yaml.parent / "w.safetensors")
    (tmp_path / "work" / "vit.py").write_text("")  # the working directory comes first
    assert resolve(["--tower", str(yaml)])["vision_tower"] == "vit.py:ViT"
    run = resolve(["--vision_tower", "pkg.vit:ViT", "--tower_args", "{depth: 2}"])
    assert run["vision_tower"] == "pkg.vit:ViT" and run["tower_args"] == {"depth": 2}
    (yaml.parent / "vit.py").unlink()
    (tmp_path / "work" / "vit.py").unlink()
    with pytest.raises(LlavaError, match=r"t.yaml: vision_tower is 'vit.py:ViT': found no file vit.py, .* beside"):
        resolve(["--tower", str(yaml)])
    with pytest.raises(LlavaError, match=r"command line: vision_tower_weights is 'x.safetensors': found no file"):
        resolve(["--vision_tower_weights", "x.safetensors"])
    with pytest.raises(LlavaError, match=r"command line: tower_args is '3', .*|neither JSON"):
        resolve(["--tower_args", "3"])


def test_what_names_a_class(tmp_path, monkeypatch):
    assert ClassPath.parse("a/b c.py:X") == ClassPath("a/b c.py", "X") and ClassPath.parse("p.q:X").source == "p.q"
    for other in ("openai/clip", "a/b.py", "timm:vit_large", "C:\\x", "a.py:X.Y", "x:y:z", "", None):
        assert ClassPath.parse(other) is None
    (tmp_path / "m:X").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ClassPath.parse("m:X") is None  # a folder of that name
    assert same_class("a/v.py:X", "b/v.py:X") and same_class("p.v:X", "p.v:X")
    for a, b in (("a/v.py:X", "a/v.py:Y"), ("p.v:X", "q.v:X"), ("v.py:X", "v:X"), ("openai/clip", "openai/clip")):
        assert not same_class(a, b)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"size": 0}, "size is 0, expected the side"),
        ({"size": [56, 56]}, "size is .56, 56., expected the side"),
        ({"mean": [0.5]}, "mean is .0.5., expected three numbers"),
        ({"std": [1, 0, 1]}, "std is .1, 0, 1., expected numbers above 0"),
        ({"std": [1, float("nan"), 1]}, "expected three numbers"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic', expected one of nearest, lanczos"),
        ({"crop": 3}, "unknown crop"),
    ],
)
def test_pixels(change, fault):
    check_image(IMAGE, "t.yaml: vision_tower_image")
    with pytest.raises(LlavaError, match=f"^t.yaml: vision_tower_image: .*{fault}"):
        check_image(IMAGE | change, "t.yaml: vision_tower_image")
