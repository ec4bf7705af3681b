"""How the nodes of a run reach each other: `python -m llava.train.nodes HEAD PORT`, which scripts ask on every node.

A node's name often stands for its loopback address, where the other nodes cannot find it. What does not mislead is the
way that the kernel would send a packet to the head node.
"""

import argparse
import ipaddress
import socket

from llava.errors import LlavaError, report_errors


def way_to(head: str, port: int) -> tuple[str, str]:
    """This node's address and network interface on the way to the head node; the interface is "" where it has no name.

    Raises:
        LlavaError: there is no way there, or no such name.
    """
    import psutil

    try:
        kind, _, _, _, target = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect(target)
            address = probe.getsockname()[0]
    except OSError as error:
        raise LlavaError(f"ADDR={head}: {error}, expected the first node's name or address") from None
    if ipaddress.ip_address(address).is_loopback and head not in (address, "localhost"):
        return head, ""  # the head node itself, which calls its loopback by the name that the others know it by
    for interface, held in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in held):
            return address, interface
    return address, ""


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Print this node's address and interface on the way to the head node.")
    parser.add_argument("head", help="name or address of the first node")
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    print(*way_to(args.head, args.port))


if __name__ == "__main__":
    main()
