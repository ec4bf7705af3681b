"""playground/make_demo.py: made once for a seed, and anew where the seed or the programs are others."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, time
def make(output, seed):
    output.mkdir(exist_ok=True)
    with open(output.parent / "made", "a") as file:
        print({name!r}, seed, file=file)
    time.sleep(0.2)
    (output / "pretrain.json").write_text("[]")
"""


def test_made_once(tmp_path):
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "playground/make_demo.py")
    make_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_demo)
    make_demo.HERE = tmp_path
    for name in make_demo.PROGRAMS:
        (tmp_path / name).write_text(PROGRAM.format(name=name.removeprefix("make_demo_")))
    out, made = tmp_path / "demo", tmp_path / "made"
    assert make_demo.make(out, 3)
    (out / "image.png").touch()
    assert not make_demo.make(out, 3) and made.read_text() == "data.py 3\nmodel.py 3\n"
    assert make_demo.make(out, 4) and not (out / "image.png").exists()
    program = tmp_path / "make_demo_data.py"
    program.write_text(program.read_text() + "# changed\n")
    with ThreadPoolExecutor(3) as pool:  # of several at once, one makes it
        assert sorted(pool.map(lambda _: make_demo.make(out, 4), range(3))) == [False, False, True]
    assert len(made.read_text().splitlines()) == 6


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    words = [sys.executable, ROOT / "playground/make_demo.py", "--output", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "holds something other than the demo" in done.stderr
    assert (tmp_path / "thesis.tex").exists()
