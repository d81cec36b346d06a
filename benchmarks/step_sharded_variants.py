"""Variants of the step benchmark that shard a collection, by TorchRec's planner or by this project's."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.optimizers import in_backward_optimizer_filter

from benchmarks.step_cells import LR, Batch, Tables, Traffic
from benchmarks.step_plan import plan
from benchmarks.step_variant import Variant, uniform
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.ops.cpu_library import without_kernels
from torchrec_qr.partitions import ClosedForm


class _Root(nn.Module):
    """Replicated parameters need a root that returns tensors; pooled ones have the columns of features in order."""

    def __init__(self, collection: nn.Module, features: list[str]) -> None:
        super().__init__()
        self.collection = collection
        self._features = features

    def forward(self, features: Any) -> Any:
        out = self.collection(features)
        out = out.wait() if hasattr(out, "wait") else out
        if not isinstance(out, KeyedTensor):
            return out
        # Under a plan of several sharding types, those of one type lie together.
        return out.values() if out.keys() == self._features else KeyedTensor.regroup([out], [self._features])[0]


class _Dmp(Variant):
    """A collection under ``DistributedModelParallel``, by TorchRec's planner or by this project's."""

    prefix = "collection.embedding_bags."
    our_planner = False
    _dense: torch.optim.Optimizer | None

    def _shard(self, collection: Any, sharder: Any, ids_per_bag: dict[str, int]) -> None:
        """Places a collection on the ranks; ``ids_per_bag``: ids a bag of each of its tables."""
        pooled = hasattr(collection, "embedding_bag_configs")
        configs = collection.embedding_bag_configs() if pooled else collection.embedding_configs()
        tables = self.tables
        constraints = {
            name: ParameterConstraints(
                sharding_types=None if tables.sharding is None else [tables.sharding],
                min_partition=max(tables.dim // 2, 4),
                pooling_factors=[float(hot)],
            )
            for name, hot in ids_per_bag.items()
        }
        root = _Root(collection, [name for c in configs for name in c.feature_names])
        found = plan(root, sharder, constraints, self.traffic.bags, self.device, self.our_planner)
        of_tables: Any = found.plan["collection"]
        self._revise(of_tables, collection, sharder)
        self.plan = dict(Counter(table.sharding_type for table in of_tables.values()))
        self.dmp = DistributedModelParallel(root, device=self.device, plan=found, sharders=[sharder])
        # TorchRec's own data-parallel tables, which its fused optimizer does not step.
        left = list(dict(in_backward_optimizer_filter(self.dmp.named_parameters())).values())
        if left and tables.optimizer != "sgd":
            raise NotImplementedError(f"data-parallel plain tables under {tables.optimizer}; allowed: sgd")
        self._dense = torch.optim.SGD(left, lr=LR) if left else None

    def _revise(self, of_tables: Any, collection: Any, sharder: Any) -> None:
        """Changes the plan of the tables in place."""

    def out(self, batch: Batch) -> Tensor:
        out: Tensor = self.dmp(batch.kjt())
        return out

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        out.backward(gradient)
        if self._dense is not None:
            self._dense.step()
            self._dense.zero_grad()

    def state(self) -> dict[str, Any]:
        return {
            key.removeprefix(self.prefix).removesuffix(".weight"): value
            for key, value in self.dmp.state_dict().items()
            if key.endswith(".weight")
        }

    def sums(self) -> dict[str, Any]:
        state = self.dmp.fused_optimizer.state_dict()["state"]
        return {
            key.removeprefix(self.prefix).removesuffix(".weight"): next(iter(of.values())) for key, of in state.items()
        }

    def _ids_per_bag(self) -> dict[str, int]:
        return dict(zip(self.tables.features, self.traffic.ids_per_bag, strict=True))


class Full(_Dmp):
    """TorchRec's ``EmbeddingBagCollection`` of uncompressed tables."""

    compresses = False

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        collection = EmbeddingBagCollection(tables=_configs(self), device=torch.device("meta"))
        self._shard(collection, EmbeddingBagCollectionSharder(fused_params=tables.fused_params), self._ids_per_bag())


class FullOurPlanner(Full):
    our_planner = True


class Ours(_Dmp):
    """`CompositionalEmbeddingBagCollection`, quotient-remainder, ``mult``."""

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        collection = CompositionalEmbeddingBagCollection(tables=_configs(self), device=torch.device("meta"))
        sharder = CompositionalEmbeddingBagCollectionSharder(fused_params=tables.fused_params)
        self._shard(collection, sharder, self._ids_per_bag())


class OursOurPlanner(Ours):
    our_planner = True


def _configs(variant: Variant) -> list[EmbeddingBagConfig]:
    configs: list[EmbeddingBagConfig] = []
    tables = variant.tables
    for f, size, partitions in zip(tables.features, tables.sizes, variant.partitions, strict=True):
        fields: dict[str, Any] = {"name": f, "num_embeddings": size, "embedding_dim": tables.dim, "feature_names": [f]}
        if partitions is None:
            configs.append(EmbeddingBagConfig(**fields, init_fn=uniform))
        else:
            configs.append(CompositionalEmbeddingBagConfig(**fields, partitions=variant.spec, init_fn=uniform))
    return configs


class Fallback(Ours):
    """`Ours` with PyTorch in the place of the kernels of a CPU."""

    def out(self, batch: Batch) -> Tensor:
        with without_kernels():
            return super().out(batch)

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        with without_kernels():
            super().backward(out, gradient)


class _Stock(_Dmp):
    """A TorchRec table per partition, composed after the output dist."""

    def names(self, f: int) -> list[str]:
        return [name.replace(".", "_") for name in super().names(f)]

    def _tables(self, make: Callable[..., Any]) -> list[Any]:
        return [
            make(
                name=self.names(f)[j],
                num_embeddings=rows,
                embedding_dim=self.tables.dim,
                feature_names=[f"{feature}.{j}"],
                init_fn=uniform,
            )
            for f, feature in enumerate(self.tables.features)
            for j, rows in enumerate(self._partitions_of(f).sizes)
        ]

    def _shard_tables(self, collection: nn.Module, sharder: Any) -> None:
        ids_per_bag = {name: hot for f, hot in enumerate(self.traffic.ids_per_bag) for name in self.names(f)}
        self._shard(collection, sharder, ids_per_bag)

    def _expanded(self, batch: Batch) -> KeyedJaggedTensor:
        rows = [row.flatten() for f, ids in enumerate(batch.ids) for row in self.classes(f, ids)]
        lengths = batch.lengths.view(len(batch.ids), 1, -1).expand(-1, 2, -1)
        keys = [f"{f}.{j}" for f in self.tables.features for j in range(2)]
        return KeyedJaggedTensor(keys=keys, values=torch.cat(rows), lengths=lengths.reshape(-1))

    def _partitions_of(self, f: int) -> ClosedForm:
        partitions = self.partitions[f]
        assert partitions is not None
        return partitions


class StockPooled(_Stock):
    pools_first = True

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        collection = EmbeddingBagCollection(tables=self._tables(EmbeddingBagConfig), device=torch.device("meta"))
        self._shard_tables(collection, EmbeddingBagCollectionSharder(fused_params=tables.fused_params))

    def out(self, batch: Batch) -> Tensor:
        out: Tensor = self.dmp(self._expanded(batch))
        first, second = out.view(len(out), len(batch.ids), 2, self.tables.dim).unbind(2)
        return (first * second).view(len(out), -1)


class StockUnpooled(_Stock):
    prefix = "collection.embeddings."

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        collection = EmbeddingCollection(tables=self._tables(EmbeddingConfig), device=torch.device("meta"))
        self._shard_tables(collection, EmbeddingCollectionSharder(fused_params=tables.fused_params))

    def out(self, batch: Batch) -> Tensor:
        of = self.dmp(self._expanded(batch))
        outputs = [
            (of[f"{f}.0"].values() * of[f"{f}.1"].values()).view(*ids.shape, -1).sum(1)
            for f, ids in zip(self.tables.features, batch.ids, strict=True)
        ]
        return torch.cat(outputs, dim=1)
