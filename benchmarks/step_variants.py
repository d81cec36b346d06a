"""The variants of the step benchmark: each a step from a rank's ids to stepped tables."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from benchmarks.step_cells import EPS, LR, Tables, kjt
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.ops.arguments import RULES, Gradients
from torchrec_qr.ops.cpu_library import without_kernels
from torchrec_qr.ops.layout import TableLayout, encode, partition_layouts
from torchrec_qr.ops.lookup import Lookup, stepped_lookup
from torchrec_qr.ops.memory import zeros

VARIANTS = ("full", "stock_pooled", "stock_unpooled", "dlrm_bag", "fused_alone", "fused", "fallback")


class Variant:
    """One way to look up, compose, pool and step; ``per_partition`` names the tables of each feature."""

    # Whether it multiplies pooled rows, which for several ids a bag is not what the others compute.
    pools_first = False
    divides_by_ranks = True  # or each rank trains tables of its own, alone

    def __init__(self, tables: Tables, m: int) -> None:
        self.tables, self.m = tables, m
        self.partitions = QuotientRemainder(tables.num_ids, num_collisions=m)

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        """(B, F·D)."""
        raise NotImplementedError

    def step(self, ids: Tensor, bags: int, hot: int, gradient: Tensor) -> Tensor:
        out = self.out(ids, bags, hot)
        out.backward(gradient)
        return out.detach()

    def names(self, feature: str) -> list[str]:
        """Of what a feature's tables are called in `state`."""
        return [f"{feature}.partition_{j}" for j in range(2)]

    def state(self) -> dict[str, Any]:
        """Weights by name."""
        raise NotImplementedError

    def sums(self) -> dict[str, Any]:
        """Rowwise Adagrad's accumulators by the same names."""
        raise NotImplementedError


def _uniform(weight: Tensor) -> Tensor:
    return nn.init.uniform_(weight, 0.5, 1.0)


def _sharded(module: nn.Module, sharder: Any, tables: Tables, names: list[str]) -> DistributedModelParallel:
    constraints = {
        name: ParameterConstraints(sharding_types=[tables.sharding], min_partition=max(tables.dim // 2, 4))
        for name in names
    }
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    model = _Root(module)
    plan = planner.collective_plan(model, [sharder], dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])


class _Root(nn.Module):
    """Replicated parameters need a root that returns tensors."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: Any) -> Any:
        out = self.collection(features)
        out = out.wait() if hasattr(out, "wait") else out
        return out.values() if hasattr(out, "values") and not isinstance(out, dict) else out


class _Dmp(Variant):
    dmp: DistributedModelParallel
    prefix = "collection.embedding_bags."

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


class Full(_Dmp):
    """TorchRec's ``EmbeddingBagCollection`` of uncompressed tables."""

    def __init__(self, tables: Tables, m: int) -> None:
        super().__init__(tables, m)
        configs = [
            EmbeddingBagConfig(
                name=f, num_embeddings=tables.num_ids, embedding_dim=tables.dim, feature_names=[f], init_fn=_uniform
            )
            for f in tables.features
        ]
        collection = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        sharder = EmbeddingBagCollectionSharder(fused_params=tables.fused_params)
        self.dmp = _sharded(collection, sharder, tables, tables.features)

    def names(self, feature: str) -> list[str]:
        return [feature]

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        out: Tensor = self.dmp(kjt(self.tables.features, ids, bags, hot))
        return out


class Ours(_Dmp):
    """`CompositionalEmbeddingBagCollection`, quotient-remainder, ``mult``."""

    def __init__(self, tables: Tables, m: int) -> None:
        super().__init__(tables, m)
        configs = [
            CompositionalEmbeddingBagConfig(
                name=f,
                num_embeddings=tables.num_ids,
                embedding_dim=tables.dim,
                feature_names=[f],
                partitions=self.partitions,
                init_fn=_uniform,
            )
            for f in tables.features
        ]
        collection = CompositionalEmbeddingBagCollection(tables=list(configs), device=torch.device("meta"))
        sharder = CompositionalEmbeddingBagCollectionSharder(fused_params=tables.fused_params)
        self.dmp = _sharded(collection, sharder, tables, tables.features)

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        out: Tensor = self.dmp(kjt(self.tables.features, ids, bags, hot))
        return out


class FusedAlone(Variant):
    """The lookup of `Ours` as `DlrmBag` runs: in each process for itself, its whole batch, with no communication."""

    divides_by_ranks = False

    def __init__(self, tables: Tables, m: int) -> None:
        super().__init__(tables, m)
        layout = TableLayout(
            "mult", partition_layouts(self.partitions, dict.fromkeys(range(2), tables.dim)), num_ids=tables.num_ids
        )
        self._lookup = Lookup(encode([layout] * tables.num_features), tables.features, [])
        sizes = list(self.partitions.sizes) * tables.num_features
        self._weights = [_uniform(zeros((n, tables.dim), torch.float32, None)).requires_grad_() for n in sizes]
        self._sums = [torch.zeros(n) for n in sizes] if tables.optimizer == "rowwise_adagrad" else []
        hyper = [LR, EPS, 0, 0, 1, 1, -1] * len(sizes)
        self._gradients = Gradients([RULES[tables.optimizer]] * len(sizes), self._sums, hyper, [])

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        offsets = torch.arange(0, ids.numel() + 1, hot)
        return stepped_lookup(self._lookup, self._weights, lambda: self._gradients, ids, offsets, None, True)

    def state(self) -> dict[str, Any]:
        return self._by_name([w.detach() for w in self._weights])

    def sums(self) -> dict[str, Any]:
        return self._by_name(self._sums)

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Any]:
        return dict(zip((name for f in self.tables.features for name in self.names(f)), tensors, strict=True))


class Fallback(Ours):
    """`Ours` with PyTorch in the place of the kernels."""

    def step(self, ids: Tensor, bags: int, hot: int, gradient: Tensor) -> Tensor:
        with without_kernels():
            return super().step(ids, bags, hot, gradient)


class _Stock(_Dmp):
    """A TorchRec table per partition, composed after the output dist."""

    def names(self, feature: str) -> list[str]:
        return [f"{feature}_partition_{j}" for j in range(2)]

    def _tables(self, make: Callable[..., Any]) -> list[Any]:
        return [
            make(
                name=self.names(f)[j],
                num_embeddings=rows,
                embedding_dim=self.tables.dim,
                feature_names=[f"{f}.{j}"],
                init_fn=_uniform,
            )
            for f in self.tables.features
            for j, rows in enumerate(self.partitions.sizes)
        ]

    def _expanded(self, ids: Tensor, bags: int, hot: int) -> Any:
        rows = torch.stack(self.partitions.class_rows(ids.view(self.tables.num_features, -1)), dim=1)
        keys = [f"{f}.{j}" for f in self.tables.features for j in range(2)]
        return kjt(keys, rows.reshape(-1), bags, hot)


class StockPooled(_Stock):
    pools_first = True

    def __init__(self, tables: Tables, m: int) -> None:
        super().__init__(tables, m)
        configs = self._tables(EmbeddingBagConfig)
        collection = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        sharder = EmbeddingBagCollectionSharder(fused_params=tables.fused_params)
        self.dmp = _sharded(collection, sharder, tables, [c.name for c in configs])

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        pooled = self.dmp(self._expanded(ids, bags, hot)).view(bags, self.tables.num_features, 2, self.tables.dim)
        first, second = pooled.unbind(2)
        return (first * second).view(bags, -1)


class StockUnpooled(_Stock):
    prefix = "collection.embeddings."

    def __init__(self, tables: Tables, m: int) -> None:
        super().__init__(tables, m)
        configs = self._tables(EmbeddingConfig)
        collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))
        sharder = EmbeddingCollectionSharder(fused_params=tables.fused_params)
        self.dmp = _sharded(collection, sharder, tables, [c.name for c in configs])

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        of = self.dmp(self._expanded(ids, bags, hot))
        outputs = [of[f"{f}.0"].values() * of[f"{f}.1"].values() for f in self.tables.features]
        return torch.cat([x.view(bags, hot, -1).sum(1) for x in outputs], dim=1)


class DlrmBag(Variant):
    """As users of dlrm's QR bag run it: two ``nn.EmbeddingBag(sparse=True)`` per feature, pooled and then multiplied,
    SGD on sparse gradients; in each process for itself, its whole batch, with no communication."""

    pools_first = True
    divides_by_ranks = False

    def __init__(self, tables: Tables, m: int) -> None:
        super().__init__(tables, m)
        make = partial(nn.EmbeddingBag, mode="sum", sparse=True, include_last_offset=True)
        self._bags = [[make(rows, tables.dim) for rows in self.partitions.sizes] for _ in tables.features]
        for bag in (bag for of in self._bags for bag in of):
            _uniform(bag.weight.data)
        self._optimizer = torch.optim.SGD([bag.weight for of in self._bags for bag in of], lr=LR)

    def out(self, ids: Tensor, bags: int, hot: int) -> Tensor:
        offsets = torch.arange(0, bags * hot + 1, hot)
        outputs = []
        for of, x in zip(self._bags, ids.view(self.tables.num_features, -1), strict=True):
            first, second = self.partitions.class_rows(x)
            outputs.append(of[0](first, offsets) * of[1](second, offsets))
        return torch.cat(outputs, dim=1)

    def step(self, ids: Tensor, bags: int, hot: int, gradient: Tensor) -> Tensor:
        out = super().step(ids, bags, hot, gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return out

    def state(self) -> dict[str, Any]:
        return {
            f"{f}.partition_{j}": bag.weight.data
            for f, of in zip(self.tables.features, self._bags, strict=True)
            for j, bag in enumerate(of)
        }


def make(variant: str, tables: Tables, m: int) -> Variant:
    classes = (Full, StockPooled, StockUnpooled, DlrmBag, FusedAlone, Ours, Fallback)
    return dict(zip(VARIANTS, classes, strict=True))[variant](tables, m)
