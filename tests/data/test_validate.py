import os

import pytest

from llava.data.paths import resolve_path
from llava.data.records import Part, Records
from llava.data.validate import validate_records
from llava.errors import LlavaError
from tests.data.common import talk

GOOD = {"id": "good", "image": "a.png", "conversations": talk("<image>\nWhat?", "A cat.")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not looked into")
    (tmp_path / "clip").mkdir()
    return tmp_path


def collect(*items):
    records = Records()
    records.add_part(Part("train.json", range(len(items))), list(items))
    return records


def check(folder, *items, version="qwen_1_5", **options):
    validate_records(collect(*items), version=version, image_folder=str(folder), video_folder=str(folder), **options)


def test_good_records_pass(folder):
    check(
        folder,
        GOOD,
        {"conversations": talk("Hi", "Hello", "Why?")},
        {"image": ["a.png", "a.png"], "conversations": talk("<image> or <image>?", "The first.")},
        {"video": "clip", "conversations": talk("<image>\nWhat?", "A cat.")},
    )
    check(folder, GOOD, version="plain")
    check(folder, {"video": "clip", "conversations": talk("What?", "A cat.")}, add_time_instruction=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, "conversations: found None, expected a list of turns"),
        ({"conversations": []}, r"conversations: found \[\]"),
        ({"image": ["a.png", "a.png"]}, r"found 1 <image> for 2 image\(s\)"),
        ({"conversations": talk("<image><image>", "A cat.")}, r"found 2 <image> for 1 image\(s\)"),
        ({"video": "clip"}, "image and video: found 'a.png' and 'clip', expected one of them"),
        (
            {"image": None, "video": "clip", "conversations": talk("<image><image>", "A cat.")},
            "found 2 <image> for 1 vid",
        ),
        ({"image": None, "img": "a.png"}, r"unknown key 'img': did you mean 'image'\?"),
        ({"image": 3}, "image: found 3, expected a path"),
        ({"image": "missing.png"}, r"found no file .*missing\.png"),
        ({"image": "../a.png"}, r"path '\.\./a\.png': leaves the folder"),
        ({"image": "/etc/hostname"}, "path '/etc/hostname': leaves the folder"),
        ({"conversations": talk("<image>")}, "found no answer"),
        ({"image": None, "conversations": talk(" ", "")}, "found no text"),
        (
            {"conversations": [{"from": "gpt", "value": "<image>"}, *talk("Hi", "Hello")]},
            r"found 0 <image> for 1 image\(s\)",
        ),
    ],
)
def test_a_fault_names_the_file_and_the_record(folder, change, message):
    with pytest.raises(LlavaError, match=rf"^train\.json: record 2 \(id 'bad'\): .*{message}") as error:
        check(folder, GOOD, {**GOOD, "id": "bad", **change})
    assert "\n" not in str(error.value)


def test_templates_have_their_say(folder):
    twice = {"image": "a.png", "conversations": [*talk("<image>"), *talk("Hi", "Hello")]}
    check(folder, twice)
    with pytest.raises(LlavaError, match="turn 1: found human, expected gpt"):
        check(folder, twice, version="v1")
    with pytest.raises(LlavaError, match="image: found 2, expected 1"):
        check(folder, {"image": ["a.png", "a.png"], "conversations": talk("<image><image>", "cats")}, version="plain")
    with pytest.raises(LlavaError, match="unknown conversation template 'v11'"):
        check(folder, GOOD, version="v11")


def test_several_faults_in_one_message(folder):
    bad = [{**GOOD, "id": f"bad{at}", "image": f"{at}.png"} for at in range(30)]
    with pytest.raises(LlavaError) as error:
        check(folder, GOOD, *bad, max_faults=5)
    lines = str(error.value).split("\n")
    assert len(lines) == 5
    assert lines[0].startswith("train.json: record 2 (id 'bad0'): found no file") and lines[0].endswith("(and 4 more)")


def test_what_may_not_be_meant_is_noted_once(folder, capsys):
    """Media without any <image>, <image> without media, and system turns: a count and the first of each kind."""
    text, system = talk("What?", "A cat."), [{"from": "system", "value": "Be brief."}, *talk("Hi", "Hello")]
    items = [
        GOOD,
        {"id": "u", "image": "a.png", "conversations": text},
        {"id": "v", "image": ["a.png", "a.png", "a.png"], "conversations": text},
        {"id": "w", "video": "clip", "conversations": text},
        {"id": "l", "conversations": talk("Write <image>.", "<image><url/></image>")},
        {"id": "s", "conversations": system},
    ]
    check(folder, *items)
    notes = [
        ("2 of 6 records name an image but have no <image>", 2, "u", "trained as text"),
        ("1 of 6 records name a video but have no <image>", 4, "w", "trained as text"),
        ("1 of 6 records have <image> in a text but name no image or video", 5, "l", "it is text there"),
        ("1 of 6 records have a system turn of their own", 6, "s", "dropped for the template's system text"),
    ]
    for line, (what, number, name, then) in zip(capsys.readouterr().out.splitlines(), notes, strict=True):
        assert line.startswith(f"note: {what} (first: train.json: record {number} (id '{name}')): {then}")
    check(folder, items[3], items[5], add_time_instruction=True, system_turn="record")  # the video is given its <image>
    assert capsys.readouterr().out == ""


def test_plain_still_demands_an_image(folder):
    for record in (
        {"image": "a.png", "conversations": talk("What?", "A cat.")},
        {"conversations": GOOD["conversations"]},
    ):
        with pytest.raises(LlavaError, match=r"found no <image>, expected one|image: found 0, expected 1"):
            check(folder, record, version="plain")


def test_an_image_in_a_system_turn_that_is_used(folder):
    record = {**GOOD, "conversations": [{"from": "system", "value": "As in <image>."}, *GOOD["conversations"]]}
    check(folder, record)
    with pytest.raises(LlavaError, match="found <image> in the system turn"):
        check(folder, record, system_turn="record")


def test_a_folder_that_is_wrong_as_a_whole_is_one_line(tmp_path, folder):
    bad = [{**GOOD, "image": f"{at}.png"} for at in range(30)]
    clips = [{**GOOD, "image": None, "video": f"v{at}.mp4"} for at in range(2)]
    with pytest.raises(LlavaError) as error:
        check(folder, *bad)
    assert str(error.value) == (
        f"image_folder {folder}: found none of the records' 30 files (first: {folder}/0.png), expected the folder that "
        "their paths start from"
    )
    for records in (bad, bad[:1]):
        with pytest.raises(
            LlavaError, match=rf"^image_folder {folder}/none: no such folder, expected .*none/0\.png"
        ) as e:
            validate_records(collect(*records), version="v1", image_folder=f"{folder}/none")
        assert "\n" not in str(e.value)
    with pytest.raises(
        LlavaError, match=r"^image_folder is not used for 2 files \(first: 0\.png\) of which none is there"
    ):
        validate_records(collect(*bad[:2]), version="v1")
    mixed = Records()
    mixed.add_part(Part("a.json", range(30), f"{folder}/own"), bad)
    mixed.add_part(Part("b.json", [0]), [GOOD])
    mixed.add_part(Part("c.json", [0, 1], None, f"{folder}/clips"), clips)
    with pytest.raises(LlavaError) as error:
        validate_records(mixed, version="v1", image_folder=str(folder), video_folder=f"{folder}/x")
    first, second = str(error.value).split("\n  ")
    assert first.startswith(f"a.json: image_folder {folder}/own: no such folder") and "30 files" in first
    assert second.startswith(f"c.json: video_folder {folder}/clips: no such folder") and "2 files" in second


def test_one_missing_file_of_several_is_told_by_its_record(folder):
    with pytest.raises(LlavaError, match=r"^train\.json: record 2 .*found no file .*b\.png") as error:
        check(folder, GOOD, *[{**GOOD, "image": "b.png"}] * 3)
    assert "\n" not in str(error.value)
    with pytest.raises(LlavaError, match=r"^train\.json: record 1 .*found no file .*b\.png"):
        check(folder, {**GOOD, "image": "b.png"})


def test_no_records(folder):
    with pytest.raises(LlavaError, match="found no records"):
        check(folder)


def test_paths(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"")
    images = tmp_path / "images"
    images.mkdir()
    (images / "link").symlink_to(tmp_path / "elsewhere")
    check(images, {**GOOD, "image": "link/a.png"})
    assert resolve_path(str(images), "../elsewhere/a.png", True) == f"{images}/../elsewhere/a.png"
    assert resolve_path(str(images), "/etc/hostname", True) == "/etc/hostname"
    assert resolve_path(None, "/etc/hostname") == "/etc/hostname"
    with pytest.raises(LlavaError, match="leaves the folder"):
        resolve_path(str(images), "link/../../a.png")


def test_an_absolute_path_inside_the_folder_is_inside(tmp_path, monkeypatch):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "sub" / "a.png").write_bytes(b"")
    (tmp_path / "imagesx").mkdir()
    (tmp_path / "other").symlink_to(images)  # another spelling of the folder
    (images / "out").symlink_to(tmp_path / "imagesx")
    monkeypatch.chdir(tmp_path)
    file = f"{images}/sub/a.png"
    for folder in (images, f"{images}/", "images", "./images//", "other", tmp_path / "other", f"{images}/sub/.."):
        for name in (file, f"/{images}//sub/./a.png", f"{images}/sub/../sub/a.png", f"{tmp_path}/other/sub/a.png"):
            assert os.path.samefile(resolve_path(str(folder), name), file)
            assert resolve_path(str(folder), name) == name
        for name in ("sub/../sub/a.png", "./sub/a.png"):
            assert os.path.samefile(resolve_path(str(folder), name), file)
        assert resolve_path(str(folder), f"{images}/sub/") == f"{images}/sub/"  # frames of a video
        assert resolve_path(str(folder), f"{images}/out/b.png") == f"{images}/out/b.png"  # a link inside
        outside = ["/etc/passwd", f"{images}/../c.jpg", f"{images}x/c.jpg", f"{tmp_path}/IMAGES/sub/a.png", "/"]
        outside += [str(tmp_path), f"{images}/..", f"{images}/out/../c.png", "out/../c.png", "../images/sub/a.png"]
        outside += ["..", "sub/../../c.png", "sub\\..\\..\\c.png", f"{images}/sub/../../imagesx/\0.png"]
        for name in outside:
            with pytest.raises(LlavaError, match="leaves the folder") as caught:
                resolve_path(str(folder), name)
            assert "\n" not in str(caught.value)
    check(images, {**GOOD, "image": file})
    with pytest.raises(LlavaError, match=r"found no file .*/sub/none\.png"):
        check(images, {**GOOD, "image": f"{images}/sub/none.png"})


def test_a_mixture_entry_may_have_its_own_folder(tmp_path, folder):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "b.png").write_bytes(b"")
    records = Records()
    records.add_part(Part("a.json", [0], str(tmp_path / "own")), [{**GOOD, "image": "b.png"}])
    records.add_part(Part("b.json", [0]), [GOOD])
    validate_records(records, version="v1", image_folder=str(folder))
    with pytest.raises(LlavaError, match=r"b\.json: record 1"):
        validate_records(records, version="v1", image_folder=str(tmp_path / "own"))
