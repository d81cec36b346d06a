"""Small sharded collections, one per operation and sharding type, and the losses of a few steps of each."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed import sharding_plan
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType

from tests.single_tables import collection_of, plain_table, table_of
from torchrec_qr import (
    ChineseRemainder,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
    get_default_sharders,
)

WORLD_SIZE, RANKS_PER_NODE = 4, 2
NUM_IDS, DIM = 203, 16
STEPS, SAMPLES = 5, 6  # SAMPLES a rank
OPERATIONS = ("mult", "add", "concat", "path")
SEQUENCE_SHARDINGS = ("table_wise", "column_wise", "row_wise", "data_parallel")
POOLED_SHARDINGS = ("unsharded", *SEQUENCE_SHARDINGS, "table_row_wise")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": EmbOptimType.EXACT_SGD},
    "adagrad": {"optimizer": EmbOptimType.EXACT_ADAGRAD},
    "rowwise_adagrad": {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD},
    "adam": {"optimizer": EmbOptimType.ADAM},
    "amsgrad": {"optimizer": EmbOptimType.ADAM, "amsgrad": True},
}


@dataclass(frozen=True)
class Cell:
    """A collection whose tables share operation, sharding type and optimizer."""

    operation: str
    sharding: str
    optimizer: str = "adagrad"
    pooled: bool = True
    weighted: bool = False

    def __str__(self) -> str:
        kind = "pooled" if self.pooled else "sequence"
        return " ".join([kind, self.operation, self.sharding, self.optimizer, *(["weighted"] if self.weighted else [])])


def cells() -> list[Cell]:
    """All operations and sharding types, then the optimizers and the ids' weights under every sharding type."""
    pooled = [Cell(o, s) for o in OPERATIONS for s in POOLED_SHARDINGS]
    sequences = [Cell(o, s, pooled=False) for o in OPERATIONS for s in SEQUENCE_SHARDINGS]
    optimizers = [Cell("mult", s, o) for o in OPTIMIZERS if o != "adagrad" for s in POOLED_SHARDINGS[1:]]
    weighted = [Cell("add", s, weighted=True) for s in POOLED_SHARDINGS]
    # The MLPs of a path cannot be cut by columns.
    return [
        c for c in pooled + sequences + optimizers + weighted if (c.operation, c.sharding) != ("path", "column_wise")
    ]


def tables_of(cell: Cell) -> list[Any]:
    """Returns three compositional tables, of which one has two features, and a plain one where FBGEMM can step it."""
    tables = [
        _table(cell, "strided", QuotientRemainder(num_collisions=7)),
        _table(cell, "radix", MixedRadix(sizes=[7, 6, 5]), pooling=PoolingType.MEAN, data_type=DataType.FP16),
        _table(cell, "remainder", ChineseRemainder(sizes=[16, 13]), feature_names=["f_remainder", "f_other"]),
    ]
    if cell.optimizer not in ("adam", "amsgrad"):
        tables.append(plain_table(cell.pooled, name="plain", num_embeddings=NUM_IDS, embedding_dim=DIM))
    return tables


def _table(cell: Cell, name: str, partitions: Any, pooling: Any = PoolingType.SUM, **fields: Any) -> Any:
    fields = {"name": name, "num_embeddings": NUM_IDS, "embedding_dim": DIM, "operation": cell.operation, **fields}
    if cell.operation == "path":
        fields["path_hidden"] = 3
    if cell.pooled:
        fields["pooling"] = pooling
    return table_of(partitions, cell.pooled, **fields)


def losses(rank: int, world_size: int) -> dict[str, list[float]]:
    """Returns this rank's loss at each step of each cell. All ranks call it, in a process group."""
    return {str(cell): _losses_of(cell, rank) for cell in cells()}


def _losses_of(cell: Cell, rank: int) -> list[float]:
    tables = tables_of(cell)
    initial = collection_of(tables, "cpu", cell.weighted)
    _fill(initial, (-0.4, 0.4) if cell.operation == "path" else (0.5, 1.5))
    if cell.sharding == "unsharded":
        model: nn.Module = _Model(initial, tables)
        optimizer: Any = torch.optim.Adagrad(model.parameters(), lr=0.05, eps=1e-6)
    else:
        model = _sharded(cell, tables, initial)
        optimizer = model.fused_optimizer
    out = []
    for step in range(STEPS):
        optimizer.zero_grad()
        # The loss is in fp64, so that one bit of one value moves it.
        loss = (model(_batch(tables, cell.weighted, 100 * step + rank)).double() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def _fill(module: nn.Module, bounds: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(*bounds, generator=generator))


class _Model(nn.Module):
    """The outputs of all features in one tensor, in the order of the tables, whatever the plan."""

    def __init__(self, collection: nn.Module, tables: list[Any]) -> None:
        super().__init__()
        self.collection = collection
        self._features = _features(tables)
        self._pooled = isinstance(tables[0], EmbeddingBagConfig)

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        out = self.collection(batch)
        if self._pooled:
            return KeyedTensor.regroup([out], [self._features])[0]
        return torch.cat([out[feature].values().reshape(-1) for feature in self._features])


def _sharded(cell: Cell, tables: list[Any], initial: nn.Module) -> DistributedModelParallel:
    fused = {**OPTIMIZERS[cell.optimizer], "learning_rate": 0.05, "eps": 1e-6}
    ours: Any = (
        CompositionalEmbeddingBagCollectionSharder(fused_params=fused)
        if cell.pooled
        else CompositionalEmbeddingCollectionSharder(fused_params=fused)
    )
    model = _Model(collection_of(tables, "meta", cell.weighted), tables)
    generators = {table.name: _placement(cell.sharding, i, table) for i, table in enumerate(tables)}
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    plan = construct_module_sharding_plan(
        model.collection, generators, ours, local_size, dist.get_world_size(), device_type="cpu"
    )
    others = [sharder for sharder in get_default_sharders() if type(sharder) is not type(ours)]
    dmp = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"collection": plan}),
        sharders=[ours, *others],
    )
    dmp.load_state_dict({f"collection.{name}": value for name, value in initial.state_dict().items()})
    return dmp


def _placement(sharding: str, i: int, table: Any) -> Any:
    """Returns what makes the plan's entry of table number i; the kernel is the planner's choice."""
    if table.name == "plain":
        sharding = "table_wise"
    generator = {
        "table_wise": sharding_plan.table_wise(rank=i % WORLD_SIZE),
        "column_wise": sharding_plan.column_wise(ranks=[i % WORLD_SIZE, (i + 1) % WORLD_SIZE]),
        "row_wise": sharding_plan.row_wise(),
        "table_row_wise": sharding_plan.table_row_wise(host_index=i % (WORLD_SIZE // RANKS_PER_NODE)),
        "data_parallel": sharding_plan.data_parallel(),
    }[sharding]
    kernel = "dense" if sharding == "data_parallel" else "fused"
    return lambda *arguments: replace(generator(*arguments), compute_kernel=kernel)


def _features(tables: list[Any]) -> list[str]:
    return [feature for table in tables for feature in table.feature_names]


def _batch(tables: list[Any], weighted: bool, seed: int) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(seed)
    features = _features(tables)
    lengths = torch.randint(0, 4, (len(features) * SAMPLES,), generator=generator)
    ids = torch.randint(0, NUM_IDS, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(len(ids), generator=generator) if weighted else None
    return KeyedJaggedTensor(keys=features, values=ids, lengths=lengths, weights=weights)
