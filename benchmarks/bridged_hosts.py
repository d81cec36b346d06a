"""Hosts on one machine: network namespaces on a bridge, with links that can fail. Needs root and iproute2."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LINK = "eth0"


@dataclass(frozen=True)
class Host:
    """A host, on which ranks run.

    Args:
        prefix (list[str]): of a command that is to run there.
        environment (dict[str, str]): for gloo to find the other hosts.
    """

    prefix: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class BridgedHost(Host):
    """A network namespace.

    Args:
        namespace (str): its name.
        address (str): of its link.
    """

    namespace: str
    address: str

    def set_link(self, state: str) -> None:
        """Sets the link ``up`` or ``down``: for the other hosts it is gone too."""
        _run("ip", "-n", self.namespace, "link", "set", _LINK, state)

    def lose_link(self) -> None:
        """Deletes the interface, which never comes back."""
        _run("ip", "-n", self.namespace, "link", "delete", _LINK)

    def processes(self) -> list[int]:
        """Returns those that run there, in any namespace of processes."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).split()]


@contextmanager
def bridged_hosts(number: int, rate: str = "1gbit", retries: int = 15) -> Iterator[list[BridgedHost]]:
    """Yields hosts that see one another and nothing else. They are gone afterwards.

    Their names have this process's number, so several processes may have hosts at once.

    Args:
        number (int): of hosts.
        rate (str): that each can send at, as tc writes it.
        retries (int): after which TCP gives a connection up (``net.ipv4.tcp_retries2``): 15 make a quarter of an hour,
            6 make 25 seconds.

    Raises:
        RuntimeError: not root, or a command of iproute2 fails.
    """
    if os.geteuid() != 0:
        raise RuntimeError("hosts on one machine are network namespaces, which only root can make")
    bridge, *names = (f"{_own()}{i}" for i in range(number + 1))
    made = []
    try:
        for name in (bridge, *names):
            _run("ip", "netns", "add", name)
            made.append(name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "bridge", "up")
        yield [_joined(bridge, name, i, rate, retries) for i, name in enumerate(names)]
    finally:
        for name in made:  # with all interfaces in it
            _run("ip", "netns", "delete", name)


def namespaces_left() -> list[str]:
    """Returns the names of this process's hosts that are there."""
    return [name for line in _run("ip", "netns", "list").splitlines() if (name := line.split()[0]).startswith(_own())]


def _joined(bridge: str, name: str, number: int, rate: str, retries: int) -> BridgedHost:
    port, address = f"port{number}", f"10.99.0.{number + 1}"
    _run("ip", "-n", bridge, "link", "add", port, "type", "veth", "peer", "name", _LINK, "netns", name)
    _run("ip", "-n", bridge, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", _LINK)
    host = BridgedHost(
        ["ip", "netns", "exec", name], {"MASTER_ADDR": "10.99.0.1", "GLOO_SOCKET_IFNAME": _LINK}, name, address
    )
    host.set_link("up")
    _run(*host.prefix, "sh", "-c", f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")
    limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
    _run("tc", "-n", name, "qdisc", "add", "dev", _LINK, "root", *limit)
    return host


def _own() -> str:
    return f"qr-{os.getpid()}-"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
