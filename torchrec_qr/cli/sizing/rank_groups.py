"""The groups of ranks of 2D parallelism, each of which holds all tables once."""

from dataclasses import dataclass

from torchrec.distributed.planner.types import CollectiveType, Topology

from torchrec_qr.planner import Hardware
from torchrec_qr.planner.hardware import all_reduce_passes


@dataclass(frozen=True)
class RankGroups:
    """The groups of TorchRec's ``DMPCollection``: W ranks in W / N groups of N, so that there are W / N copies.

    The copies of a shard lie on consecutive ranks by default, and the ranks of a group lie W / N apart. With
    ``inter_host_allreduce`` the ranks of a group are consecutive.

    Args:
        world_size (int): W.
        local_world_size (int): the ranks of a node.
        group_size (int): N.
        inter_host_allreduce (bool): ``use_inter_host_allreduce`` of ``DMPCollection``.

    Raises:
        ValueError: N does not divide W, or the groups lie unevenly on the nodes.

    Example:
        >>> groups = RankGroups(world_size=32, local_world_size=8, group_size=16)  # [0, 2, …, 30] and [1, 3, …, 31]
        >>> groups.copies, groups.copies_per_node, groups.node_group_size
        (2, 2, 4)
        >>> groups = RankGroups(world_size=32, local_world_size=8, group_size=16, inter_host_allreduce=True)
        >>> groups.copies, groups.copies_per_node, groups.node_group_size  # [0, 1, …, 15] and [16, 17, …, 31]
        (2, 1, 8)
    """

    world_size: int
    local_world_size: int
    group_size: int
    inter_host_allreduce: bool = False

    def __post_init__(self) -> None:
        world, local, size = self.world_size, self.local_world_size, self.group_size
        if size < 1 or world % size:
            raise ValueError(f"--sharding-group-size {size}; allowed: a divisor of the {world} ranks")
        together = size if self.inter_host_allreduce else self.copies
        if local % together and together % local:
            what = "ranks of a group" if self.inter_host_allreduce else "copies"
            raise ValueError(
                f"--sharding-group-size {size}: {together} {what} lie unevenly on nodes of {local} ranks; allowed: a "
                f"size for which there are a divisor or a multiple of {local}"
            )

    @property
    def copies(self) -> int:
        """The groups, W / N."""
        return self.world_size // self.group_size

    @property
    def node_group_size(self) -> int:
        """The ranks of a group on one node, which is ``node_group_size`` of ``DMPCollection``."""
        if self.inter_host_allreduce:
            return min(self.group_size, self.local_world_size)
        return max(self.local_world_size // self.copies, 1)

    @property
    def copies_per_node(self) -> int:
        """The copies of a shard on one node."""
        return self.local_world_size // self.node_group_size

    def topology(self, hardware: Hardware, memory_gib: float | None = None) -> Topology:
        """Returns the ranks of one group."""
        return hardware.topology(self.group_size, self.node_group_size, memory_gib)

    def sync_ms(self, size: float, hardware: Hardware) -> float:
        """Returns the ms to average ``size`` bytes of a rank over all copies, as ``DMPCollection.sync`` does."""
        if self.copies == 1:
            return 0.0
        bandwidths = hardware.topology(self.copies, self.copies_per_node).comms_bandwidths
        bandwidth = bandwidths.get_bw(self.copies_per_node, self.copies, CollectiveType.ALL_REDUCE)
        return size * all_reduce_passes(self.copies, self.copies_per_node) / bandwidth
