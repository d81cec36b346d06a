"""Compositional tables drawn at random, each with the oracle's description of the same table."""

from collections.abc import Callable
from typing import Any

import oracle
import torch
from hypothesis import strategies as st
from kinds import Kind, kind_of
from torch import nn
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
from torchrec_qr.modules.table import CompositionalTable


@st.composite
def kinds(draw: Callable[..., Any], num_ids: int = 100) -> Kind:
    k = draw(st.integers(1, 4))
    labels = ["mixed_radix", "chinese_remainder", "explicit"]
    labels += ["hash"] if k == 1 else ["strided", "adjacent"] if k == 2 else []
    return kind_of(draw(st.sampled_from(labels)), k, num_ids)


@st.composite
def configs(draw: Callable[..., Any], name: str = "t", pooled: bool = True, may_hash: bool = False) -> tuple[Any, Kind]:
    kind = draw(kinds())
    if may_hash and draw(st.booleans()):
        kind = kind.hashed(draw(st.integers(0, 2**31 - 1)))
    k = kind.bound.num_partitions
    operation = draw(st.sampled_from(["mult", "add", "concat", "path"]))
    dim = draw(st.sampled_from([4, 8, 12])) if operation != "concat" else 4 * draw(st.integers(k, k + 2))
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": kind.num_embeddings,
        "embedding_dim": dim,
        "feature_names": [f"f_{name}"],
        "data_type": draw(st.sampled_from([DataType.FP32, DataType.FP32, DataType.FP16, DataType.BF16])),
        "partitions": kind.partitions,
        "operation": operation,
    }
    if kind.hash_seed is not None:
        fields |= {"id_hash": "splitmix64", "hash_seed": kind.hash_seed}
    if operation == "path":
        fields["path_hidden"] = draw(st.sampled_from([None, 3]))
        fields["path_activation"] = draw(st.sampled_from(["relu", "tanh"]))
    if pooled:
        pooling = draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN]))
        return CompositionalEmbeddingBagConfig(pooling=pooling, **fields), kind
    return CompositionalEmbeddingConfig(**fields), kind


def randomize(module: nn.Module, seed: int) -> None:
    """Sets values of order one and either sign, so that a wrong row, sign or factor shows.

    MLPs of a path get a quarter of that, because fp32 loses the slope of a tanh that saturates, and K - 1 of them
    would overflow.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.empty(p.shape).uniform_(0.5, 1.5, generator=generator))
            p.mul_(torch.empty(p.shape).bernoulli_(0.5, generator=generator).mul(2).sub(1))
        for table in module.modules():
            if isinstance(table, CompositionalTable) and table.config.operation == "path":
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
