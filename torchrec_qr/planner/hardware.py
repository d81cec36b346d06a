"""The constants of a machine that estimates use: one table, with the source of each entry."""

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torchrec.distributed.planner.types import (
    CollectiveType,
    GeneralizedCommsBandwidth,
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

_GB = 1e9 / 1e3  # bytes per ms of a GB/s, the unit of TorchRec's planner
GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """The device of a rank, its links to other ranks, and the cost factors of its kernels and collectives.

    Args:
        name (str): the name by which `hardware_named` finds it.
        compute_device (str): TorchRec's name of the device, ``"cpu"`` or ``"cuda"``.
        memory_gib (float): a rank's memory for tables.
        memory_gb_s (float): the bandwidth at which lookups read that memory.
        l2_mib (float): the cache that holds partitions while they are looked up. With 0, rows are read from memory.
        intra_gb_s (float): the bandwidth of a rank to the others of its node, each way.
        inter_gb_s (float): the bandwidth of a rank to other nodes, each way.
        overlap_mib (float): the largest message of an all-to-all that a rank sends while it receives. gloo sends larger
            messages first and receives afterwards.
        scatters_whole (bool): whether a reduce-scatter is an all-reduce of which each rank keeps a part, as in gloo.
        sharding_ms (float): ms for a sharding type of a module that sends embeddings, whatever the bytes: four or more
            collectives, and their preparation.
        replication_ms (float): ms to reduce the replicas of a sharding type, whatever the bytes.
        lookup_factor (float): the cost of a byte that a compositional lookup reads, relative to a plain one.
        concat_factor (float): bytes moved per byte of pooled output, if several sharding types share a module: the
            forward concatenates their columns, and the backward splits the gradient.
        replica_factor (float): bytes moved per byte of a replica's gradient, to fill, reduce, scan and apply it.
        replica_ms (float): ms for each replica, whatever its bytes, because its gradient is reduced and applied alone.
        shard_ms (float): ms for each shard of a compositional table, whatever its bytes, if no kernel looks up all.
        source (str): the source of the figures.

    Example:
        >>> from dataclasses import replace
        >>> from torchrec_qr.planner import hardware_named
        >>> replace(hardware_named("h100"), name="pcie", intra_gb_s=32.0).topology(4).intra_host_bw  # bytes per ms
        32000000.0
    """

    name: str
    compute_device: str
    memory_gib: float
    memory_gb_s: float
    l2_mib: float
    intra_gb_s: float
    inter_gb_s: float
    overlap_mib: float
    scatters_whole: bool
    sharding_ms: float
    replication_ms: float
    lookup_factor: float
    concat_factor: float
    replica_factor: float
    replica_ms: float
    shard_ms: float
    source: str

    def topology(
        self, world_size: int, local_world_size: int | None = None, memory_gib: float | None = None
    ) -> Topology:
        """Returns TorchRec's topology of W such ranks.

        Args:
            world_size (int): W.
            local_world_size (int | None): the ranks of a node. Default: W.
            memory_gib (float | None): a rank's memory for tables. Default: that of the hardware.

        Raises:
            ValueError: there is no rank, the ranks do not fill their nodes, or the memory is not positive.

        Example:
            >>> topology = HARDWARE["h100"].topology(16, local_world_size=8)
            >>> topology.compute_device, topology.devices[0].storage.hbm // 2**30
            ('cuda', 80)
        """
        if world_size < 1:
            raise ValueError(f"world_size={world_size}; allowed: at least 1 rank")
        local = world_size if local_world_size is None else local_world_size
        if local < 1 or world_size % local:
            raise ValueError(f"local_world_size={local}; allowed: a divisor of world_size={world_size}")
        gib = self.memory_gib if memory_gib is None else memory_gib
        if not gib > 0:
            raise ValueError(f"memory_gib={gib}; allowed: above 0")
        memory = int(gib * GIB)
        bandwidths = LinkBandwidths(self.intra_gb_s * _GB, self.inter_gb_s * _GB, self.scatters_whole)
        on_cpu = self.compute_device == "cpu"
        memory_bw = self.memory_gb_s * _GB
        return TopologyFactory.create_topology(
            TrainerConfig(
                world_size=world_size,
                local_world_size=local,
                hbm_cap_bytes=None if on_cpu else memory,
                ddr_cap_bytes=memory if on_cpu else None,
            ),
            HardwareConfig(ddr_mem_bw=memory_bw) if on_cpu else HardwareConfig(hbm_mem_bw=memory_bw),
            KernelConfig(
                compute_device=self.compute_device,
                use_hardware_based_bandwidth=True,  # without it, the factory drops those given
                generalized_comms_bandwidths=bandwidths,
            ),
        )


class LinkBandwidths(GeneralizedCommsBandwidth):
    """Bandwidths with which TorchRec's formulas return the time of collectives over two kinds of links.

    TorchRec divides the bytes that all ranks receive of a shard by one bandwidth. Let there be W ranks, l of them on a
    node. (l-1)/W of the bytes take the links within a node, and (W-l)/W of them the links between nodes:

        ms = bytes · ((l-1)/W / intra + (W-l)/W / inter)

    An all-reduce is a ring within the node and one between nodes. The second takes 1/l of the bytes on each link:

        ms = bytes · (2(l-1)/l / intra + 2(h-1)/h / (l · inter)),  h = W/l
    """

    def __init__(self, intra_host_bw: float, inter_host_bw: float, scatters_whole: bool = False) -> None:
        self._intra, self._inter, self._scatters_whole = intra_host_bw, inter_host_bw, scatters_whole

    @property
    def intra_host_bw(self) -> float:
        return self._intra

    @property
    def inter_host_bw(self) -> float:
        return self._inter

    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float:
        world, local = world_size, min(local_world_size, world_size)
        hosts = world / local
        reduces = collective_type == CollectiveType.ALL_REDUCE
        if reduces or (self._scatters_whole and collective_type == CollectiveType.REDUCE_SCATTER):
            ms_per_byte = 2 * (local - 1) / local / self._intra + 2 * (hosts - 1) / hosts / (local * self._inter)
            if reduces:
                ms_per_byte /= all_reduce_passes(world, local)  # TorchRec multiplies by these
        else:
            ms_per_byte = (local - 1) / world / self._intra + (world - local) / world / self._inter
        return 1 / ms_per_byte if ms_per_byte else float("inf")

    def __str__(self) -> str:
        return f"LinkBandwidths: intra_host_bw={self._intra}, inter_host_bw={self._inter}"


def all_reduce_passes(world_size: int, local_world_size: int) -> float:
    """Returns the factor by which TorchRec multiplies a replicated table's bytes in an all-reduce."""
    nodes = min(world_size / local_world_size, 2)
    passes = (2 * nodes - 1) / nodes
    return passes * 2 if world_size > 2 * local_world_size else passes


_FUSED: dict[str, Any] = {
    "lookup_factor": 1.0,
    "concat_factor": 4.0,  # one read and one write, forward and backward
    "replica_factor": 9.22,  # TorchRec's factor for its own data-parallel tables
    "replica_ms": 0.0,
    "shard_ms": 0.0,
}
_COLLECTIVE_MS = 0.05
_NCCL: dict[str, Any] = {
    "overlap_mib": math.inf,
    "scatters_whole": False,
    "sharding_ms": 4 * _COLLECTIVE_MS,
    "replication_ms": _COLLECTIVE_MS,
}
_NVIDIA = "NVIDIA datasheet of the SXM module; network of the DGX system, one adapter per GPU; TorchRec's factors"

HARDWARE = MappingProxyType(
    {
        hardware.name: hardware
        for hardware in (
            # Measured by `python -m benchmarks.planner_estimates --calibrate`; see docs/planner.md.
            Hardware(
                name="cpu",
                compute_device="cpu",
                memory_gib=128.0,
                memory_gb_s=5.5,
                l2_mib=0.0,
                intra_gb_s=2.5,
                inter_gb_s=0.12,
                overlap_mib=0.7,
                scatters_whole=True,
                sharding_ms=3.5,
                replication_ms=3.2,
                lookup_factor=0.45,
                concat_factor=0.8,
                replica_factor=3.8,
                replica_ms=0.27,
                shard_ms=0.1,
                source="gloo on loopback, one thread per rank; between hosts 1 Gbit/s",
            ),
            # NVIDIA's papers on the Ampere and Hopper architectures give the caches. The H200 has the H100's chip.
            Hardware("a100", "cuda", 80.0, 2039.0, 40.0, 300.0, 25.0, source=_NVIDIA, **_NCCL, **_FUSED),
            Hardware("h100", "cuda", 80.0, 3350.0, 50.0, 450.0, 50.0, source=_NVIDIA, **_NCCL, **_FUSED),
            Hardware("h200", "cuda", 141.0, 4800.0, 50.0, 450.0, 50.0, source=_NVIDIA, **_NCCL, **_FUSED),
        )
    }
)

# The factors beside a topology that a user passes: its own bandwidths, the H100's cache, and no fixed costs, because
# TorchRec counts none.
_OF_TOPOLOGY = replace(
    HARDWARE["h100"],
    name="topology",
    sharding_ms=0.0,
    replication_ms=0.0,
    concat_factor=0.0,
    source="TorchRec's topology",
)


def hardware_named(name: str) -> Hardware:
    """Returns the hardware of a device by its name.

    Args:
        name (str): ``"cpu"``, ``"a100"``, ``"h100"`` or ``"h200"``.

    Raises:
        ValueError: the device is unknown.

    Example:
        >>> hardware_named("h200").memory_gib
        141.0
        >>> hardware_named("tpu")
        Traceback (most recent call last):
        ValueError: device 'tpu' is unknown; allowed: cpu, a100, h100, h200
    """
    if name not in HARDWARE:
        raise ValueError(f"device {name!r} is unknown; allowed: {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hardware_of(topology: Topology) -> Hardware:
    """Returns the factors for a topology of unknown hardware: those of `HARDWARE` on a CPU, else of fused kernels."""
    return HARDWARE["cpu"] if topology.compute_device == "cpu" else _OF_TOPOLOGY
