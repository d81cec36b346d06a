"""Compositional tables drawn at random, each with the oracle's description of the same table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from hypothesis import strategies as st
from torch import nn
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    Partitions,
    QuotientRemainder,
)
from torchrec_qr.modules.table import CompositionalTable

COPRIME = {1: [101], 2: [11, 10], 3: [5, 7, 3], 4: [3, 5, 7, 2]}
RADIX = {1: [101], 2: [12, 9], 3: [6, 5, 4], 4: [4, 3, 3, 3]}


@dataclass(frozen=True)
class Kind:
    """One kind of partitions over ids [0, num_ids), in the library's words and in the oracle's."""

    label: str
    partitions: Partitions
    rows_of: oracle.RowsOf


def kind_of(label: str, k: int, num_ids: int = 100) -> Kind:
    """Kinds that exist for K partitions only; `num_ids` up to 100."""
    if label == "hash":
        return Kind(label, HashPartition(num_ids, 17), lambda x: (x % 17,))
    if label in ("strided", "adjacent"):
        return Kind(label, QuotientRemainder(num_ids, 7, label), oracle.quotient_remainder(num_ids, 7, label))
    if label == "mixed_radix":
        return Kind(label, MixedRadix(num_ids, RADIX[k]), oracle.mixed_radix(RADIX[k]))
    if label == "chinese_remainder":
        return Kind(label, ChineseRemainder(num_ids, COPRIME[k]), oracle.chinese_remainder(COPRIME[k]))
    classes = [[oracle.mixed_radix(RADIX[k])((37 * x + 11) % num_ids)[j] for x in range(num_ids)] for j in range(k)]
    return Kind("explicit", ExplicitPartitions(torch.tensor(classes)), oracle.explicit(classes))


@st.composite
def kinds(draw: Callable[..., Any], num_ids: int = 100) -> Kind:
    k = draw(st.integers(1, 4))
    labels = ["mixed_radix", "chinese_remainder", "explicit"]
    labels += ["hash"] if k == 1 else ["strided", "adjacent"] if k == 2 else []
    return kind_of(draw(st.sampled_from(labels)), k, num_ids)


@st.composite
def configs(draw: Callable[..., Any], name: str = "t", pooled: bool = True) -> tuple[Any, Kind]:
    kind = draw(kinds())
    k = kind.partitions.num_partitions
    operation = draw(st.sampled_from(["mult", "add", "concat", "path"]))
    dim = draw(st.sampled_from([4, 8, 12])) if operation != "concat" else 4 * draw(st.integers(k, k + 2))
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": kind.partitions.num_ids,
        "embedding_dim": dim,
        "feature_names": [f"f_{name}"],
        "data_type": draw(st.sampled_from([DataType.FP32, DataType.FP32, DataType.FP16, DataType.BF16])),
        "partitions": kind.partitions,
        "operation": operation,
    }
    if operation == "path":
        fields["path_hidden"] = draw(st.sampled_from([None, 3]))
        fields["path_activation"] = draw(st.sampled_from(["relu", "tanh"]))
    if pooled:
        pooling = draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN]))
        return CompositionalEmbeddingBagConfig(pooling=pooling, **fields), kind
    return CompositionalEmbeddingConfig(**fields), kind


def randomize(module: nn.Module, seed: int) -> None:
    """Values of order one and either sign, so that a wrong row, sign or factor shows.

    MLPs of a path a quarter of that: where tanh saturates, fp32 loses its slope, and K - 1 of them in a row overflow.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.empty(p.shape).uniform_(0.5, 1.5, generator=generator))
            p.mul_(torch.empty(p.shape).bernoulli_(0.5, generator=generator).mul(2).sub(1))
        for table in module.modules():
            if isinstance(table, CompositionalTable) and table.composition.operation == "path":
                for mlps in table.weights()[1:]:
                    mlps.mul_(0.25)


def oracle_of(config: Any, kind: Kind, table: CompositionalTable) -> oracle.OracleTable:
    return oracle.OracleTable(
        rows_of=kind.rows_of,
        weights=[w.detach().double().requires_grad_() for w in table.weights()],
        operation=config.operation,
        pooling="mean" if getattr(config, "pooling", None) == PoolingType.MEAN else "sum",
        path_hidden=config.path_hidden,
        path_activation=config.path_activation,
    )
