"""Plans with one copy of a table per node, which the ranks of the node share."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.sharding_plan import ParameterShardingGenerator
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardingEnv2D,
    ShardingType,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from torchrec_qr.configs import is_compositional
from torchrec_qr.distributed.node_env import ranks_of_node

_SUFFIX = "_per_node"
_WITHIN = (ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value, ShardingType.ROW_WISE.value)
# The sharding types of tables of which each node has a copy.
PER_NODE = tuple(f"{within}{_SUFFIX}" for within in _WITHIN)


def per_node(within: ParameterShardingGenerator) -> ParameterShardingGenerator:
    """Returns a generator for ``construct_module_sharding_plan``: one copy of a table per node, sharded within it.

    Ids and embeddings of the table stay within a node. Each step sums the gradients of rows over the nodes, so that
    the table trains as under any other plan. Let n nodes have L ranks each, and let rank r of node k compute the
    gradient g of a row. The row steps by

        (1 / (n·L)) · Σ_{k < n} Σ_{r < L} g_{k,r}

    A checkpoint has the same keys as under any other plan. Process groups are those of TorchRec's table-row-wise
    sharding, so that L is ``LOCAL_WORLD_SIZE``.

    Args:
        within (ParameterShardingGenerator): TorchRec's ``table_wise``, ``column_wise`` or ``row_wise``. Its ranks are
            those of a node, 0 to L - 1.

    Returns:
        ParameterShardingGenerator: a generator of entries for compositional tables with a fused optimizer.

    Raises:
        ValueError: when the generator is called for ``within`` of another sharding type, or with a rank of L or more.

    Example:
        >>> import torch
        >>> from torchrec.distributed.sharding_plan import row_wise
        >>> from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder, per_node
        >>> generate = per_node(row_wise())
        >>> entry = generate(torch.nn.Parameter(torch.empty(6, 8)), 2, 4, "cpu",
        ...                  CompositionalEmbeddingBagCollectionSharder())
        >>> entry.sharding_type, entry.ranks, [shard.shard_sizes for shard in entry.sharding_spec.shards]
        ('row_wise_per_node', [0, 1], [[3, 8], [3, 8]])
    """

    def generate(
        param: nn.Parameter, local_size: int, world_size: int, device_type: str, sharder: Any
    ) -> ParameterSharding:
        sharding = within(param, local_size, local_size, device_type, sharder)
        if sharding.sharding_type not in _WITHIN:
            raise ValueError(
                f"per_node: {sharding.sharding_type} within a node; allowed: {', '.join(_WITHIN)}, and plain "
                "data_parallel for a copy per rank"
            )
        _check_ranks("per_node", sharding, local_size)
        return replace(sharding, sharding_type=f"{sharding.sharding_type}{_SUFFIX}")

    return generate


def is_per_node(sharding_type: str) -> bool:
    """Returns whether each node has a copy of the tables of a sharding type."""
    return sharding_type in PER_NODE


def within_node(sharding_type: str) -> str:
    """Returns TorchRec's sharding type of the ranks of a node, or of all ranks if there is no copy per node."""
    return sharding_type.removesuffix(_SUFFIX) if is_per_node(sharding_type) else sharding_type


def on_own_node(
    plan: dict[str, ParameterSharding], env: ShardingEnv, configs: Iterable[BaseEmbeddingConfig]
) -> dict[str, ParameterSharding]:
    """Returns a copy of a plan in which the copies of tables lie on the ranks of this rank's node.

    Their ``ranks`` stay those of a node, for TorchRec's sharding of the node. The placements of shards, from which a
    checkpoint is made, get ranks of all nodes.

    Args:
        plan (dict[str, ParameterSharding]): the plan of a collection.
        env (ShardingEnv): the ranks.
        configs (Iterable[BaseEmbeddingConfig]): the tables of the collection.

    Raises:
        NotImplementedError: a table with a copy per node is plain, or sharded by columns without pooling, or the
            environment is of a part of the ranks, or has ``output_dtensor=True``.
        ValueError: a rank is none of a node, or nodes differ in their number of ranks.
    """
    names = [name for name, sharding in plan.items() if is_per_node(sharding.sharding_type)]
    if not names:
        return plan
    world_size, of_name = dist.get_world_size(), {config.name: config for config in configs}
    if isinstance(env, ShardingEnv2D) or env.process_group is None or env.process_group.size() != world_size:
        raise NotImplementedError(
            f"tables {names}: a copy per node in a sharding environment of a part of the ranks, as of DMPCollection, "
            "is not supported; allowed: DistributedModelParallel of all ranks"
        )
    if env.output_dtensor:
        raise NotImplementedError(
            f"tables {names}: a copy per node with output_dtensor=True of the sharding environment is not supported, "
            "because a DTensor has one mesh of all ranks; allowed: False"
        )
    local_size = ranks_of_node()
    if world_size % local_size:
        raise ValueError(
            f"tables {names}: a copy per node on {world_size} ranks with LOCAL_WORLD_SIZE={local_size}; allowed: nodes "
            "of as many ranks each"
        )
    for name in names:
        _check_table(of_name[name], plan[name])
        _check_ranks(f"table {name!r}", plan[name], local_size)
    first = env.rank // local_size * local_size
    return {name: _moved(of, first) if name in names else of for name, of in plan.items()}


def _check_table(config: BaseEmbeddingConfig, sharding: ParameterSharding) -> None:
    name, kind = config.name, sharding.sharding_type
    if not is_compositional(config):
        raise NotImplementedError(
            f"table {name!r}: {kind} of a plain table is not supported, because TorchRec's kernels step its rows by "
            "the gradients of one node; allowed: compositional tables, such as one of one partition, "
            "MixedRadix(sizes=[num_embeddings])"
        )
    if not isinstance(config, EmbeddingBagConfig) and within_node(kind) == ShardingType.COLUMN_WISE.value:
        raise NotImplementedError(
            f"table {name!r}: {kind} without pooling is not supported; allowed: table_wise{_SUFFIX}, row_wise{_SUFFIX}"
        )


def _check_ranks(what: str, sharding: ParameterSharding, local_size: int) -> None:
    ranks = sharding.ranks or []
    if any(not 0 <= rank < local_size for rank in ranks):
        raise ValueError(f"{what}: ranks {ranks} of a node; allowed: 0 to {local_size - 1}, whatever the node")


def _moved(sharding: ParameterSharding, first: int) -> ParameterSharding:
    """Returns an entry whose placements are on the node that begins with rank ``first``."""
    spec = sharding.sharding_spec
    assert isinstance(spec, EnumerableShardingSpec)
    shards = []
    for shard in spec.shards:
        placement = shard.placement
        assert isinstance(placement, _remote_device)
        rank = placement.rank()
        assert rank is not None
        placement = _remote_device(f"rank:{first + rank}/{placement.device()}")
        shards.append(ShardMetadata(list(shard.shard_offsets), list(shard.shard_sizes), placement))
    return replace(sharding, sharding_spec=EnumerableShardingSpec(shards))
