"""Compositional tables are looked up together: one group of them per sharding type, rank and data type."""

from dataclasses import fields
from typing import Any

import pytest
from parity_model import Run, TableCase, shard_run
from ranks import run_ranks
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from torchrec_qr.distributed.sharding import POOLED_SHARDINGS, SEQUENCE_SHARDINGS

NUM_TABLES = 26
OPERATIONS = ("mult", "add", "concat", "path")


def tables(sharding: str, pooled: bool) -> tuple[TableCase, ...]:
    """Tables of all operations, two data types and two poolings, and a plain one that must stay apart."""
    split = sharding in ("column_wise", "table_column_wise", "grid_shard")
    operations = OPERATIONS[:3] if split else OPERATIONS
    return (
        *(
            TableCase(
                f"t{i}",
                "strided",
                sharding,
                operation=operations[i % len(operations)],
                pooling=("sum", "mean")[i % 5 == 0],
                data_type=("FP32", "BF16")[i // 2 % 2],
                out_of_range=("error", "wrap")[i % 3 == 0],
                plan="hand",
            )
            for i in range(NUM_TABLES)
        ),
        # FBGEMM cannot look up a plain table without pooling that is data-parallel on a CPU.
        *((TableCase("plain", "plain", sharding, plan="hand"),) if pooled or sharding != "data_parallel" else ()),
    )


Groups = list[list[tuple[str, str, list[str]]]]


def groups(rank: int, world_size: int, pooled: bool) -> dict[str, Groups]:
    """Per sharding type and rank, in the eyes of this one: kernel, data type and tables of each group."""
    out: dict[str, Groups] = {}
    for sharding in POOLED_SHARDINGS if pooled else SEQUENCE_SHARDINGS:
        dmp = shard_run(Run(tables(sharding, pooled), pooled=pooled))
        collection: Any = dmp.module.collection
        (of_all,) = collection._embedding_shardings if pooled else collection._sharding_type_to_sharding.values()
        per_rank = of_all._grouped_embedding_configs_per_rank
        out[sharding] = [
            [
                (group.compute_kernel.value, group.data_type.value, sorted({t.name for t in group.embedding_tables}))
                for group in of_rank
            ]
            for of_rank in per_rank
        ]
        for table in (t for of_rank in per_rank for group in of_rank for t in group.embedding_tables):
            assert set(vars(table)) == {field.name for field in fields(table)}, "TorchRec's objects keep their fields"
        plan: Any = dmp.plan.plan["collection"]
        kernels = {entry.compute_kernel for entry in plan.values()}
        assert kernels == {"dense" if sharding == "data_parallel" else "fused"}, "the plan stays as it is"
    return out


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequences"])
def test_one_group_per_sharding_type_rank_and_data_type(pooled: bool) -> None:
    first, second = run_ranks(groups, 2, pooled)
    assert first == second
    assert set(first) == set(POOLED_SHARDINGS if pooled else SEQUENCE_SHARDINGS)
    customized = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
    for sharding, of_ranks in first.items():
        found: dict[str, set[str]] = {"FP32": set(), "BF16": set()}
        for of_rank in of_ranks:
            ours = [(data_type, names) for kernel, data_type, names in of_rank if kernel == customized]
            assert sorted(data_type for data_type, _ in ours) == ["BF16", "FP32"], sharding
            assert all(names == ["plain"] for kernel, _, names in of_rank if kernel != customized), sharding
            for data_type, names in ours:
                found[data_type].update(names)
        assert found == {
            "FP32": {f"t{i}" for i in range(NUM_TABLES) if i % 4 < 2},
            "BF16": {f"t{i}" for i in range(NUM_TABLES) if i % 4 >= 2},
        }, sharding
