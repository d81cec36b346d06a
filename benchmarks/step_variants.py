"""The variants of the step benchmark: each a step from a rank's ids to stepped tables."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
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
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.distributed.fused_params import OPTIMIZERS, update_rule
from torchrec_qr.ops import arguments
from torchrec_qr.ops.cpu_library import without_kernels
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.memory import zeros
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.update_rules import Update
from torchrec_qr.partitions import ClosedForm


class Variant:
    """One way to look up, compose, pool and step. ``traffic`` is what a planner takes into account."""

    compresses = True
    # Whether it multiplies pooled rows, which for several ids a bag is not what the others compute.
    pools_first = False
    divides_by_ranks = True  # or each rank trains tables of its own, alone
    plan: dict[str, int]  # how many tables have which sharding type

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        self.tables, self.traffic, self.device, self.plan = tables, traffic, device, {}
        self.spec = QuotientRemainder(num_collisions=m)
        self.partitions = [
            self.spec.bind(n) if self.compresses and n > tables.threshold else None for n in tables.sizes
        ]

    def out(self, batch: Batch) -> Tensor:
        """(B, F·D)."""
        raise NotImplementedError

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        """Steps the rows as well."""
        out.backward(gradient)

    def step(self, batch: Batch, gradient: Tensor) -> Tensor:
        out = self.out(batch)
        self.backward(out, gradient)
        return out.detach()

    def names(self, f: int) -> list[str]:
        """The names of the tables of feature f in `state`."""
        name = self.tables.features[f]
        return [name] if self.partitions[f] is None else [f"{name}.partition_{j}" for j in range(2)]

    def classes(self, f: int, ids: Tensor) -> list[Tensor]:
        """The row of each id in each of these."""
        partitions = self.partitions[f]
        return [ids] if partitions is None else partitions.class_rows(ids)

    def state(self) -> dict[str, Any]:
        """Weights by name."""
        raise NotImplementedError

    def sums(self) -> dict[str, Any]:
        """Rowwise Adagrad's accumulators by the same names."""
        raise NotImplementedError


def _uniform(weight: Tensor) -> Tensor:
    return nn.init.uniform_(weight, 0.5, 1.0)


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

    def _shard(self, collection: Any, sharder: Any, hots: dict[str, int]) -> None:
        """Places a collection on the ranks; ``hots``: ids a bag of each of its tables."""
        pooled = hasattr(collection, "embedding_bag_configs")
        configs = collection.embedding_bag_configs() if pooled else collection.embedding_configs()
        tables = self.tables
        constraints = {
            name: ParameterConstraints(
                sharding_types=None if tables.sharding is None else [tables.sharding],
                min_partition=max(tables.dim // 2, 4),
                pooling_factors=[float(hot)],
            )
            for name, hot in hots.items()
        }
        root = _Root(collection, [name for c in configs for name in c.feature_names])
        found = plan(root, sharder, constraints, self.traffic.bags, self.device, self.our_planner)
        of_tables: Any = found.plan["collection"]
        self.plan = dict(Counter(table.sharding_type for table in of_tables.values()))
        self.dmp = DistributedModelParallel(root, device=self.device, plan=found, sharders=[sharder])
        # TorchRec's own data-parallel tables, which its fused optimizer does not step.
        left = list(dict(in_backward_optimizer_filter(self.dmp.named_parameters())).values())
        if left and tables.optimizer != "sgd":
            raise NotImplementedError(f"data-parallel plain tables under {tables.optimizer}; allowed: sgd")
        self._dense = torch.optim.SGD(left, lr=LR) if left else None

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

    def _hots(self) -> dict[str, int]:
        return dict(zip(self.tables.features, self.traffic.hots, strict=True))


class Full(_Dmp):
    """TorchRec's ``EmbeddingBagCollection`` of uncompressed tables."""

    compresses = False

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        collection = EmbeddingBagCollection(tables=_configs(self), device=torch.device("meta"))
        self._shard(collection, EmbeddingBagCollectionSharder(fused_params=tables.fused_params), self._hots())


class FullOurPlanner(Full):
    our_planner = True


class Ours(_Dmp):
    """`CompositionalEmbeddingBagCollection`, quotient-remainder, ``mult``."""

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        collection = CompositionalEmbeddingBagCollection(tables=_configs(self), device=torch.device("meta"))
        sharder = CompositionalEmbeddingBagCollectionSharder(fused_params=tables.fused_params)
        self._shard(collection, sharder, self._hots())


class OursOurPlanner(Ours):
    our_planner = True


def _configs(variant: Variant) -> list[EmbeddingBagConfig]:
    configs: list[EmbeddingBagConfig] = []
    tables = variant.tables
    for f, size, partitions in zip(tables.features, tables.sizes, variant.partitions, strict=True):
        fields: dict[str, Any] = {"name": f, "num_embeddings": size, "embedding_dim": tables.dim, "feature_names": [f]}
        if partitions is None:
            configs.append(EmbeddingBagConfig(**fields, init_fn=_uniform))
        else:
            configs.append(CompositionalEmbeddingBagConfig(**fields, partitions=variant.spec, init_fn=_uniform))
    return configs


class FusedAlone(Variant):
    """The lookup of `Ours` as `DlrmBag` runs: in each process for itself, its whole batch, with no communication."""

    divides_by_ranks = False

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        partitions = [p for p in self.partitions if p is not None]
        layouts = [
            TableLayout("mult", partition_layouts(p, dict.fromkeys(range(2), tables.dim)), num_ids=n)
            for p, n in zip(partitions, tables.sizes, strict=True)
        ]
        self._described = Description(layouts, tables.features)
        sizes = [n for p in partitions for n in p.sizes]
        self._weights = [_uniform(zeros((n, tables.dim), torch.float32, device)).requires_grad_() for n in sizes]
        rule = update_rule("fused alone", tables.fused_params)
        states = [
            {name: torch.zeros(shape, device=device) for name, shape in rule.state_shapes(*w.shape).items()}
            for w in self._weights
        ]
        self._updates: list[arguments.Outcome] = [Update(rule, state, LR) for state in states]
        self._sums = [tensor for state in states for tensor in state.values()]

    def out(self, batch: Batch) -> Tensor:
        given = arguments.Batch(batch.values, batch.offsets, None, True)
        return stepped_lookup(self._described, self._weights, given, lambda: self._updates)

    def state(self) -> dict[str, Any]:
        return self._by_name([w.detach() for w in self._weights])

    def sums(self) -> dict[str, Any]:
        return self._by_name(self._sums)

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Any]:
        names = (name for f in range(len(self.tables.sizes)) for name in self.names(f))
        return dict(zip(names, tensors, strict=True))


class Tbe(Variant):
    """FBGEMM's table-batched embedding of the uncompressed tables, as `FusedAlone` runs; SGD."""

    compresses = False
    divides_by_ranks = False

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        on_gpu = EmbeddingLocation.DEVICE, ComputeDevice.CUDA
        place = on_gpu if device.type == "cuda" else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self._tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(n, tables.dim, *place) for n in tables.sizes],
            **OPTIMIZERS[tables.optimizer].fused_params,
            learning_rate=LR,
            device=device,
        )
        for weight in self._tbe.split_embedding_weights():
            _uniform(weight)

    def out(self, batch: Batch) -> Tensor:
        out: Tensor = self._tbe(batch.values, batch.offsets)
        return out

    def state(self) -> dict[str, Any]:
        return dict(zip(self.tables.features, self._tbe.split_embedding_weights(), strict=True))


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
                init_fn=_uniform,
            )
            for f, feature in enumerate(self.tables.features)
            for j, rows in enumerate(self._partitions_of(f).sizes)
        ]

    def _shard_tables(self, collection: nn.Module, sharder: Any) -> None:
        hots = {name: hot for f, hot in enumerate(self.traffic.hots) for name in self.names(f)}
        self._shard(collection, sharder, hots)

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


class DlrmBag(Variant):
    """As users of dlrm's QR bag run it: two ``nn.EmbeddingBag(sparse=True)`` per feature, pooled and then multiplied,
    SGD on sparse gradients; in each process for itself, its whole batch, with no communication."""

    pools_first = True
    divides_by_ranks = False

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        make = partial(nn.EmbeddingBag, mode="sum", sparse=True, device=device)
        self._bags = [[make(rows, tables.dim) for rows in p.sizes] for p in self.partitions if p is not None]
        for bag in (bag for of in self._bags for bag in of):
            _uniform(bag.weight.data)
        self._optimizer = torch.optim.SGD([bag.weight for of in self._bags for bag in of], lr=LR)

    def out(self, batch: Batch) -> Tensor:
        outputs = []
        for f, (of, ids) in enumerate(zip(self._bags, batch.ids, strict=True)):
            first, second = self.classes(f, ids)
            outputs.append(of[0](first) * of[1](second))
        return torch.cat(outputs, dim=1)

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        out.backward(gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {
            name: bag.weight.data
            for f, of in enumerate(self._bags)
            for name, bag in zip(self.names(f), of, strict=True)
        }


VARIANTS: dict[str, type[Variant]] = {
    "full": Full,
    "full_our_planner": FullOurPlanner,
    "stock_pooled": StockPooled,
    "stock_unpooled": StockUnpooled,
    "dlrm_bag": DlrmBag,
    "tbe": Tbe,
    "fused_alone": FusedAlone,
    "fused": Ours,
    "fused_our_planner": OursOurPlanner,
    "fallback": Fallback,
}
