"""constraints.txt can be installed with every Python that the scripts may take: a dry run that asks the package index.

With uv in PATH for all of them, else by the pip of each Python that is here.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = sorted(set(re.findall(r"python(3\.\d+)", (ROOT / "scripts/common.sh").read_text())))
WHEELS = ["--only-binary", ":all:", "--no-binary", "deepspeed"]  # which is published as source alone


def resolver(version: str) -> list[str]:
    """The command that resolves the project's requirements for this Python and prints what it would install."""
    if uv := shutil.which("uv"):
        extras = ["--extra", "train", "--extra", "demo", "--extra", "test"]
        return [
            uv,
            "pip",
            "compile",
            "--python-version",
            version,
            *WHEELS,
            *extras,
            "-c",
            "constraints.txt",
            "pyproject.toml",
        ]
    python = f"python{version}"
    if (
        shutil.which(python) is None
        or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
    ):
        pytest.skip(f"neither uv nor {python} with pip in PATH")
    flags = ["--dry-run", "--ignore-installed", "--disable-pip-version-check"]
    return [python, "-m", "pip", "install", *flags, *WHEELS, "-c", "constraints.txt", "-e", ".[train,demo,test]"]


@pytest.mark.parametrize("version", PYTHONS)
def test_constraints_resolve(version):
    done = subprocess.run(resolver(version), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, pinned in re.findall(
        r"^(torch|transformers|numpy|scikit-learn)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M
    ):
        assert re.search(rf"\b{name}(==|-){re.escape(pinned)}", done.stdout), done.stdout[-3000:]
