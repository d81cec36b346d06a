"""A full table for a compositional one, and partitions for a plain one, are refused by name, and nothing is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from ranks import run_ranks
from sharded_model import DIM, NUM_IDS, plain_named, shard, table, unsharded, weights_of
from single_tables import collection_of, plain_table, table_of
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torchrec import EmbeddingBagCollection, EmbeddingCollection

from torchrec_qr import QuotientRemainder
from torchrec_qr.distributed.checkpoint import load
from torchrec_qr.inference import materialize, to_plain

SPEC = QuotientRemainder(num_collisions=4)
FULL = (
    r"table 't': the checkpoint has '(model\.)?(collection\.)?embedding(_bag)?s\.t\.weight', a full table, and the "
    r"table here is compositional; allowed: its partitions, .*\.partition_0\.weight' and so on\. To start from a full "
    r"table, load it into TorchRec's own collection, and call torchrec_qr\.compress_\(model, partitions, fit=True\)"
)
PARTITIONS = (
    r"table 't': the checkpoint has '(model\.)?(collection\.)?embedding(_bag)?s\.t\.partition_0\.weight', of a "
    r"compositional table, and the table here is plain; allowed: a full table, .*\.t\.weight'\. For full rows, load "
    r"the checkpoint into a collection with the compositional config, and call torchrec_qr\.inference\.to_plain"
)


def torchrec_collection(pooled: bool) -> nn.Module:
    make: Any = EmbeddingBagCollection if pooled else EmbeddingCollection
    return make(tables=[plain_table(pooled, name=name) for name in ("a", "t")])


def cases(pooled: bool) -> list[tuple[nn.Module, nn.Module, str]]:
    """Returns what is saved, what it is loaded into, and the error. Table a is the same in both."""
    first = plain_table(pooled, name="a")
    compositional = collection_of([first, table_of(SPEC, pooled)])
    plain = collection_of([first, plain_table(pooled, name="t", feature_names=["f"])])
    return [(torchrec_collection(pooled), compositional, FULL), (compositional, plain, PARTITIONS)]


LOADS: dict[str, Callable[[nn.Module, dict[str, Any]], object]] = {
    "strict": lambda module, state: module.load_state_dict(state),
    "not strict": lambda module, state: module.load_state_dict(state, strict=False),
    "assign": lambda module, state: module.load_state_dict(state, strict=False, assign=True),
    "of torch.distributed": lambda module, state: set_model_state_dict(
        module, state, options=StateDictOptions(strict=False)
    ),
}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("how", LOADS)
def test_a_state_dict_of_the_other_form_is_refused(how: str, pooled: bool) -> None:
    for saved, here, message in cases(pooled):
        before = {k: v.clone() for k, v in here.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            LOADS[how](here, saved.state_dict())
        assert_all_close(here.state_dict(), before, "nothing is loaded")


def test_a_part_of_a_model_refuses_it_too() -> None:
    """The keys then begin with the name of the part."""
    for saved, here, message in cases(pooled=True):
        model, state = nn.Module(), nn.Module()
        model.collection, state.collection = here, saved
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state.state_dict(), strict=False)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_the_other_form_is_refused(pooled: bool, tmp_path: Path) -> None:
    for i, (saved, here, message) in enumerate(cases(pooled)):
        before = {k: v.clone() for k, v in here.state_dict().items()}
        dcp.save({"model": saved}, checkpoint_id=tmp_path / str(i))
        with pytest.raises(ValueError, match=message):
            load({"model": here}, checkpoint_id=tmp_path / str(i), no_dist=True)
        with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: model\..*\.t\."):
            dcp.load({"model": here}, checkpoint_id=tmp_path / str(i))
        assert_all_close(here.state_dict(), before, "nothing is loaded")


def refuse_sharded(rank: int, world_size: int, folder: Path) -> None:
    partitions, full = [table("t", SPEC, "mult")], [plain_named("t")]
    for i, (saved, here, message) in enumerate([(full, partitions, FULL), (partitions, full, PARTITIONS)]):
        state = unsharded(saved).state_dict()
        dcp.save({"model": shard(saved, "table_wise")}, checkpoint_id=folder / str(i))
        values = unsharded(here)
        model = shard(here, "row_wise", values=values)
        for strict in (True, False):
            with pytest.raises(ValueError, match=message):
                model.load_state_dict(dict(state), strict=strict)
        with pytest.raises(ValueError, match=message):
            load({"model": model}, checkpoint_id=folder / str(i))
        assert_all_close(weights_of(model), dict(sorted(values.state_dict().items())), "nothing is loaded")
    for call in (to_plain, lambda collection: materialize(collection, "t")):
        with pytest.raises(TypeError, match=r"ShardedCompositional.* is sharded; allowed: the unsharded collection\. "):
            call(model.module.collection)


def test_a_sharded_model_refuses_it_on_every_rank(tmp_path: Path) -> None:
    run_ranks(refuse_sharded, 2, tmp_path)


def test_full_rows_load_into_torchrec_and_into_a_plain_table_of_ours() -> None:
    """This is the way that the errors name."""
    own = unsharded([table("t", SPEC, "mult")]).collection
    state = to_plain(own).state_dict()
    here = collection_of([plain_named("t")])
    here.load_state_dict(state)
    assert torch.equal(here.embedding_bags["t"].weight, materialize(own, "t"))
    assert state["embedding_bags.t.weight"].shape == (NUM_IDS, DIM)
