"""One conversation in all forms that published data has, and what is no form of any."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.conversation import conv_templates
from llava.data.forms import canonical
from llava.data.module import read_records
from llava.data.records import load_records
from llava.data.validate import validate_records
from llava.errors import LlavaError
from llava.eval.questions import read_questions
from tests.data.common import talk

TURNS = talk("<image>\nWhat?", "A cat.")
PICTURE = {"type": "image", "image": "a.png"}


def said(*content, **fields) -> dict:
    """A record of `messages`, the human's first."""
    roles = ("user", "assistant") * len(content)
    return {"messages": [{"role": role, "content": c} for role, c in zip(roles, content, strict=False)], **fields}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


# --- all forms alike ---

_WORDS = st.text("ab \n?é", min_size=1, max_size=8).filter(lambda words: not words.startswith("\n"))
_NAMES = st.lists(st.sampled_from(["a.png", "b c.png", "d/e.jpg"]), max_size=3)


def forms(names: list[str], rounds: list[tuple[str, str]], kind: str) -> list[dict]:
    """The same rounds with pictures in front of the first, as LLaVA and as others write them."""
    head = "<image>\n" * len(names)
    texts = [part for pair in rounds for part in pair]
    plain, parts = [head + texts[0], *texts[1:]], [{"type": kind}] * len(names)
    one = {kind: names[0] if len(names) == 1 else names} if names else {}
    several = {f"{kind}s": names}
    addresses = [{"type": f"{kind}_url", f"{kind}_url": {"url": f"file://{n.replace(' ', '%20')}"}} for n in names]
    paths = [{"type": kind, kind: name, "max_pixels": 9} for name in names]
    typed = [[text(words)] for words in texts[1:]]
    in_parts = [
        {"from": ("human", "gpt")[at % 2], "value": c} for at, c in enumerate([[*paths, text(texts[0])], *typed])
    ]
    pairs = [{"user": user, "assistant": assistant, "source": "s"} for user, assistant in rounds]
    return [
        {**one, "conversations": talk(*plain)},
        {**several, "conversations": talk(*plain)},
        {**one, **several, "conversations": talk(*plain), "messages": None},
        {**several, "conversations": said(*plain)["messages"]},
        said(*plain, **several),
        said(*plain, **several, texts=[]),
        said([*parts, text(texts[0])], *texts[1:], **several),
        said([*paths, text(texts[0])], *typed),
        said([*paths, text(texts[0])], *typed, **several),
        said([*addresses, {"type": "input_text", "text": texts[0]}], *texts[1:]),
        {"conversations": in_parts},
        {**several, "texts": pairs},
    ]


@settings(deadline=None, max_examples=60)
@given(_NAMES, st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=3), st.sampled_from(["image", "video"]))
def test_the_same_conversation_in_all_forms_is_the_same_record(names, rounds, kind):
    names = names[:1] if kind == "video" else names
    llavas, *others = forms(names, rounds, kind)
    assert canonical({"id": 1, **llavas}).keys() == {"id", "conversations", *([kind] if names else [])}
    for other in others:
        before = json.dumps(other)
        found = canonical({"id": 1, **other})
        assert found == {"id": 1, **llavas} and canonical(found) == found
        assert json.dumps(other) == before  # what was read is left as it was


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1, "image": "a.png", "conversations": TURNS},
        {"image": ["a.png", "b.png"], "conversations": TURNS, "img": "x", "Video": "y", "message": "z", "source": "s"},
        {"video": "C:/a.mp4", "conversations": TURNS},
        {
            "conversations": TURNS,
            "image": None,
            "image_id": "7",
            "image_size": [1, 2],
            "image_width": 3,
            "video_id": "v",
        },
        {"conversations": TURNS, "images_metadata": [{"w": 1}], "image_source": "coco", "Image": "", "img": None},
        {"conversations": TURNS, "data_source": "x", "caption": "a", "metadata": {"image": "a.png"}, "pictured": "no"},
    ],
)
def test_llavas_own_records_are_returned_themselves(record):
    assert canonical(record) is record


def test_columns_of_another_meaning_stay():
    record = {"image": "a.png", "conversations": TURNS, "images": [{"width": 3}], "texts": ["ocr"], "messages": 4}
    assert canonical(record) == record


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ([text("Is "), PICTURE, text(" red?")], "Is <image> red?"),
        ([PICTURE, PICTURE], "<image>\n<image>"),
        ([PICTURE, text("\nRed?")], "<image>\nRed?"),
        ([PICTURE, text("or"), PICTURE, text("?")], "<image>\nor<image>?"),
        (["Is it red? ", {"image": "a.png"}], "Is it red? <image>"),
        ([{"type": "image_url", "image_url": "file://localhost/x/a.png"}], "<image>"),
    ],
)
def test_an_image_stands_where_its_part_does(content, value):
    assert canonical(said(content))["conversations"][0] == {"from": "human", "value": value}


def test_order_of_media_over_turns():
    record = said([{"type": "image"}, text("A?")], "Yes.", [text("And"), {"type": "image"}], images=["a.png", "b.png"])
    assert canonical(record)["image"] == ["a.png", "b.png"]
    record = said([{**PICTURE, "image": "b.png"}, text("A?")], "Yes.", [PICTURE])
    assert canonical(record)["image"] == ["b.png", "a.png"]


def test_sharegpts_video_marker():
    found = canonical(said("<video>What?", "A cat.", videos=["v.mp4"]))
    assert found == {"video": "v.mp4", "conversations": talk("<image>What?", "A cat.")}
    literal = {"video": "v.mp4", "conversations": talk("<video>What?", "A cat.")}
    assert canonical(literal) is literal  # LLaVA's own form has none
    assert canonical(said("What is <video>?", "A tag."))["conversations"][0]["value"] == "What is <video>?"


def test_turns_that_are_none_are_left_for_the_check():
    found = canonical({"videos": ["v.mp4"], "messages": [{"role": "user", "content": "<video>"}, {"role": []}, "Hi"]})
    assert found["conversations"] == [{"from": "human", "value": "<image>"}, {"from": [], "value": None}, "Hi"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (said("Hi", conversations=TURNS), "conversations and messages: found both"),
        ({"conversations": TURNS, "texts": [{"user": "a", "assistant": "b"}]}, "conversations and texts: found both"),
        ({"image": "a.png", "images": ["b.png"]}, r"image and images: found \['a.png'\] and \['b.png'\]"),
        ({"image": "a.png", "images": ["a.png", "b.png"]}, "image and images: found"),
        ({"image": "a.png", "video": "v.mp4"}, "image and video: found 'a.png' and 'v.mp4', expected one of them"),
        ({"images": ["a.png"], "videos": ["v.mp4"]}, "images and videos: found"),
        (said([PICTURE, {"type": "video", "video": "v.mp4"}]), "turn 0, part 1: found video beside image"),
        (said([PICTURE], videos=["v.mp4"]), "turn 0, part 0: found image beside video"),
        (said([PICTURE], images=["b.png"]), r"images: found \['b.png'\], but \['a.png'\] in the parts"),
        (said([{"type": "image"}]), "turn 0, part 0: found no path"),
        (said([{"type": "image"}, {"type": "image"}], images=["a.png"]), "turn 0, part 1: found no path"),
        (said([{"type": "image"}], images=["a.png", "b.png"]), "images: found .* in the parts"),
        (said([{"type": "audio", "audio": "a.wav"}]), "turn 0, part 0: found type 'audio', expected text, image or"),
        (said([{"type": "text", "text": None}]), "turn 0, part 0: found None as its text"),
        (said([7]), "turn 0, part 0: found 7, expected an object"),
        (said([{"type": "video", "video": ["1.jpg", "2.jpg"]}]), "turn 0, part 0: found .*, expected a path"),
        (said("Hi", videos=["a.mp4", "b.mp4"]), "videos: found .*, expected one path"),
        ({"images": [3]}, "images: found 3, expected a path"),
        ({"images": {"bytes": "x" * 9999}}, "images: found .*, expected a path"),
        ({"messages": "Hi"}, "messages: found 'Hi', expected a list of turns"),
        ({"texts": ["Hi"]}, "texts, entry 0: found 'Hi'"),
        ({"image": "https://x.y/a.png", "conversations": TURNS}, "image: found the address 'https://x.y/a.png'"),
        ({"images": ["S3://x/a.png"]}, "images: found the address"),
        (said([{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]), "part 0: found the address"),
        (said([{"type": "image_url", "image_url": "data:image/png;base64," + "A" * 9999}]), "nothing is fetched"),
    ],
)
def test_what_is_no_form_is_one_line(record, message):
    with pytest.raises(LlavaError, match=message) as error:
        canonical(record)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


NAMES = [("Image", "image"), ("IMAGES", "image"), ("img", "image"), ("imgs", "image"), ("picture", "image")]
NAMES += [(name, "image") for name in ("image_path", "img_path", "image_file", "image_url", "imagePaths", "image-file")]
NAMES += [("Video", "video"), ("video_path", "video"), ("videoFile", "video")]


@pytest.mark.parametrize(("name", "meant"), NAMES)
@pytest.mark.parametrize("value", ["a.png", ["a.png"]])
def test_other_names_for_media_are_told(name, meant, value):
    with pytest.raises(LlavaError, match=rf"^unknown key '{name}': did you mean '{meant}'\?$"):
        canonical({"id": 1, name: value, "conversations": TURNS})


@pytest.mark.parametrize("name", ["Conversations", "conversation", "message", "Messages", "dialog"])
def test_other_names_for_the_conversation_are_told(name):
    with pytest.raises(LlavaError, match=rf"^unknown key '{name}': did you mean 'conversations'\?$"):
        canonical({"image": "a.png", name: TURNS})


# --- files ---


def test_files_with_a_byte_order_mark(tmp_path):
    record = {"id": "a", "conversations": talk("Hi", "é")}
    (tmp_path / "a.json").write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8-sig")
    line = json.dumps(record, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{line}\n\ufeff{line}\n\ufeff\n", encoding="utf-8-sig")  # joined files
    (tmp_path / "a.yaml").write_text("datasets:\n- json_path: a.jsonl\n", encoding="utf-8-sig")
    for name, count in (("a.json", 1), ("a.jsonl", 2), ("a.yaml", 2)):
        assert list(load_records(tmp_path / name)) == [record] * count


def test_records_are_read_and_faults_told_together(tmp_path):
    good = [
        said([{"type": "image"}, text("What?")], "A cat.", images=["a.png"]),
        {"images": "a.png", **said("Hi", "Yo")},
    ]
    bad = [said("Hi", "Ho", Image="a.png", id="x"), said([{"type": "audio"}], id="y")]
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "all.json").write_text(json.dumps([*good, *bad]))
    assert [record.get("image") for record in load_records(tmp_path / "all.json")][:2] == ["a.png"] * 2

    class Args:
        data_path, image_folder = str(tmp_path / "all.json"), str(tmp_path)

    with pytest.raises(LlavaError) as error:
        read_records(Args, version="qwen_1_5", refused={})
    first, second = str(error.value).split("\n")
    assert first.startswith(f"{Args.data_path}: record 3 (id 'x'): unknown key 'Image'") and "(and 1 more)" in first
    assert second.strip().startswith(f"{Args.data_path}: record 4 (id 'y'): turn 0, part 0: found type 'audio'")


# --- patches of a clip, chosen by a codec ---

_CODEC_KEYS = ("positions_thw", "patch_positions", "visible_indices", "visidx_thw", "Positions-THW", "visidx_thw.npy")


@pytest.mark.parametrize("key", _CODEC_KEYS)
def test_codec_data_are_never_plain_images(key):
    faults = [
        {"image": ["m0.jpg"] * 2, key: "p.npy", "conversations": talk("<image>\n<image>\nWhat?", "A cat.")},
        {"video": "v.mp4", key: [[0, 0, 1]], "conversations": TURNS},
        {key: "p.npy", "conversations": talk("What?", "A cat.")},
        {"images": ["m0.jpg"], key: "p.npy", "texts": [{"user": "What?", "assistant": "A cat."}]},
        said([PICTURE, text("What?")], "A cat.", **{key: "p.npy"}),
        said([{**PICTURE, key: "p.npy"}, text("What?")], "A cat."),
        said([{"type": "image_url", "image_url": {"url": "m0.jpg", key: "p.npy"}}, text("What?")], "A cat."),
        {"image": "m0.jpg", "conversations": [{**TURNS[0], key: "p.npy"}, TURNS[1]]},
        {"question_id": 1, "image": "m0.jpg", key: "p.npy", "text": "What?"},
    ]
    for record in faults:
        with pytest.raises(LlavaError, match=rf"{key}: found .*patches of a video that a codec chose") as caught:
            canonical(record)
        assert "\n" not in str(caught.value)
    for nothing in (None, "", []):  # a column of a table that has it for other rows
        record = {"image": "a.png", key: nothing, "conversations": TURNS}
        assert canonical(record) is record


def test_columns_that_only_sound_like_codec_data_stay():
    names = ("positions", "position", "patch", "visible", "index", "grid_thw", "frame_ids", "visual_ids")
    record = {"image": "a.png", "conversations": TURNS} | dict.fromkeys(names, "x")
    assert canonical(record) is record


def test_training_and_evaluation_refuse_codec_data(tmp_path):
    record = {"id": "c", "image": "m0.jpg", "positions_thw": "p.npy", "conversations": TURNS}
    (tmp_path / "train.json").write_text(json.dumps([record]))
    (tmp_path / "m0.jpg").write_bytes(b"")
    records = load_records(str(tmp_path / "train.json"))
    with pytest.raises(LlavaError, match=r"record 1 \(id 'c'\): positions_thw: found 'p\.npy'"):
        validate_records(records, version="qwen_1_5", image_folder=str(tmp_path))
    with pytest.raises(LlavaError, match=r"record c: positions_thw: found 'p\.npy'"):
        read_questions([record], "q.json", str(tmp_path), conv_templates["qwen_1_5"])
