"""Gradients of replicated fp16 partitions: they are divided before they are summed, whose sum fp16 may not hold."""

import torch
from ranks import run_ranks
from sharded_model import DIM, SGD, shard, table
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import QuotientRemainder

LARGE = 40_000.0  # on each of two ranks; their sum is infinite in fp16


def stepped(rank: int, world_size: int) -> list[tuple[float, float]]:
    """Least and largest change of the rows of id 3, per partition."""
    configs = [table("narrow", QuotientRemainder(num_collisions=5), "add", data_type=DataType.FP16)]
    model = shard(configs, "data_parallel", SGD)
    before = {name: value.clone() for name, value in model.state_dict().items() if "partition" in name}
    ids = KeyedJaggedTensor(["f_narrow"], torch.tensor([3]), lengths=torch.tensor([1]))
    out = model(ids)
    out.backward(torch.full((1, DIM), LARGE))
    changes = []
    for name, value in model.state_dict().items():
        if "partition" in name:
            row = (value - before[name]).abs().amax(dim=1).argmax()
            change = (value - before[name])[row].float()
            changes.append((float(change.min()), float(change.max())))
    return changes


def test_the_average_of_large_gradients_is_finite() -> None:
    for changes in run_ranks(stepped, 2):
        # The rate is 0.05; near 2,000 fp16 has steps of 1 or 2.
        assert len(changes) == 2
        for low, high in changes:
            assert -2002 <= low <= high <= -1998
