"""From the meta device: tables of a billion rows, and no rank that ever pays for more than its share of a table."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from sharded_model import ROWWISE, SGD, shard, train, weights_of
from torch import Tensor
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, row_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    QuotientRemainder,
)
from torchrec_qr.distributed import get_default_sharders

BILLION = 10**9
COLLISIONS = 31_623
# Of the table whose memory is measured, all rows together: more where the machine has room.
MEASURED_DIM = 64
GIB = int(os.environ.get("TORCHREC_QR_TEST_GIB", "1"))


def config(
    name: str, num_embeddings: int, num_collisions: int, dim: int = 8, grouping: Any = "strided", **fields: Any
) -> CompositionalEmbeddingBagConfig:
    """A table whose only feature has its name."""
    return CompositionalEmbeddingBagConfig(
        name=name,
        feature_names=[name],
        num_embeddings=num_embeddings,
        embedding_dim=dim,
        partitions=QuotientRemainder(num_collisions=num_collisions, grouping=grouping),
        **fields,
    )


def billion_rows(rank: int, world_size: int) -> None:
    configs = [config(f"t_{g}", BILLION, COLLISIONS, grouping=g) for g in ("strided", "adjacent")]
    ids = torch.tensor([0, BILLION - 1, 123_456_789 + rank, 987_654_321])
    batch = KeyedJaggedTensor(
        keys=[f for c in configs for f in c.feature_names],
        values=ids.repeat(2),
        lengths=torch.ones(8, dtype=torch.long),
    )
    rows = -(-BILLION // COLLISIONS)
    classes = {"t_strided": (ids % rows, ids // rows), "t_adjacent": (ids // COLLISIONS, ids % COLLISIONS)}

    def composed(weights: dict[str, Tensor]) -> Tensor:
        table = "collection.embedding_bags.{}.partition_{}.weight".format
        per_table = [weights[table(t, 0)][q] * weights[table(t, 1)][r] for t, (q, r) in classes.items()]
        return torch.cat(per_table, dim=1)

    for sharding in ("table_wise", "row_wise", "data_parallel"):
        model = shard(configs, sharding, ROWWISE)
        before = weights_of(model)
        assert before["collection.embedding_bags.t_strided.partition_0.weight"].shape == (rows, 8)
        # U(-1/√S, 1/√S), by which every rank has drawn rows of its own.
        main = before["collection.embedding_bags.t_strided.partition_0.weight"]
        assert main.abs().max() <= BILLION**-0.5
        torch.testing.assert_close(main.std(), torch.tensor(1 / (3 * BILLION)).sqrt(), rtol=0.02, atol=0)
        out = model(batch)
        torch.testing.assert_close(out, composed(before), rtol=1e-5, atol=1e-12, msg=lambda m, s=sharding: f"{s}: {m}")
        (out - 1).square().mean().backward()
        after = weights_of(model)
        torch.testing.assert_close(model(batch), composed(after), rtol=1e-5, atol=1e-12)
        assert not torch.equal(composed(before), composed(after)), sharding


def test_a_table_of_a_billion_rows_trains_from_meta() -> None:
    run_ranks(billion_rows, 2)


def default_plan(rank: int, world_size: int) -> None:
    tables = [config("t", BILLION, COLLISIONS)]
    collection = CompositionalEmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    model = DistributedModelParallel(collection, device=torch.device("cpu"), sharders=get_default_sharders())
    batch = KeyedJaggedTensor(keys=["t"], values=torch.tensor([BILLION - 1, 5]), lengths=torch.tensor([2]))
    out = model(batch).values()
    assert out.shape == (1, 8)
    assert 0 < out.abs().max() < 3 * BILLION**-0.5


def test_torchrecs_own_planner_places_it() -> None:
    run_ranks(default_plan, 2)


def status(field: str) -> int:
    """Bytes that the kernel reports of this process: ``VmRSS`` resident now, ``VmHWM`` at its peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def storage_in_use() -> int:
    """Bytes of all CPU tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for o in gc.get_objects():
        # By type: asking proxies among the objects for their class would run code of theirs.
        if issubclass(type(o), Tensor) and type(o).__name__ in ("Tensor", "Parameter") and o.device.type == "cpu":
            storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(storages.values())


def trained(rows: int, sharding: str, optimizer: Any) -> DistributedModelParallel:
    configs = [config("t", rows * 100, 100, dim=MEASURED_DIM)]
    model = shard(configs, {"t": column_wise(ranks=[0, 1]) if sharding == "column_wise" else row_wise()}, optimizer)
    train(model, configs, range(1))
    return model


def memory(rank: int, world_size: int, sharding: str, optimizer: Any, gib: int) -> dict[str, float]:
    # What is imported, or mapped from the libraries' files, at first use is the stack's and not a table's.
    trained(100, sharding, optimizer)
    storage_before = storage_in_use()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    resident_before = status("VmRSS")
    rows = gib * 2**30 // (MEASURED_DIM * 4)
    model = trained(rows, sharding, optimizer)
    peak = status("VmHWM") - resident_before
    storage = storage_in_use() - storage_before
    # Half of the main partition; at most all of partition 1, and of one h a row and column shard.
    state = 0 if optimizer is SGD else (rows if sharding == "column_wise" else rows // 2) * 4
    share = rows * MEASURED_DIM * 4 // 2 + 100 * MEASURED_DIM * 4 + state
    assert model.training  # alive until here
    return {"share": share, "peak": peak / share, "storage": storage / share}


@pytest.mark.parametrize(("sharding", "optimizer"), [("column_wise", SGD), ("row_wise", ROWWISE)])
def test_no_rank_pays_for_more_than_its_share(sharding: str, optimizer: Any) -> None:
    # Pages of libraries that are first touched meanwhile count too, and only ever add: the least of three readings.
    readings = []
    for _ in range(3):
        ranks = run_ranks(memory, 2, sharding, optimizer, GIB, timeout=280, alone=True)
        for rank, used in enumerate(ranks):
            assert used["share"] > GIB * 2**29
            assert 0.99 < used["storage"] < 1.01, (rank, used)
        readings.append(max(used["peak"] for used in ranks))
        if readings[-1] < 1.15:
            return
    raise AssertionError(f"peaks of {readings} times a rank's share")


def kept_whole(rank: int, world_size: int) -> dict[str, list[float]]:
    """Tables that no plan places, in a model that is sharded: torch calls them data-parallel."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = CompositionalEmbeddingBagCollection(
                device=torch.device("meta"),
                tables=[
                    config("t", 10_000, 10, init="identity"),
                    EmbeddingBagConfig(name="plain", feature_names=["plain"], num_embeddings=100, embedding_dim=8),
                ],
            )

        def forward(self, features: KeyedJaggedTensor) -> Tensor:
            return self.ebc(features).values()

    model = DistributedModelParallel(Model(), device=torch.device("cpu"), plan=ShardingPlan({}), sharders=[])
    weights = {name.split("embedding_bags.")[1]: p.detach() for name, p in model.named_parameters()}
    return {name: [p.min().item(), p.max().item(), p.sum().item()] for name, p in weights.items()}


def test_tables_that_are_not_sharded_start_as_their_config_says() -> None:
    first, second = run_ranks(kept_whole, 2)
    assert first == second
    assert first["t.partition_0.weight"][:2] == pytest.approx([-0.01, 0.01], rel=0.01)
    assert first["t.partition_1.weight"][:2] == pytest.approx([1, 1], abs=0.05)
    assert first["plain.weight"][:2] == pytest.approx([-0.1, 0.1], rel=0.05)
