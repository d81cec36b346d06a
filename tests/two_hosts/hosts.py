"""Two hosts on this one: network namespaces, joined by nothing but a link of 1 Gbit/s that can be cut."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_RATE = ("rate", "1gbit", "burst", "256kb", "latency", "50ms")


@dataclass(frozen=True)
class Host:
    """A network namespace, the interface in it and that one's address."""

    namespace: str
    interface: str
    address: str

    @property
    def within(self) -> tuple[str, ...]:
        """What runs a command in there."""
        return ("ip", "netns", "exec", self.namespace)

    def set_link(self, state: str) -> None:
        """Sets the link ``up`` or ``down``: for the other host it is gone too."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see one another and nothing else."""
    hosts = (
        Host(f"qr-{os.getpid()}-1", "v1", "10.99.0.1"),
        Host(f"qr-{os.getpid()}-2", "v2", "10.99.0.2"),
    )
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host)
        first, second = hosts
        peer = ("peer", "name", second.interface, "netns", second.namespace)
        _ip("link", "add", first.interface, "netns", first.namespace, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.set_link("up")
            _run("tc", "-n", host.namespace, "qdisc", "add", "dev", host.interface, "root", "tbf", *_RATE)
        yield hosts
    finally:
        for host in made:
            _ip("netns", "delete", host.namespace)


def _ip(*args: str) -> None:
    _run("ip", *args)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
