"""Sending pooled embeddings between processes on CPUs, against TorchRec's own way."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torchrec.distributed.comm_ops import get_gradient_division, set_gradient_division
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist

from torchrec_qr.distributed.pooled_all_to_all import PooledAllToAll, without_copies

CPU = torch.device("cpu")


def output_dist(dims: list[int]) -> TwPooledEmbeddingDist:
    group = dist.group.WORLD
    assert group is not None
    return TwPooledEmbeddingDist(group, dims, [[d] for d in dims], torch.device("cpu"), [torch.neg])


def sent(rank: int, world_size: int, dims: list[int], sizes: list[int]) -> list[list[list[list[float]]]]:
    """Outputs and gradients of TorchRec's output dist, of ours, and of both without division of gradients."""
    # Rounded divisions tell whether they are made once, of the same numbers.
    generator = torch.Generator().manual_seed(rank)
    local = torch.randn(sum(sizes), dims[rank], generator=generator)
    upstream = torch.randn(sizes[rank], sum(dims), generator=generator)
    context = EmbeddingShardingContext(batch_size_per_rank=sizes)
    divided, out = get_gradient_division(), []
    for divide in (True, False):
        set_gradient_division(divide)
        for made in (output_dist(dims), without_copies(output_dist(dims), CPU)):
            given = local.clone().requires_grad_()
            result = made(given, context).wait()
            result.backward(upstream)
            assert given.grad is not None
            out.append([result.tolist(), given.grad.tolist()])
    set_gradient_division(divided)
    assert isinstance(made, PooledAllToAll)
    return out


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [([8, 4], [3, 3]), ([8, 0], [3, 3]), ([0, 0], [2, 2]), ([8, 4, 12], [2, 2, 2]), ([4, 8, 0, 16], [2, 1, 3, 2])],
)
def test_values_and_gradients_are_those_of_torchrec(dims: list[int], sizes: list[int]) -> None:
    for stock, ours, stock_undivided, ours_undivided in run_ranks(sent, len(dims), dims, sizes):
        assert ours == stock
        assert ours_undivided == stock_undivided


def in_flight(rank: int, world_size: int) -> list[list[list[float]]]:
    """Two batches of which the second is sent before the first is waited for, and backward in that order."""
    made = without_copies(output_dist([2, 1]), CPU)
    local = [torch.full((4, 2 - rank), 10.0 * rank + number, requires_grad=True) for number in (1, 2)]
    awaited = [made(x) for x in local]
    outputs = [a.wait() for a in awaited]
    for number, out in enumerate(outputs):
        (out * (number + 1) * (rank + 1)).sum().backward()
    return [*(o.tolist() for o in outputs), *(x.grad.tolist() for x in local if x.grad is not None)]


def test_two_batches_may_be_under_way() -> None:
    ranks = run_ranks(in_flight, 2)
    for rank, (first, second, *gradients) in enumerate(ranks):
        assert first == [[-1.0, -1.0, -11.0]] * 2
        assert second == [[-2.0, -2.0, -12.0]] * 2
        columns = 2 - rank
        # By W: rank 0 weighs its samples 1, rank 1 weighs its own 2; the second batch counts twice.
        assert gradients[0] == [[-0.5] * columns] * 2 + [[-1.0] * columns] * 2
        assert gradients[1] == [[-1.0] * columns] * 2 + [[-2.0] * columns] * 2


def unanswered(rank: int, world_size: int) -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    message = ""
    if rank == 0:
        awaited = PooledAllToAll(group, [2, 1], [])(torch.ones(4, 2))
        try:
            awaited.wait()
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return message


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_groups_timeout() -> None:
    message, _ = run_ranks(unanswered, 2)
    assert "Timed out" in message


def test_one_process_keeps_torchrecs_output_dist() -> None:
    assert run_ranks(kept, 1) == [True]


def kept(rank: int, world_size: int) -> bool:
    made = without_copies(output_dist([4]), CPU)
    return isinstance(made, TwPooledEmbeddingDist)
