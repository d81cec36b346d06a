"""A checkpoint of another table is refused by its name, and nothing of it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from ranks import run_ranks
from sharded_model import NUM_IDS, shard, table, train, unsharded, weights_of
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    ExplicitPartitions,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.distributed.checkpoint import load


def explicit(shift: int) -> ExplicitPartitions:
    ids = (torch.arange(NUM_IDS) + shift) % NUM_IDS
    return ExplicitPartitions(torch.stack([ids % 12, ids // 12]))


# The table that was saved, the one it is loaded into, and what the message says: `test_fingerprint` has every field.
OTHER_TABLES = {
    "map": (table("t", explicit(0), "mult"), table("t", explicit(1), "mult"), "map_hash: saved"),
    "sizes": (
        table("t", QuotientRemainder(num_collisions=6), "mult"),
        table("t", QuotientRemainder(num_collisions=5), "mult"),
        r"sizes: saved \[10, 6\], here \[12, 5\]",
    ),
    "K": (
        table("t", MixedRadix(sizes=[10, 6]), "mult"),
        table("t", MixedRadix(sizes=[5, 4, 3]), "mult"),
        r"sizes: saved \[10, 6\], here \[5, 4, 3\]",
    ),
    "hash": (
        table("t", MixedRadix(sizes=[10, 6]), "mult"),
        table("t", MixedRadix(sizes=[10, 6]), "mult", id_hash="splitmix64"),
        "id_hash: saved none, here splitmix64",
    ),
}


def refuse_sharded(rank: int, world_size: int, folder: Path) -> None:
    for name, (saved, here, message) in OTHER_TABLES.items():
        values = unsharded([here])
        for i, sharding in enumerate(("table_wise", "row_wise")):
            path = folder / f"{name}-{i}"
            dcp.save({"model": shard([saved], sharding)}, checkpoint_id=path)
            model = shard([here], sharding, values=values)
            with pytest.raises(ValueError, match=rf"table 't': the checkpoint is of another table: .*{message}"):
                load({"model": model}, checkpoint_id=path)
            assert_all_close(weights_of(model), dict(sorted(values.state_dict().items())), f"{name}: nothing is loaded")
            if name == "map":
                with pytest.raises(ValueError, match=rf"table 't': .*{message}"):
                    dcp.load({"model": model}, checkpoint_id=path)
                # DCP has overwritten what lies in the model by then, but a later checkpoint must tell the truth.
                assert torch.equal(
                    model.state_dict()["collection.embedding_bags.t.fingerprint"],
                    values.state_dict()["collection.embedding_bags.t.fingerprint"],
                )
            else:
                with pytest.raises(
                    dcp.api.CheckpointException, match=r"(?s)(mismatch|Missing key).*embedding_bags\.t\."
                ):
                    dcp.load({"model": model}, checkpoint_id=path)


def test_a_checkpoint_of_another_table_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(refuse_sharded, 2, tmp_path)


def strided_or_adjacent(grouping: Any) -> list[CompositionalEmbeddingBagConfig]:
    """A table that is the same in both, and two after it of equal sizes and another meaning."""
    first = table("first", QuotientRemainder(num_collisions=7), "mult")
    return [
        first,
        *(table(name, QuotientRemainder(num_collisions=6, grouping=grouping), "mult") for name in ("t", "u")),
    ]


def refuse_all_or_nothing(rank: int, world_size: int, folder: Path) -> None:
    saved, here = strided_or_adjacent("strided"), strided_or_adjacent("adjacent")
    values = unsharded(saved)
    dcp.save({"model": shard(saved, "row_wise", values=values)}, checkpoint_id=folder)
    for sharding in ("table_wise", "row_wise", "data_parallel"):
        model = shard(here, sharding, values=unsharded(here, seed=2))
        train(model, here, range(1))
        before = weights_of(model)
        state = {name: value.clone() for name, value in values.state_dict().items()}
        with pytest.raises(ValueError, match=r"table 't': .*grouping: saved strided, here adjacent"):
            model.load_state_dict(dict(state))
        with pytest.raises(ValueError, match=r"table 't': .*grouping: saved strided, here adjacent"):
            set_model_state_dict(model.module, dict(state))
        assert_all_close(weights_of(model), before, f"{sharding}: nothing is loaded")
        # DCP writes into the model before it asks: afterwards the model says what it is, of every table.
        with pytest.raises(ValueError, match="table 't': "):
            dcp.load({"model": model}, checkpoint_id=folder)
        for name in (f"collection.embedding_bags.{t}.fingerprint" for t in ("first", "t", "u")):
            assert torch.equal(model.state_dict()[name], before[name]), name


def test_of_a_collection_all_tables_are_loaded_or_none(tmp_path: Path) -> None:
    run_ranks(refuse_all_or_nothing, 2, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_of_an_unsharded_collection_all_tables_are_loaded_or_none(tmp_path: Path) -> None:
    saved, module = (
        unsharded(strided_or_adjacent("strided")),
        unsharded(strided_or_adjacent("adjacent"), seed=2).collection,
    )
    before = {k: v.clone() for k, v in module.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(ValueError, match=r"table 't': .*grouping: saved strided, here adjacent"):
            module.load_state_dict(saved.collection.state_dict(), assign=assign)
        assert_all_close(module.state_dict(), before, "nothing is loaded")
    dcp.save({"model": saved.collection}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="table 't': "):
        dcp.load({"model": module}, checkpoint_id=tmp_path)
    for name in (f"embedding_bags.{t}.fingerprint" for t in ("first", "t", "u")):
        assert torch.equal(module.state_dict()[name], before[name]), name


@pytest.mark.parametrize("name", OTHER_TABLES)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_another_table_is_refused_by_an_unsharded_module(name: str, tmp_path: Path) -> None:
    saved, here, message = OTHER_TABLES[name]
    dcp.save({"model": CompositionalEmbeddingBagCollection(tables=[saved])}, checkpoint_id=tmp_path)
    module = CompositionalEmbeddingBagCollection(tables=[here])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=rf"table 't': the checkpoint is of another table: .*{message}"):
        load({"model": module}, checkpoint_id=tmp_path)
    assert_all_close(module.state_dict(), before, "nothing is loaded")
    if name == "map":
        with pytest.raises(ValueError, match=rf"table 't': .*{message}"):
            dcp.load({"model": module}, checkpoint_id=tmp_path)
        assert torch.equal(module.state_dict()["embedding_bags.t.fingerprint"], before["embedding_bags.t.fingerprint"])
