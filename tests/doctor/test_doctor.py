"""What `python -m llava.doctor` says of whole and of broken machines."""

import http.server
import json
import os
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest

from llava.doctor import __main__ as doctor
from llava.doctor import accelerators, children, machine, packages, versions
from llava.doctor.rows import Row, private

ROOT = Path(__file__).parents[2]
BROKEN = {
    "broken_one": "raise ImportError('libcudart.so.11.0: cannot open shared object file')",
    "crashes_one": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "hangs_one": "import time\ntime.sleep(60)",
    "ends_one": "raise SystemExit(3)",
    "prints_one": "print('\\x1enot an answer' if False else 'words')",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on PYTHONPATH; write(name, text) puts a module there."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_a_package_that_ends_python_or_hangs_costs_one_line(modules):
    for name, text in BROKEN.items():
        modules(name, text)
    found = children.imports(["json", *BROKEN, "decimal"], seconds=5)
    assert found["json"] is found["decimal"] is found["prints_one"] is None
    assert found["broken_one"] == "ImportError: libcudart.so.11.0: cannot open shared object file"
    assert found["crashes_one"] == "ended by signal 11"
    assert found["hangs_one"] == "no answer in 5 seconds"
    assert found["ends_one"].startswith("SystemExit")


def test_torch_that_does_not_load_is_what_stops_a_run(modules):
    modules("torch", "raise OSError('libtorch_cpu.so: undefined symbol')")
    (row,) = accelerators.torch_rows(seconds=20)
    assert row.stops and "undefined symbol" in row.found and "pip install" in row.todo


def test_wrong_numbers_of_an_attention_are_broken():
    assert accelerators._attention("sdpa", [1e-6, True], None, False).status == "ok"
    for found in ([0.3, True], [0.0, False]):
        row = accelerators._attention("sdpa", found, None, False)
        assert row.stops and "numbers are wrong" in row.todo
    broken = accelerators._attention("flash_attention_2", None, "ImportError: undefined symbol", True)
    assert broken.status == "broken" and not broken.stops and "pip uninstall flash-attn" in broken.todo


FACTS = {"version": "2.13.0", "cuda": "13.0", "hip": None, "usable": False, "count": 0, "devices": [], "mps": False}


@pytest.mark.parametrize(
    ("driver", "visible", "facts", "status", "said"),
    [
        ("", None, {"cuda": None}, "missing", "none"),
        ("580.95", None, {"cuda": None}, "broken", "CPU build"),
        ("450.10", None, {"warnings": ["CUDA initialization: the driver is too old"]}, "broken", "too old"),
        ("580.95", "", {}, "note", "hidden by CUDA_VISIBLE_DEVICES"),
        ("580.95", None, {"usable": True, "devices": [["H100", 80e9, 79e9, "9.0", None]]}, "ok", "H100"),
        ("580.95", None, {"usable": True, "devices": [["H100", 80e9, 9e9, "9.0", None]]}, "note", "8.4 GiB free"),
        ("580.95", None, {"usable": True, "devices": [["K80", 8e9, 7e9, "3.7", "no kernel"]]}, "broken", "no kernel"),
    ],
)
def test_gpus(monkeypatch, driver, visible, facts, status, said):
    monkeypatch.setattr(accelerators, "_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (row,) = accelerators._devices(FACTS | {"warnings": []} | facts)
    assert row.status == status and said in row.found and not row.stops
    assert row.todo or status == "ok"


def test_versions_are_those_of_pyproject():
    want = versions.wanted()
    assert want.needed["torch"] == ">=2.11" and want.needed["transformers"] == ">=5.17,<6"
    assert want.extras["train"]["deepspeed"] == ">=0.19.8" and "llava" not in want.extras["test"]
    assert want.tested["torch"] == "2.13.0" and want.python == ">=3.11" and want.checkout


@pytest.mark.parametrize(
    ("version", "specifier", "right"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("5.23.0", ">=5.17,<6", True),
        ("6.0", ">=5.17,<6", False),
        ("4.40.2", ">=5.17,<6", False),
        ("2.14.0.dev20260101", ">=2.11", True),
        ("0.7.3", "==0.7.3", True),
        ("0.7.3.1", "==0.7.*", True),
        ("3.11.7", ">=3.11", True),
        ("3.9.2", ">=3.11", False),
        ("1.4.2", "~=1.4.1", True),
        ("1.5", "~=1.4.1", False),
        ("1.0", "", True),
        ("1.0", "!=1.0.0", False),
    ],
)
def test_version_specifiers(version, specifier, right):
    assert versions.fits(version, specifier) is right


def test_packages(monkeypatch):
    there = {"torch": "2.5.0", "transformers": "5.23.0", "numpy": "2.4.6", "peft": "0.21.2"}
    monkeypatch.setattr(packages, "installed", there.get)
    monkeypatch.setattr(packages, "imports", lambda names, seconds: {"numpy": "ImportError: numpy.core"})
    want = versions.Wanted(
        needed={"torch": ">=2.11", "transformers": ">=5.17,<6", "numpy": "", "pillow": ""},
        extras={"train": {"peft": ">=0.18", "deepspeed": ""}, "timm": {"timm": ""}},
        tested={"peft": "0.20.0"},
        checkout=True,
    )
    rows = {row.name: row for row in packages.package_rows(want, 5)}
    assert {name for name, row in rows.items() if row.stops} == {"torch", "numpy", "pillow"}
    assert rows["torch"].found == "2.5.0, expected >=2.11" and "numpy.core" in rows["numpy"].found
    assert rows["transformers"].status == "ok" and "tested with 0.20.0" in rows["peft"].found
    assert "'.[train]' (for ZeRO" in rows["deepspeed"].todo and "environment of its own" in rows["timm"].todo


@pytest.mark.parametrize("lmms_eval", (None, "0.7.3"))
def test_a_pin_for_another_package_is_told_beside_it_alone(monkeypatch, lmms_eval):
    there = {"filelock": "4.3.1", "lmms-eval": lmms_eval}
    monkeypatch.setattr(packages, "installed", there.get)
    monkeypatch.setattr(packages, "imports", lambda names, seconds: {})
    want = versions.Wanted(extras={"lmms-eval": {"lmms-eval": "==0.7.3", "filelock": "<4"}})
    rows = {row.name: row.status for row in packages.package_rows(want, 5)}
    assert rows.get("filelock") == (lmms_eval and "broken")


def test_another_llava_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert machine.llava_rows(20)[0].status == "ok"
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = machine.llava_rows(20)
    assert row.status == "broken" and str(tmp_path) in row.found and "PYTHONPATH" in row.todo


def test_disks(tmp_path, monkeypatch):
    assert machine._disk("runs", str(tmp_path / "a/b"), "elsewhere").status in ("ok", "note")
    (tmp_path / "file").touch()
    assert machine._disk("runs", str(tmp_path / "file/out"), "elsewhere").found
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Namespace(free=2**20, total=2**40))
    row = machine._disk("runs", str(tmp_path), "elsewhere", needed=True)
    assert row.stops and row.todo == "elsewhere"


def test_nothing_private_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "node17")
    assert private("/home/ada/x, /home/bob/y and /data/ada/z on node17") == "~/x, ~/y and /data/USER/z on HOST"
    assert private("a\nb  hf_abcdefghijklmnop https://me:pw@mirror/x") == "a b (secret) https://mirror/x"
    assert private("the canada model, /home/adam") == "the canada model, ~"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_SOMETHING_SECRET", "MASTER_ADDR", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "private-value")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OTHER_THING", "x")
    shown = machine.variables()
    assert shown["NCCL_DEBUG"] == "INFO" and shown["HF_TOKEN"] == "(set)" and "OTHER_THING" not in shown
    assert "private-value" not in json.dumps(shown)
    token = tmp_path / "token"
    token.write_text("hf_thetokenitself1234")
    monkeypatch.setenv("HF_TOKEN_PATH", str(token))
    rows = machine.hub_rows(network=False, seconds=1)
    assert "there is one" in rows[1].found and "thetoken" not in str(rows)


class _Hub(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_HEAD(self):
        type(self).asked += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass


def test_the_hub_is_asked_only_on_request(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "--network" in machine.hub_rows(network=False, seconds=5)[-1].todo and _Hub.asked == 0
    assert machine.hub_rows(network=True, seconds=5)[-1].status == "ok" and _Hub.asked == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in machine.hub_rows(network=True, seconds=5)[-1].todo and _Hub.asked == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server.shutdown()
    server.server_close()
    assert machine.hub_rows(network=True, seconds=2)[-1].status == "broken"


def report(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=300, **options)


def test_without_any_package_it_says_what_is_missing(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = report("-S", "-m", "llava.doctor", "--output", str(tmp_path), env=env | {"HF_TOKEN": "hf_mysecrettoken99"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith("llava doctor: no run can start: PyTorch runs, torch,")
    line = next(line for line in done.stdout.splitlines() if " transformers " in line)
    assert line.split()[:2] == ["MISSING", "transformers"] and "-> pip install" in line
    assert "mysecrettoken" not in done.stdout


def test_this_machine_can_train(tmp_path):
    """Which runs these tests, so that a run can start."""
    done = report("-m", "llava.doctor", "--json", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert (
        found["schema"] == 1 and found["can_start"] and set(found["rows"]) == {"machine", "PyTorch", "packages", "hub"}
    )
    rows = {row["name"]: row for group in found["rows"].values() for row in group}
    assert rows["attention sdpa"]["status"] == rows["attention varlen"]["status"] == rows["torch"]["status"] == "ok"
    for row in rows.values():
        assert "\n" not in row["found"] + row["todo"]
        assert row["todo"] or row["status"] not in ("missing", "broken")


def test_text():
    rows = [
        Row("torch", "missing", "not installed", "pip", True),
        Row("av", "missing", "no", "pip"),
        Row("x", "ok", "1"),
    ]
    found = {"can_start": False, "rows": {"packages": [row.public() for row in rows]}, "variables": {}}
    text = doctor.text(found)
    assert text.splitlines()[0] == "llava doctor: no run can start: torch (needed) missing or broken"
    assert "  MISSING  torch  not installed  -> pip" in text and "  missing  av     no  -> pip" in text
    assert "optional things" in doctor.text(found | {"can_start": True})


def test_help_is_quick():
    done = report("-X", "importtime", "-m", "llava.doctor", "--help")
    assert done.returncode == 0 and "--network" in done.stdout
    assert not any(f" {name}" in done.stderr for name in ("torch", "transformers", "numpy", "llava.config"))
