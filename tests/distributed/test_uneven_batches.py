"""The last batch of an epoch: 3 samples on one rank and 1 on the other."""

import pytest
import torch
from ranks import run_ranks
from sharded_model import DIM, shard, two_tables, unsharded
from torchrec import KeyedJaggedTensor

SIZES = (3, 1)


def train_on(rank: int, world_size: int, sharding: str) -> tuple[str, bool]:
    """Returns what training raises, or nothing, and whether all outputs were right."""
    configs = two_tables()
    values = unsharded(configs)
    model = shard(configs, sharding, values=values)
    n = SIZES[rank]
    ids = torch.arange(2 * n) + 10 * rank
    batch = KeyedJaggedTensor(["f_a", "f_b"], ids, lengths=torch.ones(2 * n, dtype=torch.int64))
    expected = values(batch)
    with torch.no_grad():
        right = torch.allclose(model(batch), expected)
    try:
        out = model(batch)
        right &= torch.allclose(out, expected) and out.shape == (n, 2 * DIM)
        out.sum().backward()
    except ValueError as error:
        return str(error), right
    return "", right


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "data_parallel"])
def test_whole_rows_train_on_them(sharding: str) -> None:
    assert run_ranks(train_on, 2, sharding) == [("", True)] * 2


@pytest.mark.parametrize("sharding", ["row_wise", "table_row_wise"])
def test_split_rows_name_the_sizes_on_every_rank_before_gloo_fails(sharding: str) -> None:
    for message, right in run_ranks(train_on, 2, sharding):
        assert right
        assert message.startswith("tables 'a', 'b': batches of [3, 1] samples on the ranks, in order")
