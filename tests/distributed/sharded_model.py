"""A small model over a collection of tables of many kinds, and the same model sharded; `parity_model` builds on it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from cases import randomize
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from global_batches import batch_of
from pieces import Pieces, gathered, pieces_of
from placements import placements, plan_of
from ranks import own_device
from single_tables import bag_table, collection_of, plain_table, sequence_table
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import ParameterShardingGenerator
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    HashPartition,
    QuotientRemainder,
)
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
    get_default_sharders,
)
from torchrec_qr.partitions import PartitionSpec

SGD = EmbOptimType.EXACT_SGD
ADAGRAD = EmbOptimType.EXACT_ADAGRAD
ROWWISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD
LR, EPS = 0.05, 1e-8

NUM_IDS = 60
DIM = 24
_GRID_CLASSES = torch.stack([torch.arange(NUM_IDS) * 37 % NUM_IDS % 12, torch.arange(NUM_IDS) * 37 % NUM_IDS // 12])


def table(
    name: str, partitions: PartitionSpec, operation: Any, num_embeddings: int = NUM_IDS, **fields: Any
) -> CompositionalEmbeddingBagConfig:
    """A compositional table of D=24, named after its only feature."""
    fields = {"name": name, "num_embeddings": num_embeddings, "embedding_dim": DIM, "operation": operation, **fields}
    return bag_table(partitions, **fields)


def plain_named(name: str) -> EmbeddingBagConfig:
    """A plain table of D=24, named after its only feature."""
    config: EmbeddingBagConfig = plain_table(name=name, num_embeddings=NUM_IDS, embedding_dim=DIM)
    return config


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
        plain_named("plain"),
    ]


def two_tables() -> list[Any]:
    """Two tables alike, a and b."""
    return [table(name, QuotientRemainder(num_collisions=7), "mult") for name in ("a", "b")]


def sequences(name: str = "s", **fields: Any) -> CompositionalEmbeddingConfig:
    """A table of sequences of D=8, named after its only feature."""
    return sequence_table(QuotientRemainder(num_collisions=7), name=name, num_embeddings=NUM_IDS, **fields)


class Model(nn.Module):
    """The collection, its outputs end to end in one tensor: replicated parameters need a root that returns tensors."""

    def __init__(self, collection: Any) -> None:
        super().__init__()
        self.collection = collection
        self._pooled = hasattr(collection, "embedding_bag_configs")
        configs = collection.embedding_bag_configs() if self._pooled else collection.embedding_configs()
        # Outputs in the order of the tables, whatever the plan.
        self.names = [name for of_table in get_embedding_names_by_table(configs) for name in of_table]

    def forward(self, features: KeyedJaggedTensor) -> Any:
        out = self.collection(features)
        if self._pooled:
            return KeyedTensor.regroup([out], [self.names])[0]
        return torch.cat([out[name].values().reshape(-1) for name in self.names])


class Scaled(Model):
    """The outputs times a dense parameter."""

    def __init__(self, collection: Any) -> None:
        super().__init__(collection)
        # Off the meta device already: nobody initialises a plain parameter for us.
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        out: Tensor = super().forward(features) * self.scale
        return out


def unsharded(configs: Sequence[EmbeddingBagConfig], seed: int = 1, is_weighted: bool = False) -> Scaled:
    """The model with values of order one, so that a wrong row or factor shows; the same on every rank."""
    collection = collection_of(configs, is_weighted=is_weighted)
    randomize(collection, seed)
    return Scaled(collection)


def sharders_of(
    fused_params: dict[str, Any], codecs: dict[str, Any] | None = None, index_dedup: bool = False
) -> list[Any]:
    """Our sharders with a fused optimizer, of bags and of sequences, and TorchRec's default ones."""
    return [
        CompositionalEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry=codecs),
        CompositionalEmbeddingCollectionSharder(
            fused_params, qcomm_codecs_registry=codecs, use_index_dedup=index_dedup
        ),
    ] + [s for s in get_default_sharders() if not type(s).__name__.startswith("Compositional")]


def distributed(
    model: nn.Module,
    plan: EmbeddingModuleShardingPlan,
    sharders: list[Any],
    values: Model | None = None,
    **dmp_arguments: Any,
) -> DistributedModelParallel:
    """A model that is or contains a `Model`, its collection sharded, with the unsharded model's values loaded."""
    (inside,) = (name for name, module in model.named_modules() if isinstance(module, Model))
    path = f"{inside}." if inside else ""
    dmp = DistributedModelParallel(
        model,
        device=own_device(),
        plan=ShardingPlan(plan={f"{path}collection": plan}),
        sharders=sharders,
        **dmp_arguments,
    )
    if values is not None:
        own = {name: value for name, value in dmp.state_dict().items() if not name.startswith(f"{path}collection.")}
        dmp.load_state_dict(own | {f"{path}{name}": value.clone() for name, value in values.state_dict().items()})
    return dmp


def shard(
    configs: Sequence[EmbeddingBagConfig],
    sharding: str | Mapping[str, ParameterShardingGenerator],
    optimizer: EmbOptimType = ADAGRAD,
    values: Model | None = None,
    is_weighted: bool = False,
    codecs: Any = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    **dmp_arguments: Any,
) -> DistributedModelParallel:
    """The model on all ranks, every table under one sharding type or each as given, with ``values`` loaded.

    ``wrap`` makes the module that is sharded from the model.
    """
    collection = collection_of(configs, "meta", is_weighted)
    sharders = sharders_of({"optimizer": optimizer, "learning_rate": LR, "eps": EPS}, codecs)
    generators = placements(configs, sharding) if isinstance(sharding, str) else sharding
    plan = plan_of(collection, generators, sharders[0])
    return distributed(wrap(Scaled(collection)), plan, sharders, values, **dmp_arguments)


def loss_of(out: Tensor, world_size: int) -> Tensor:
    """Averaged over ranks, as DMP does: 0.1 Σ out² over all ranks."""
    return 0.1 * world_size * (out.float() ** 2).sum()


def steps_of(
    model: nn.Module, batches: Iterable[KeyedJaggedTensor], optimizers: Sequence[Any] = ()
) -> Iterator[Tensor]:
    """Trains on the batches, beside the fused optimizer by those that are given; yields the output after each step."""
    for batch in batches:
        for cleared in (model, *optimizers):
            cleared.zero_grad()
        out = model(batch)
        loss_of(out, dist.get_world_size()).backward()
        for optimizer in optimizers:
            optimizer.step()
        yield out.detach()


def train(
    model: nn.Module, configs: Sequence[EmbeddingBagConfig], steps: Iterable[int], weighted: bool = False
) -> list[Tensor]:
    """Steps the fused optimizer on global batches that the step's number determines; returns the outputs."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return list(steps_of(model, (batch_of(configs, step, rank, world_size, weighted) for step in steps)))


def own_weights(model: nn.Module) -> dict[str, Pieces]:
    """Returns this rank's part of the model's values, without fingerprints, which are no values."""
    return {k: pieces_of(v) for k, v in model.state_dict().items() if not k.endswith("fingerprint")}


def own_state(model: DistributedModelParallel) -> dict[str, Pieces]:
    """Returns this rank's part of the fused optimizer's state, by parameter and name."""
    state = model.fused_optimizer.state_dict()["state"]
    return {f"{k} {name}": pieces_of(v) for k, of in state.items() for name, v in of.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All of the model's values, whole; the same on every rank."""
    state = model.state_dict()
    return {k: v.to(state[k].dtype) for k, v in gathered({k: pieces_of(state[k]) for k in sorted(state)}).items()}


def state_of(model: DistributedModelParallel) -> dict[str, Tensor]:
    """The fused optimizer's state, whole; the same on every rank."""
    return gathered(own_state(model))


def contents(model: DistributedModelParallel) -> dict[str, Any]:
    """A checkpoint's state: the model, and its fused optimizer."""
    return {"model": model, "optimizer": model.fused_optimizer}
