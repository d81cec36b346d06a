"""Two hosts on one machine: network namespaces joined by a link of 1 Gbit/s. Needs root and iproute2."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One end of the link.

    Args:
        prefix: of a command that is to run there.
        environment: for gloo to find the other end.
    """

    prefix: list[str]
    environment: dict[str, str]


@contextmanager
def two_hosts(rate: str = "1gbit") -> Iterator[list[Host]]:
    """Yields two hosts, whose names are this process's own; they are gone afterwards.

    Raises:
        RuntimeError: not root.
    """
    if os.geteuid() != 0:
        raise RuntimeError("two hosts on one machine are network namespaces, which only root can make")
    pid = os.getpid()
    names = [f"qr{pid}a", f"qr{pid}b"]
    links = [f"v{pid}a", f"v{pid}b"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            shape = ["qdisc", "add", "dev", link, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            subprocess.run(["ip", "netns", "exec", name, "tc", *shape], check=True)
        yield [
            Host(["ip", "netns", "exec", name], {"MASTER_ADDR": "10.99.0.1", "GLOO_SOCKET_IFNAME": link})
            for name, link in zip(names, links, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
