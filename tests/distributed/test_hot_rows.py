"""A row that one batch uses 5,000 times, in every type, placement and optimizer: sums are made in fp32.

A sum in bf16 stops at 256, and one in fp16 at 2,048; the step of such a row then loses up to 95 %.
"""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from ranks import run_ranks
from sharded_model import ADAGRAD, ROWWISE, SGD, shard, table, weights_of
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import MixedRadix, QuotientRemainder
from torchrec_qr.ops.cpu_library import without_kernels

HOT, USES = 7, 5000
OPTIMIZERS = (SGD, ADAGRAD, ROWWISE, EmbOptimType.ADAM)
TYPES = (DataType.FP32, DataType.FP16, DataType.BF16)
# One step at rate 0.05 is rounded to the storage type.
TOLERANCE = {DataType.FP32: 1e-5, DataType.FP16: 2e-3, DataType.BF16: 1.6e-2}


def configs(data_type: DataType) -> list[Any]:
    """K = 2 by kernels, K = 5 and path by PyTorch."""
    made = [
        table("pair_mult", QuotientRemainder(num_collisions=5), "mult"),
        table("pair_add", QuotientRemainder(num_collisions=5), "add"),
        table("pair_concat", QuotientRemainder(num_collisions=5), "concat", partition_dims=[16, 8]),
        table("many_mult", MixedRadix(sizes=(3, 3, 3, 3, 1)), "mult"),
        table("many_add", MixedRadix(sizes=(3, 3, 3, 3, 1)), "add"),
        table("class_path", QuotientRemainder(num_collisions=5), "path", path_hidden=None),
    ]
    return [replace(c, data_type=data_type) for c in made]


def batch(tables: list[Any], weighted: bool) -> KeyedJaggedTensor:
    """Per table ten bags of 500 hot ids each; weights of 1 + 1/1024, which bf16 rounds to 1."""
    n = USES * len(tables)
    return KeyedJaggedTensor(
        [f for t in tables for f in t.feature_names],
        torch.full((n,), HOT),
        lengths=torch.full((10 * len(tables),), USES // 10),
        weights=torch.full((n,), 1 + 1 / 1024) if weighted else None,
    )


def changes(rank: int, world_size: int, sharding: str, kernels: bool) -> dict[str, list[float]]:
    """Per case and partition, the largest error of a step against that of an fp32 table of the same values."""
    out: dict[str, list[float]] = {}
    for data_type, optimizer in product(TYPES, OPTIMIZERS):
        tables = configs(data_type)
        values = {}
        for name, stored in (("reference", DataType.FP32), ("tested", data_type)):
            own = [replace(t, data_type=stored) for t in tables]
            model = shard(own, sharding, optimizer, is_weighted=True)
            with torch.no_grad():
                # Values that every type holds, and maps close to the identity, so that nothing overflows.
                state = {
                    k: torch.full_like(v, 0.0 if "path.partition_1" in k else 1.0) if v.is_floating_point() else v
                    for k, v in weights_of(model).items()
                }
            model.load_state_dict(state)
            before = weights_of(model)
            run = batch(own, True)
            with nullcontext() if kernels else without_kernels():
                model(run).backward(torch.full((10, 24 * len(own)), 2.0**-10))
            after = weights_of(model)
            values[name] = {k: (after[k].float(), before[k].float()) for k in after if "partition" in k}
        for key, (after, before) in values["tested"].items():
            expected, start = values["reference"][key]
            assert torch.equal(start, before)
            scale = (expected - start).abs().max().clamp(min=1e-3)
            out.setdefault(f"{data_type.name} {optimizer.name}", []).append(
                float((after - expected).abs().max() / torch.maximum(scale, expected.abs().max()))
            )
    dist.barrier()
    return out


@pytest.mark.parametrize(
    ("sharding", "kernels"),
    [
        *((sharding, True) for sharding in ("table_wise", "row_wise", "data_parallel")),
        pytest.param("column_wise", True, marks=pytest.mark.slow),
        *(
            pytest.param(s, False, marks=pytest.mark.slow)
            for s in ("table_wise", "row_wise", "column_wise", "data_parallel")
        ),
    ],
)
def test_a_hot_row_takes_its_whole_step(sharding: str, kernels: bool) -> None:
    for of_rank in run_ranks(changes, 2, sharding, kernels):
        assert len(of_rank) == len(TYPES) * len(OPTIMIZERS)
        for case, errors in of_rank.items():
            assert max(errors) <= TOLERANCE[DataType[case.split()[0]]], (case, errors)
