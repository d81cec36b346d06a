"""Variants of the step benchmark in which each process runs for itself, its whole batch, with no communication."""

from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from benchmarks.step_cells import LR, Batch, Tables, Traffic
from benchmarks.step_variant import Variant, uniform
from torchrec_qr.distributed.fused_params import OPTIMIZERS, update_rule
from torchrec_qr.ops import arguments
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.memory import zeros
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.update_rules import Update


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
        self._weights = [uniform(zeros((n, tables.dim), torch.float32, device)).requires_grad_() for n in sizes]
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
            uniform(weight)

    def out(self, batch: Batch) -> Tensor:
        out: Tensor = self._tbe(batch.values, batch.offsets)
        return out

    def state(self) -> dict[str, Any]:
        return dict(zip(self.tables.features, self._tbe.split_embedding_weights(), strict=True))


class DlrmBag(Variant):
    """Users of dlrm's QR bag run it so: two ``nn.EmbeddingBag(sparse=True)`` per feature, pooled and then multiplied,
    SGD on sparse gradients; in each process for itself, its whole batch, with no communication."""

    pools_first = True
    divides_by_ranks = False

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(tables, m, traffic, device)
        make = partial(nn.EmbeddingBag, mode="sum", sparse=True, device=device)
        self._bags = [[make(rows, tables.dim) for rows in p.sizes] for p in self.partitions if p is not None]
        for bag in (bag for of in self._bags for bag in of):
            uniform(bag.weight.data)
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
