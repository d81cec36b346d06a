"""The last batch of an epoch: 3 samples on one rank and 1 on the other."""

import pytest
import torch
from ranks import run_ranks
from sharded_model import DIM, shard, two_tables, unsharded
from torchrec import KeyedJaggedTensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

SIZES = (3, 1)


def train_on(rank: int, world_size: int, sharding: str, quantised: bool = False) -> tuple[str, bool]:
    """Returns what training raises, or nothing, and whether all outputs were right."""
    configs = two_tables()
    values = unsharded(configs)
    codecs = None
    if quantised:
        config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
        codecs = get_qcomm_codecs_registry(config, device=torch.device("cpu"))
    model = shard(configs, sharding, values=values, codecs=codecs)
    n, tolerance = SIZES[rank], 1e-3 if quantised else 1e-5
    ids = torch.arange(2 * n) + 10 * rank
    batch = KeyedJaggedTensor(["f_a", "f_b"], ids, lengths=torch.ones(2 * n, dtype=torch.int64))
    expected = values(batch)
    with torch.no_grad():
        right = torch.allclose(model(batch), expected, rtol=tolerance)
    try:
        out = model(batch)
        right &= torch.allclose(out, expected, rtol=tolerance) and out.shape == (n, 2 * DIM)
        out.sum().backward()
    except ValueError as error:
        return str(error), right
    return "", right


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "row_wise", "data_parallel"])
def test_ranks_train_on_them(sharding: str) -> None:
    assert run_ranks(train_on, 2, sharding) == [("", True)] * 2


@pytest.mark.parametrize(("sharding", "quantised"), [("table_row_wise", False), ("row_wise", True)])
def test_what_gloo_cannot_gather_names_the_sizes_on_every_rank(sharding: str, quantised: bool) -> None:
    for message, right in run_ranks(train_on, 2, sharding, quantised):
        assert right
        assert message.startswith("tables 'a', 'b': batches of [3, 1] bags of a feature on the ranks, in order")
