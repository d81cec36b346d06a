"""TorchRec's 2D parallelism, ``DMPCollection``: groups of ranks that shard the tables alike, and train apart.

``DMPCollection.sync()`` averages the tables over groups. It finds FBGEMM's kernels among the modules of lookups, and
reads their weights and the state ``sum`` of their optimizers. `SyncedTables` is such a module for partitions.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D, ShardingStrategy

from torchrec_qr.distributed.customized_kernel import is_fused
from torchrec_qr.distributed.fused_optimizer import RowOptimizer
from torchrec_qr.distributed.layout import shards_of
from torchrec_qr.distributed.stored_partition import StoredPartition

# The compute kernels of plain tables whose rows are where ``sync()`` averages them. A cache has newer ones.
_SYNCED = (EmbeddingComputeKernel.FUSED, EmbeddingComputeKernel.FUSED_UVM)
# The only state of an optimizer that ``sync()`` averages, and the optimizers of FBGEMM that have no other one.
_SUM = "sum"
_SUMMING = (
    *(EmbOptimType.EXACT_SGD, EmbOptimType.SGD),
    *(EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
)
# The modes in which these optimizers have other states too.
_COUNTING = (WeightDecayMode.COUNTER, WeightDecayMode.COWCLIP, WeightDecayMode.DECOUPLE_GLOBAL)


class SyncedTables(SplitTableBatchedEmbeddingBagsCodegen):
    """The tensors of compositional tables that ``sync()`` averages, in the form of FBGEMM's kernel.

    It is no kernel: it has no parameters, and ``DMPCollection`` alone calls it. Adam's number of steps is not averaged,
    because every group takes the same steps.

    Args:
        partitions (Sequence[StoredPartition]): the partitions of a lookup on this rank.
        optimizers (Sequence[RowOptimizer]): their optimizers.
    """

    def __init__(self, partitions: Sequence[StoredPartition], optimizers: Sequence[RowOptimizer]) -> None:
        # Do not call the constructor of FBGEMM's kernel, because it allocates tables.
        nn.Module.__init__(self)
        self._partitions, self._optimizers = partitions, optimizers

    def split_embedding_weights(self) -> list[Tensor]:
        """Returns the rows of all partitions."""
        return [p.weight.detach() for p in self._partitions if p.weight.numel()]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Returns all states, each under the only name that ``sync()`` reads."""
        return [{_SUM: state} for optimizer in self._optimizers for state in optimizer.states() if state.numel()]


def start_alike(weight: Tensor, env: ShardingEnv) -> None:
    """Gives a shard the values of the first group, because ``sync()`` would average different initial ones."""
    if isinstance(env, ShardingEnv2D) and weight.numel():
        dist.broadcast(weight.data, src=dist.get_global_rank(env.replica_pg, 0), group=env.replica_pg)


def check_ranks(plan: Mapping[str, ParameterSharding], env: ShardingEnv) -> None:
    """Refuses a plan for other ranks than those of a sharding group, under 2D parallelism.

    Raises:
        ValueError: a shard is on a rank outside of this rank's group.
    """
    if not isinstance(env, ShardingEnv2D):
        return
    group = dist.get_process_group_ranks(env.sharding_pg)
    for name, sharding in plan.items():
        ranks = {shard.placement.rank() for shard in shards_of(sharding) if shard.placement is not None}
        if not ranks <= set(group):
            raise ValueError(
                f"table {name!r}: shards on ranks {sorted(ranks, key=str)}, where the sharding group of DMPCollection "
                f"has the ranks {group}; allowed: a plan for {len(group)} ranks, as by a planner with a topology of "
                f"{len(group)} ranks"
            )


def check_tables(tables: Iterable[ShardedEmbeddingTable], env: ShardingEnv) -> None:
    """Refuses tables that groups would train apart, and ``sync()`` would not average, under 2D parallelism.

    Args:
        tables (Iterable[ShardedEmbeddingTable]): the shards on all ranks, so that all ranks raise.
        env (ShardingEnv): the ranks.

    Raises:
        NotImplementedError: the strategy is ``FULLY_SHARDED``; ``sync()`` passes over a compute kernel, or over a state
            of a plain table's optimizer.
    """
    if not isinstance(env, ShardingEnv2D):
        return
    for table in tables:
        params = table.fused_params or {}
        kernel, optimizer = table.compute_kernel, params.get("optimizer", EmbOptimType.EXACT_SGD)
        if env.sharding_strategy == ShardingStrategy.FULLY_SHARDED:
            raise NotImplementedError(
                f"table {table.name!r}: {env.sharding_strategy} of DMPCollection is not supported by collections of "
                f"torchrec_qr; allowed: {ShardingStrategy.DEFAULT}, {ShardingStrategy.PER_MODULE}"
            )
        is_plain = kernel != EmbeddingComputeKernel.CUSTOMIZED_KERNEL
        if kernel not in _SYNCED if is_plain else not is_fused(table):
            name = kernel.value if is_plain else EmbeddingComputeKernel.DENSE.value
            raise NotImplementedError(
                f"table {table.name!r}: compute kernel {name!r} is not supported under DMPCollection, whose sync() "
                f"does not average it; allowed: {', '.join(k.value for k in _SYNCED)}, or data_parallel"
            )
        decay = params.get("weight_decay_mode", WeightDecayMode.NONE)
        if is_plain and (optimizer not in _SUMMING or decay in _COUNTING):
            raise NotImplementedError(
                f"table {table.name!r}: optimizer={optimizer}, weight_decay_mode={decay.name} of a plain table is not "
                "supported under DMPCollection, whose sync() averages the sums of Adagrad alone; allowed: "
                f"{', '.join(map(str, _SUMMING))} without a mode that counts, or a "
                f"compositional table of one partition, MixedRadix(sizes=[{table.num_embeddings}])"
            )
