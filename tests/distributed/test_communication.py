"""Compositional tables exchange as many bytes as full tables of the same logical shape, whatever K."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_model import TableCase, hand_plan
from ranks import run_ranks
from sharded_model import Model, distributed, loss_of
from single_tables import collection_of, table_of
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    KeyedJaggedTensor,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from torchrec_qr import (
    MixedRadix,
)
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
)
from torchrec_qr.distributed.layout import ROW_SPLIT

NUM_IDS, DIM, BAGS, TABLES = 1000, 16, 6, 3
# With the number of ranks; of four, two are a node.
SHARDINGS = {
    "table_wise": 2,
    "column_wise": 2,
    "row_wise": 2,
    "table_column_wise": 4,
    "table_row_wise": 4,
    "grid_shard": 4,
}
# Of each: the arguments that are sent, as (position, name).
COLLECTIVES = {
    "isend": (0, "tensor"),
    "all_to_all_single": (1, "input"),
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"),
    "all_reduce": (0, "tensor"),
}

Bytes = dict[tuple[str, str], int]


@contextmanager
def counted(leaving: bool) -> Iterator[Bytes]:
    """Bytes that this rank hands to each collective, by its name and the kind of its values.

    Of an exchange, ``"exchange"``, by ``all_to_all_single`` or by sends, those that leave the rank if ``leaving``.
    """
    sent: Bytes = Counter()
    original = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        position, keyword = COLLECTIVES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[position] if len(args) > position else kwargs[keyword]
            for tensor in given if isinstance(given, list) else [given]:
                kind = "floats" if tensor.is_floating_point() else "integers"
                bytes_given = tensor.numel() * tensor.element_size()
                if leaving and name == "all_to_all_single":
                    bytes_given -= kept(*args, **kwargs) * tensor.element_size()
                sent["exchange" if name in ("isend", "all_to_all_single") else name, kind] += bytes_given
            return original[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, function in original.items():
            setattr(dist, name, function)


def kept(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> int:
    """Elements of an ``all_to_all_single`` that a rank hands to itself; a split is of slices along dimension 0."""
    if not input_split_sizes:
        return input.numel() // dist.get_world_size(group)
    return input[: input_split_sizes[dist.get_rank(group)]].numel()


def collection(k: int | None, pooled: bool) -> Any:
    """Three tables of K partitions, or full ones for None."""
    partitions = None if k is None else MixedRadix(balanced=True, num_partitions=k)
    tables = [
        table_of(partitions, pooled, name=f"t{i}", num_embeddings=NUM_IDS, embedding_dim=DIM) for i in range(TABLES)
    ]
    if k is not None:
        return collection_of(tables, "meta")
    return (EmbeddingBagCollection if pooled else EmbeddingCollection)(device=torch.device("meta"), tables=tables)


def sharder_of(k: int | None, pooled: bool) -> Any:
    if k is None:
        return EmbeddingBagCollectionSharder() if pooled else EmbeddingCollectionSharder()
    return CompositionalEmbeddingBagCollectionSharder() if pooled else CompositionalEmbeddingCollectionSharder()


def measured(rank: int, world_size: int, sharding: str, pooled: bool) -> dict[tuple[int | None, int], list[Bytes]]:
    """Bytes of the first and the second step, per K and number of ids a bag."""
    out: dict[tuple[int | None, int], list[Bytes]] = {}
    for k in (None, 2, 3, 4):
        module, sharder = collection(k, pooled), sharder_of(k, pooled)
        cases = [TableCase(f"t{i}", "plain", sharding, dim=DIM) for i in range(TABLES)]
        plan = hand_plan(module, cases, sharder)
        for hot in (1, 10):
            generator = torch.Generator().manual_seed(rank)
            kjt = KeyedJaggedTensor(
                keys=[f"f_t{i}" for i in range(TABLES)],
                values=torch.randint(NUM_IDS, (TABLES * BAGS * hot,), generator=generator),
                lengths=torch.full((TABLES * BAGS,), hot),
            )
            dmp = distributed(Model(collection(k, pooled)), plan, [sharder])
            steps = []
            for _ in range(2):
                # Where rows are split, which rank an id goes to depends on the partitions.
                with counted(leaving=sharding not in ROW_SPLIT) as sent:
                    loss_of(dmp(kjt), world_size).backward()
                steps.append(dict(sent))
            out[k, hot] = steps
    return out


def summed(ranks: list[dict[tuple[int | None, int], list[Bytes]]]) -> dict[tuple[int | None, int], list[Bytes]]:
    """Over ranks, step by step."""
    out = {}
    for case in ranks[0]:
        steps: list[Bytes] = [Counter(), Counter()]
        for rank in ranks:
            for total, step in zip(steps, rank[case], strict=True):
                for kind, sent in step.items():
                    total[kind] += sent
        out[case] = [dict(total) for total in steps]
    return out


@pytest.mark.parametrize(
    ("sharding", "pooled"),
    [*((s, True) for s in SHARDINGS), *((s, False) for s in ("table_wise", "column_wise", "row_wise"))],
)
def test_bytes_are_those_of_full_tables(sharding: str, pooled: bool) -> None:
    """But for the gradients of replicated partitions, which are summed over ranks where rows are split."""
    world_size = SHARDINGS[sharding]
    ranks = run_ranks(measured, world_size, sharding, pooled, local_world_size=2)
    if sharding == "row_wise" and not pooled:
        # An id's embedding comes from the rank of its row, which need not be the one that full tables have it on.
        ranks = [summed(ranks)]
    for rank in ranks:
        for hot in (1, 10):
            stock = rank[None, hot]
            # By hand, so that the counter is known to see all: ids of 8 bytes, and D floats a bag and feature.
            assert sum(n for (_, kind), n in stock[1].items() if kind == "floats") >= 4 * DIM * BAGS * TABLES
            assert stock[1]["exchange", "integers"] >= 8 * BAGS * hot
            for k in (2, 3, 4):
                sizes = MixedRadix(balanced=True, num_partitions=k).bind(NUM_IDS).sizes
                replicated = sum(sizes) - max(sizes) if sharding in ROW_SPLIT else 0
                for step, expected in zip(rank[k, hot], stock, strict=True):
                    own = dict(step)
                    reduced = own.pop(("all_reduce", "floats"), 0)
                    assert own == expected, (k, hot)
                assert reduced == 4 * DIM * TABLES * replicated * (world_size // len(ranks)), (k, hot)


def test_data_parallel_tables_exchange_gradients_alone() -> None:
    for rank in run_ranks(measured, 2, "data_parallel", True):
        for k in (2, 3, 4):
            rows = sum(MixedRadix(balanced=True, num_partitions=k).bind(NUM_IDS).sizes)
            for hot in (1, 10):
                assert rank[k, hot] == [{("all_reduce", "floats"): 4 * DIM * TABLES * rows}] * 2, (k, hot)
