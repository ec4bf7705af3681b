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
        ({"conversations": talk("What?", "A cat.")}, r"found 0 <image> for 1 image\(s\)"),
        ({"conversations": talk("<image><image>", "A cat.")}, r"found 2 <image> for 1 image\(s\)"),
        ({"image": None}, "found 1 <image> for 0 images"),
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


def test_a_mixture_entry_may_have_its_own_folder(tmp_path, folder):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "b.png").write_bytes(b"")
    records = Records()
    records.add_part(Part("a.json", [0], str(tmp_path / "own")), [{**GOOD, "image": "b.png"}])
    records.add_part(Part("b.json", [0]), [GOOD])
    validate_records(records, version="v1", image_folder=str(folder))
    with pytest.raises(LlavaError, match=r"b\.json: record 1"):
        validate_records(records, version="v1", image_folder=str(tmp_path / "own"))
