"""TorchRec 1.9's ``mark_data_parallel_skip_grad_sync``: data-parallel tables are stepped by each rank for itself."""

from typing import Any

import pytest
import torch
from parity_model import Run, TableCase, shard_run
from ranks import run_ranks
from sharded_model import loss_of, own_weights
from torch.nn.parallel import DistributedDataParallel
from torchrec.modules import embedding_modules

mark: Any = getattr(embedding_modules, "mark_data_parallel_skip_grad_sync", None)


def run_of(optimizer: str, pooled: bool) -> Run:
    tables = [
        TableCase("dp", "strided", "data_parallel", plan="hand"),
        TableCase("dp_path", "strided", "data_parallel", operation="path", plan="hand"),
        TableCase("rw", "strided", "row_wise", plan="hand"),
    ]
    return Run(tuple(tables), optimizer=optimizer, pooled=pooled)


def trained(rank: int, world_size: int, run: Run, marked: bool, part: int | None = None) -> dict[str, Any]:
    """The weights after some steps on the rank's part of the batches, or on that of rank ``part`` of two."""
    module = run.collection("meta")
    if marked:
        mark(module)
    dmp = shard_run(run, collection=module)
    for step in range(run.steps):
        batch = run.batch(step)
        mine = batch.part(rank, world_size) if part is None else batch.part(part, 2)
        loss_of(dmp(mine.kjt(run.weighted)), 1).backward()
    return own_weights(dmp)


@pytest.mark.skipif(mark is None, reason="this TorchRec has no mark_data_parallel_skip_grad_sync, which 1.9 brought")
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequences"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_marked_tables_are_stepped_by_the_gradients_of_their_rank(optimizer: str, pooled: bool) -> None:
    run = run_of(optimizer, pooled)
    marked, reduced = run_ranks(trained, 2, run, True), run_ranks(trained, 2, run, False)
    alone = [run_ranks(trained, 1, run, False, part)[0] for part in range(2)]
    for key in alone[0]:
        for rank in range(2):
            # Row-wise tables are stepped as without the mark, their replicated partitions too.
            expected = reduced[rank] if ".rw." in key else alone[rank]
            for (*_, value), (*_, other) in zip(marked[rank][key], expected[key], strict=True):
                torch.testing.assert_close(
                    torch.from_numpy(value), torch.from_numpy(other), rtol=1e-5, atol=1e-6, msg=lambda m, k=key: k + m
                )
        if ".dp" in key:
            (*_, one), (*_, other) = marked[0][key][0], marked[1][key][0]
            assert abs(one - other).max() > 1e-3, f"{key}: the ranks' batches differ, and so must what they train"


def unwrapped(rank: int, world_size: int, run: Run) -> str:
    collection: Any = shard_run(run).module.collection
    for i, lookup in enumerate(collection._lookups):
        if isinstance(lookup, DistributedDataParallel):
            collection._lookups[i] = lookup.module
    with pytest.raises(RuntimeError) as raised:
        collection._replicate_lookups()
    return str(raised.value)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequences"])
def test_a_lookup_that_nobody_wrapped_is_refused(pooled: bool) -> None:
    (message,) = run_ranks(unwrapped, 1, run_of("sgd", pooled))
    assert "has not wrapped the lookup of data_parallel tables ['dp', 'dp_path'] in DistributedDataParallel" in message
