"""A small model over a collection of tables of many kinds, and the same model sharded by a hand-written plan."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from ranks import device_of, own_device
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingPlan, ShardMetadata
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    HashPartition,
    QuotientRemainder,
)
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.partitions import PartitionSpec

SGD = EmbOptimType.EXACT_SGD
ADAGRAD = EmbOptimType.EXACT_ADAGRAD
ROWWISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD

NUM_IDS = 60
DIM = 24
SAMPLES = 8  # of a global batch, whatever the number of ranks
_GRID_CLASSES = torch.stack([torch.arange(NUM_IDS) * 37 % NUM_IDS % 12, torch.arange(NUM_IDS) * 37 % NUM_IDS // 12])


def table(
    name: str, partitions: PartitionSpec, operation: Any, num_embeddings: int = NUM_IDS, **fields: Any
) -> CompositionalEmbeddingBagConfig:
    """A compositional table of D=24, named after its only feature."""
    return CompositionalEmbeddingBagConfig(
        name=name,
        feature_names=[f"f_{name}"],
        num_embeddings=num_embeddings,
        embedding_dim=DIM,
        partitions=partitions,
        operation=operation,
        **fields,
    )


def tables() -> list[EmbeddingBagConfig]:
    """One table per kind of partitions and operation, a table of fewer rows than ranks, and a plain one."""
    return [
        table("strided_mult", QuotientRemainder(num_collisions=7), "mult"),
        table(
            "adjacent_add", QuotientRemainder(num_collisions=7, grouping="adjacent"), "add", pooling=PoolingType.MEAN
        ),
        table("half_mult", QuotientRemainder(num_collisions=5), "mult", data_type=DataType.FP16),
        table("crt_concat", ChineseRemainder(sizes=[5, 7, 3]), "concat", partition_dims=[12, 8, 4]),
        table("explicit_add", ExplicitPartitions(_GRID_CLASSES), "add"),
        table("explicit_path", ExplicitPartitions(_GRID_CLASSES), "path", path_hidden=3),
        table("hash_mult", HashPartition(rows=17), "mult"),
        table("tiny_mult", QuotientRemainder(num_collisions=3), "mult", num_embeddings=9),
        EmbeddingBagConfig(name="plain", feature_names=["f_plain"], num_embeddings=NUM_IDS, embedding_dim=DIM),
    ]


def two_tables() -> list[Any]:
    """Two tables alike, a and b."""
    return [table(name, QuotientRemainder(num_collisions=7), "mult") for name in ("a", "b")]


def sequence_table(name: str = "s", **fields: Any) -> CompositionalEmbeddingConfig:
    """A table of sequences of D=8, named after its only feature."""
    return CompositionalEmbeddingConfig(
        name=name,
        feature_names=[f"f_{name}"],
        num_embeddings=NUM_IDS,
        embedding_dim=8,
        partitions=QuotientRemainder(num_collisions=7),
        **fields,
    )


class Model(nn.Module):
    """KJT → (B, F·D), the features in the order of the tables whatever the plan, times a dense parameter."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.ebc = collection
        self.features = [f for t in collection.embedding_bag_configs() for f in t.feature_names]
        # Off the meta device already: nobody initialises a plain parameter for us.
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        return KeyedTensor.regroup([self.ebc(batch)], [self.features])[0] * self.scale


def unsharded(configs: list[EmbeddingBagConfig], seed: int = 1, is_weighted: bool = False) -> Model:
    """The model with values of order one, so that a wrong row or factor shows; the same on every rank."""
    model = Model(CompositionalEmbeddingBagCollection(tables=configs, is_weighted=is_weighted))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            low, high = (-0.3, 0.3) if "path.partition_" in name and "partition_0" not in name else (0.5, 1.5)
            if name != "scale":
                p.copy_(torch.empty(p.shape).uniform_(low, high, generator=generator))
    return model


def batch_of(configs: list[EmbeddingBagConfig], seed: int, rank: int, world_size: int, weighted: bool = False) -> Any:
    """This rank's samples of a global batch that the seed alone determines; bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(seed)
    mine = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
    values, lengths, weights = [], [], []
    for config in configs:
        sizes = torch.randint(0, 4, (SAMPLES,), generator=generator)
        ids = torch.randint(0, config.num_embeddings, (int(sizes.sum()),), generator=generator)
        of_ids = torch.rand(len(ids), generator=generator)
        values += ids.split(sizes.tolist())[mine]
        weights += of_ids.split(sizes.tolist())[mine]
        lengths.append(sizes[mine])
    return KeyedJaggedTensor(
        keys=[f for config in configs for f in config.feature_names],
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if weighted else None,
    ).to(own_device())


def placement(sharding: str, i: int, config: EmbeddingBagConfig, world_size: int) -> ParameterShardingGenerator:
    """How table number i lies under a sharding type; the tables' first ranks differ."""
    columns_split = sharding in ("column_wise", "grid_shard")
    if columns_split and getattr(config, "operation", None) == "path":
        sharding = "row_wise"
    if sharding == "row_wise" and not isinstance(config, CompositionalEmbeddingBagConfig):
        sharding = "table_wise"  # as the planner on a CPU, which has no row-wise plain tables
    if sharding in ("table_row_wise", "grid_shard") and not isinstance(config, CompositionalEmbeddingBagConfig):
        sharding = "column_wise"
    nodes = world_size // int(os.environ["LOCAL_WORLD_SIZE"])
    match sharding:
        case "table_wise":
            return table_wise(rank=i % world_size)
        case "column_wise":
            # Three shards of 8 columns over at most two ranks: one of them holds two, not neighbours.
            return column_wise(ranks=[i % world_size, (i + 1) % world_size, i % world_size])
        case "row_wise":
            return row_wise()
        case "table_row_wise":
            return table_row_wise(host_index=i % nodes)
        case "grid_shard":
            return grid_of(hosts=[(i + n) % nodes for n in range(nodes)])
    return data_parallel()


def grid_of(hosts: list[int]) -> ParameterShardingGenerator:
    """Grid shards, columns cut by host and rows by rank of it: TorchRec's own cuts no less than 128 columns."""

    def generate(param: nn.Parameter, local_size: int, *_: object) -> ParameterSharding:
        rows, columns = -(-param.shape[0] // local_size), param.shape[1] // len(hosts)
        shards = [
            ShardMetadata(
                shard_offsets=[row, block * columns],
                shard_sizes=[min(rows, param.shape[0] - row), columns],
                placement=f"rank:{host * local_size + i}/{device_of(host * local_size + i)}",
            )
            for block, host in enumerate(hosts)
            for i, row in enumerate(range(0, param.shape[0], rows))
        ]
        ranks = [s.placement.rank() for s in shards]
        return ParameterSharding("grid_shard", "fused", ranks, EnumerableShardingSpec(shards))

    return generate


def shard(
    configs: list[EmbeddingBagConfig],
    sharding: str | Mapping[str, ParameterShardingGenerator],
    optimizer: EmbOptimType = ADAGRAD,
    values: Model | None = None,
    is_weighted: bool = False,
    qcomm_codecs_registry: Any = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    **dmp_arguments: Any,
) -> DistributedModelParallel:
    """The model on all ranks, every table under one sharding type or each as given, with ``values`` loaded.

    ``wrap`` makes the module that is sharded from the model, its child ``model``.
    """
    collection = CompositionalEmbeddingBagCollection(
        tables=configs, device=torch.device("meta"), is_weighted=is_weighted
    )
    fused = {"optimizer": optimizer, "learning_rate": 0.05, "eps": 1e-4}
    sharder = CompositionalEmbeddingBagCollectionSharder(
        fused_params=fused, qcomm_codecs_registry=qcomm_codecs_registry
    )
    world_size = dist.get_world_size()
    if isinstance(sharding, str):
        sharding = {c.name: placement(sharding, i, c, world_size) for i, c in enumerate(configs)}
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    plan = construct_module_sharding_plan(
        collection, dict(sharding), sharder, local_size, world_size, own_device().type
    )
    path = "model." if wrap else ""
    model = DistributedModelParallel(
        wrap(Model(collection)) if wrap else Model(collection),
        device=own_device(),
        plan=ShardingPlan(plan={f"{path}ebc": plan}),
        sharders=[sharder, EmbeddingBagCollectionSharder(fused_params=fused)],
        **dmp_arguments,
    )
    if values is not None:
        model.load_state_dict({f"{path}{name}": value.clone() for name, value in values.state_dict().items()})
    return model


def train(model: nn.Module, configs: list[EmbeddingBagConfig], steps: range, weighted: bool = False) -> list[Tensor]:
    """Steps the fused optimizer on global batches that the step's number determines; returns the outputs."""
    outputs = []
    for step in steps:
        out = model(batch_of(configs, step, dist.get_rank(), dist.get_world_size(), weighted))
        (out * (out - 1)).mean().backward()
        model.zero_grad()
        outputs.append(out.detach())
    return outputs


def whole(value: Any) -> Tensor:
    """A tensor of a state dict, put together from all ranks (which call this together)."""
    if not hasattr(value, "local_shards"):
        return value.detach().clone()
    out = torch.zeros(value.size(), dtype=torch.float32, device=own_device())
    for piece in value.local_shards():
        start, size = piece.metadata.shard_offsets, piece.metadata.shard_sizes
        out[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = piece.tensor.detach().float()
    dist.all_reduce(out)
    return out.to(value.dtype)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All of the model's values, whole; the same on every rank."""
    return {name: whole(value) for name, value in sorted(model.state_dict().items())}


def state_of(model: DistributedModelParallel) -> dict[str, Tensor]:
    """The fused optimizer's state, whole; a rank without a shard of a table takes part in putting it together."""
    states = model.fused_optimizer.state_dict()["state"].values()
    mine = {name: value for state in states for name, value in state.items()}
    shown = {n: (tuple(v.size()), None if hasattr(v, "local_shards") else v) for n, v in mine.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, shown)
    out = {}
    for name, (size, plain) in sorted({n: s for g in gathered for n, s in g.items()}.items()):
        if name in mine:
            out[name] = whole(mine[name])
        elif plain is not None:
            out[name] = plain
        else:
            out[name] = torch.zeros(size, device=own_device())
            dist.all_reduce(out[name])
    return out


def contents(model: DistributedModelParallel) -> dict[str, Any]:
    """A checkpoint's state: the model, and its fused optimizer."""
    return {"model": model, "optimizer": model.fused_optimizer}
