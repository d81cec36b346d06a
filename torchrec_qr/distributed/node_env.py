"""The ranks of a node, and the ranks of other nodes that hold the same rows."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.comm import get_topology_group_world_size, intra_and_cross_node_pg
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.types import ShardingEnv


class Peers:
    """The ranks of all nodes with one local rank, in the order of the nodes, which hold copies of the same shards.

    Args:
        group (dist.ProcessGroup): their group.
        host_group (dist.ProcessGroup): a group of the same ranks for tensors on the host.
    """

    def __init__(self, group: dist.ProcessGroup, host_group: dist.ProcessGroup) -> None:
        self.group, self.host_group = group, host_group

    @property
    def num_nodes(self) -> int:
        """The number of copies."""
        return self.group.size()

    @property
    def divisor(self) -> int:
        """The divisor of the sum of the nodes' gradients.

        TorchRec's collectives have divided a gradient by the ranks of a node, unless gradient division is off.
        """
        return self.num_nodes if get_gradient_division() else 1

    def broadcast(self, values: Tensor) -> None:
        """Sends the values of the first node to the others."""
        dist.broadcast(values, src=dist.get_process_group_ranks(self.group)[0], group=self.group)


class NodeEnv(ShardingEnv):
    """The sharding environment of one node, whose tables are sharded among the node's ranks.

    Args:
        env (ShardingEnv): the environment of all ranks.
    """

    def __init__(self, env: ShardingEnv) -> None:
        assert env.process_group is not None
        within, across = intra_and_cross_node_pg(backend=dist.get_backend(env.process_group))
        assert within is not None
        assert across is not None
        # Pass no group, because TorchRec would make a device mesh of the first node's ranks.
        super().__init__(within.size(), within.rank(), None)
        self.process_group = within
        self.peers = Peers(across, _host_group(across, within.size()))


def ranks_of_node() -> int:
    """Returns how many ranks a node has, as TorchRec counts them."""
    size: int = get_topology_group_world_size(dist.get_world_size())
    return size


def node_env_of(env: Any) -> NodeEnv:
    """Returns the environment of this rank's node, made once for an environment of all ranks."""
    found: NodeEnv | None = getattr(env, _MADE, None)
    if found is None:
        found = NodeEnv(env)
        setattr(env, _MADE, found)
    return found


# The attribute of an environment that keeps the node's, because all ranks must make a process group together.
_MADE = "_torchrec_qr_node_env"


def _host_group(across: dist.ProcessGroup, local_size: int) -> dist.ProcessGroup:
    """Returns a group for host tensors: a new one of gloo if ``across`` is NCCL's."""
    if dist.get_backend(across) != "nccl":
        return across
    own = None
    for local_rank in range(local_size):
        ranks = list(range(local_rank, dist.get_world_size(), local_size))
        made = dist.new_group(ranks, backend="gloo")
        if dist.get_rank() in ranks:
            own = made
    assert own is not None
    return own
