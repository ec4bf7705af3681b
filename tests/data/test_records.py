import json

import pytest

from llava.data.records import load_records, sample_rows
from llava.errors import LlavaError


def write(path, count, first=0):
    records = [{"id": f"{path.stem}-{at}"} for at in range(first, first + count)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    else:
        path.write_text(json.dumps(records))
    return [record["id"] for record in records]


def ids(records):
    return [record["id"] for record in records]


def test_json_jsonl_and_braces(tmp_path):
    a, b = write(tmp_path / "a.json", 3), write(tmp_path / "b.json", 2)
    c = write(tmp_path / "c.jsonl", 4)
    assert ids(load_records(tmp_path / "a.json")) == a
    assert ids(load_records(tmp_path / "c.jsonl")) == c
    assert ids(load_records(f"{tmp_path}/{{b,a}}.json")) == b + a


def test_mixture(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.{'jsonl' if name == 'd' else 'json'}", 10)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        f"datasets:\n- json_path: {tmp_path}/a.json\n- json_path: b.json\n  sampling_strategy: first:25%\n"
        f"  image_folder: pictures\n"
        f"- json_path: {tmp_path}/c.json\n  sampling_strategy: end:2\n"
        f"- json_path: {tmp_path}/d.jsonl\n  sampling_strategy: random:50%\n"
    )
    records = load_records(mixture, seed=1)
    assert ids(records)[:15] == [f"a-{at}" for at in range(10)] + ["b-0", "b-1", "b-2", "c-8", "c-9"]
    assert len(records) == 20 and len(set(ids(records))) == 20
    assert ids(load_records(mixture, seed=1)) == ids(records)
    assert any(ids(load_records(mixture, seed=seed)) != ids(records) for seed in range(2, 5))
    assert records.part(11).image_folder == "pictures" and records.part(9).image_folder is None
    assert records.describe(13) == f"{tmp_path}/c.json: record 9 (id 'c-8')"


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        ("all", range(100)),
        ("first:7%", range(7)),
        ("first:0.5%", range(1)),
        ("first:1000", range(100)),
        ("end:0", range(100, 100)),
        ("end:3", range(97, 100)),
    ],
)
def test_sampling(strategy, rows):
    assert list(sample_rows(100, strategy, "seed")) == list(rows)


def test_random_sampling_takes_each_once():
    rows = sample_rows(100, "random:33%", "seed")
    assert len(set(rows)) == 33 and list(rows) == sorted(rows)
    assert rows == sample_rows(100, "random:33%", "seed") != sample_rows(100, "random:33%", "other")


@pytest.mark.parametrize("strategy", ["first", "some", "first:x", "first:1.5", "random:-3", "all:3", 7])
def test_bad_strategy(strategy):
    with pytest.raises(LlavaError, match="expected all, first:X"):
        sample_rows(100, strategy, "seed", "mix.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"id": 1},\n {"id": 2},\n {"id" 3}]', r"a\.json, line 3: found Expecting ':'"),
        ("a.jsonl", '{"id": 1}\n\n{"id": \n', r"a\.jsonl, line 3: found"),
        ("a.json", '{"id": 1}', "found dict, expected a list of records"),
        ("a.json", "[1]", "record 1: found int"),
        ("a.txt", "", "unknown kind of data file"),
        ("a.yaml", "datasets: [", r"a\.yaml, line 1: found"),
        ("a.yaml", "data: 3", "no list under 'datasets'"),
        ("a.yaml", "datasets:\n- path: x.json", "entry 1: found no json_path"),
        (
            "a.yaml",
            "datasets:\n- json_path: x.json\n  sampling: all",
            "unknown key 'sampling': did you mean 'sampling_",
        ),
        ("a.yaml", "datasets:\n- json_path: x.json\n  sampling_strategy: 5", "sampling_strategy: found 5"),
        ("a.yaml", "datasets:\n- json_path: missing.json", "missing.json: no such file"),
    ],
)
def test_bad_files_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(LlavaError, match=message) as error:
        load_records(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_and_not_utf8(tmp_path):
    with pytest.raises(LlavaError, match=r"none\.json: no such file"):
        load_records(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(LlavaError, match="not UTF-8"):
        load_records(tmp_path / "latin.json")
