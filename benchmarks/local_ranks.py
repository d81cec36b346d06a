"""Starts the ranks of a benchmark on this machine, as torchrun would, each host of which may be a network namespace."""

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import SystemRandom

from benchmarks.bridged_hosts import Host

THIS_HOST = Host([], {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})


def run_ranks(
    command: Sequence[str],
    hosts: Sequence[Host],
    ranks_per_host: int,
    environment: Mapping[str, str] | None = None,
    capture: bool = False,
) -> tuple[int, str]:
    """Runs ``command`` as every rank, of one thread each; when one fails, the others end, as their connections close.

    Returns:
        The largest exit code, and what rank 0 printed if that is captured.
    """
    world_size = len(hosts) * ranks_per_host
    port = free_port()
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(world_size):
            host = hosts[rank // ranks_per_host]
            of_rank = {
                "OMP_NUM_THREADS": "1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world_size),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % ranks_per_host),
                "LOCAL_WORLD_SIZE": str(ranks_per_host),
            }
            out = subprocess.PIPE if capture and rank == 0 else None
            variables = {**os.environ, **(environment or {}), **host.environment, **of_rank}
            processes.append(subprocess.Popen([*host.prefix, *command], env=variables, stdout=out, text=True))
        printed, _ = processes[0].communicate()
        # A rank that a signal ended has a negative code.
        return max(abs(process.wait(timeout=60)) for process in processes), printed or ""
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    """Returns a port that is free, and that the system gives nobody who asks for any port in the meantime."""
    first_of_any = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in SystemRandom().sample(range(first_of_any - 8000, first_of_any), 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise AssertionError(f"100 ports below {first_of_any} are taken")
