"""Two machines in one: each node has a network, a hostname, processes and a /dev/shm of its own, and dies as a whole.

    with Nodes() as nodes:
        first = nodes.start(0, ["bash", "-c", "..."], environment)
        nodes.kill(first)  # SIGKILL of everything that runs on it

The nodes reach each other over a veth pair, at `nodes.addresses`, and see the same files. As on many a machine, the
hostname of a node is its own loopback address. Needs root, `ip` (iproute2) and `unshare` (util-linux).
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERFACE = "link0"
_numbers = itertools.count()

# What a node does before it runs its command. Its files are those of the machine but for these.
_BOOT = """
set -e
mount -t tmpfs none /dev/shm
mount --bind "$1" /etc/hosts
hostname "$2"
shift 2
exec "$@"
"""


def why_not() -> str | None:
    """Why there can be no nodes on this machine; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"no `{tool}` (package {package})"
    try:
        with Nodes() as nodes:
            done = nodes.start(0, ["true"], dict(os.environ), stderr=subprocess.PIPE)
            said = done.communicate(timeout=60)[1]
            return None if done.returncode == 0 else f"a node cannot be made here: {said.decode().strip()}"
    except subprocess.CalledProcessError as error:
        return f"a network namespace cannot be made here: {error.stderr.strip()}"


class Nodes:
    """Two nodes, as a context; what still runs on them is killed at its end."""

    def __init__(self):
        number = next(_numbers)
        self.names = [f"llava-{os.getpid()}-{number}-{node}" for node in range(2)]
        self.addresses = ["10.213.7.1", "10.213.7.2"]
        self.running: list[subprocess.Popen] = []

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="nodes")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            link = [
                "link",
                "add",
                INTERFACE,
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                second,
            ]
            _ip(*link)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    _ip("-n", name, "link", "set", interface, "up")
        except subprocess.CalledProcessError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for process in self.running:
            self.kill(process)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        self.folder.cleanup()

    def start(self, node: int, command: list[str], environment: dict, **options) -> subprocess.Popen:
        """Run a command as all that runs on a node, which lives as long as the command does."""
        hosts = Path(self.folder.name) / f"hosts{node}"
        links = "".join(f"{address} link-of-node{other}\n" for other, address in enumerate(self.addresses))
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{node}\n{links}")  # no name server can be asked
        own = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
        boot = ["bash", "-c", _BOOT, "boot", str(hosts), f"node{node}"]
        words = ["ip", "netns", "exec", self.names[node], *own, *boot, *command]
        process = subprocess.Popen(words, env=environment, start_new_session=True, **options)
        self.running.append(process)
        return process

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL of everything that runs on the process's node; the kernel ends what a first process leaves behind."""
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()

    def unplug(self, node: int) -> None:
        """Take the cable out: nothing that is sent arrives any more, and nobody is told."""
        _ip("-n", self.names[node], "link", "set", INTERFACE, "down")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def launch(nodes: Nodes, node: int, flags: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """Start a node's part of a training run, as a user does: by scripts/finetune.sh with one process on the CPU.

    Args:
        flags: a config and the keys of the run.
        log: a file to which what the node prints is added.
        variables: of the environment, beside the node's number, and its head's address and port.
    """
    own = {"NUM_PROCS": "1", "NNODES": "2", "RANK": str(node), "ADDR": nodes.addresses[0], "PORT": "29500"}
    own |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        words = ["bash", str(ROOT / "scripts/finetune.sh"), *flags]
        return nodes.start(node, words, {**os.environ, **own, **variables}, stdout=file, stderr=subprocess.STDOUT)
