"""The poisoning group itself: it catches what NCCL punishes, and gives gloo's values to who waits."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from poison_compare import assert_same_order
from poison_group import JOURNAL, Collective, register
from ranks import run_ranks
from torch import Tensor
from torch.futures import collect_all

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.uint8)


def early_and_late(rank: int, world_size: int) -> list[str]:
    """Returns the reads without a wait that see the sum over ranks, 3, all the same."""
    seen = []
    for dtype in (*FLOATS, *INTEGERS):

        def ordered(how: Callable[[dist.Work, Tensor], None], dtype: torch.dtype = dtype) -> bool:
            value = torch.full((2,), rank + 1, dtype=dtype)
            how(dist.all_reduce(value, async_op=True), value)
            return value.tolist() == [3, 3]

        def callback(of: Callable[[dist.Work], torch.futures.Future]) -> Callable[[dist.Work, Tensor], None]:  # type: ignore[type-arg]
            def read(work: dist.Work, value: Tensor) -> None:
                early: list[bool] = []
                of(work).then(lambda _: early.append(value.tolist() == [3, 3]))
                assert len(early) == 1, "NCCL's futures are complete at once"
                if not early[0]:
                    value.zero_()

            return read

        seen += [
            f"{dtype} {what}"
            for what, how in {
                "read at once": lambda work, value: None,
                "asked whether it is complete": lambda work, value: work.is_completed(),
                "future taken, not waited for": lambda work, value: work.get_future(),
                "future of futures waited for": lambda work, value: collect_all([work.get_future()]).wait(),
                "callback of a future of futures": callback(lambda work: collect_all([work.get_future()])),
            }.items()
            if ordered(how)
        ]
        for what, how in {
            "work": lambda work, value: work.wait(),
            "future": lambda work, value: work.get_future().wait(),
            "callback": callback(lambda work: work.get_future()),
        }.items():
            assert ordered(how), f"{dtype}: {what}"
    return seen


@pytest.mark.filterwarnings("ignore")
def test_only_who_waits_for_the_very_work_sees_the_sum() -> None:
    for seen in run_ranks(early_and_late, 2, backend=register):
        assert seen == []


def collectives(rank: int, world_size: int) -> dict[str, list[float]]:
    """Each collective that TorchRec, DDP and DCP use, once."""
    mine = torch.arange(4.0) + 10 * rank
    out: dict[str, Tensor] = {}
    out["all_to_all"] = torch.empty(4 if rank else 2)
    dist.all_to_all_single(out["all_to_all"], torch.arange(3.0) + 10 * rank, [rank + 1] * 2, [1, 2])
    out["all_gather_into_tensor"] = torch.empty(8)
    dist.all_gather_into_tensor(out["all_gather_into_tensor"], mine)
    out["reduce_scatter_tensor"] = torch.empty(2)
    dist.reduce_scatter_tensor(out["reduce_scatter_tensor"], mine)
    parts = [torch.empty(4), torch.empty(4)]
    dist.all_gather(parts, mine)
    out["all_gather"] = torch.cat(parts)
    out["reduce_scatter"] = torch.empty(2)
    dist.reduce_scatter(out["reduce_scatter"], list(mine.split(2)))
    out["broadcast"] = mine.clone()
    dist.broadcast(out["broadcast"], src=1)
    out["max"] = mine.clone()
    dist.all_reduce(out["max"], dist.ReduceOp.MAX)
    objects: list[object] = [None, None]
    dist.all_gather_object(objects, f"rank {rank}")
    assert objects == ["rank 0", "rank 1"]
    gathered: list[object] | None = [None, None] if rank == 1 else None
    dist.gather_object(f"rank {rank}", gathered, dst=1)
    assert gathered == (["rank 0", "rank 1"] if rank == 1 else None)
    scattered: list[object] = [None]
    dist.scatter_object_list(scattered, ["first", "second"] if rank == 0 else None, src=0)
    assert scattered == [["first", "second"][rank]]
    dist.barrier()
    return {name: value.tolist() for name, value in out.items()}


def test_values_are_gloo_s() -> None:
    assert run_ranks(collectives, 2, backend=register) == run_ranks(collectives, 2)


def meddling(rank: int, world_size: int) -> list[str]:
    sent, received = torch.ones(2), torch.empty(4)
    work = dist.all_gather_into_tensor(received, sent, async_op=True)
    sent.add_(1)
    received[0] = 5
    work.wait()
    # The values are of the time when the collective was issued, and what was written is overwritten.
    assert received.tolist() == [1.0] * 4
    work = dist.all_reduce(sent, async_op=True)
    sent.mul_(2)
    assert sent.isnan().all()
    work.wait()
    assert sent.tolist() == [4.0] * 2
    return list(JOURNAL.violations)


def test_what_touches_a_tensor_under_way_is_noted() -> None:
    for violations in run_ranks(meddling, 2, backend=register):
        assert violations == [
            "allgather over ranks (0, 1): its input was changed before anybody waited",
            "allgather over ranks (0, 1): its output was written to before anybody waited",
        ]


def issued(
    kind: str, sent: tuple[int, ...], received: tuple[int, ...] = (), group: tuple[int, ...] = (0, 1)
) -> Collective:
    return Collective(kind, group, "torch.float32", sent, received or sent)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([issued("allreduce", (4,))], [issued("allreduce", (4,))] * 2, r"\[1, 2\] collectives"),
        ([issued("allreduce", (4,))], [issued("allgather", (4,))], "collective 0"),
        ([issued("allreduce", (4,))], [issued("allreduce", (5,))], "collective 0"),
        ([issued("alltoall", (1, 2), (1, 3))], [issued("alltoall", (2, 5), (2, 5))], "collective 0"),
        (
            [issued("allreduce", (1,)), issued("allreduce", (1,), group=(1, 0))],
            [issued("allreduce", (1,), group=(1, 0)), issued("allreduce", (1,))],
            "different orders",
        ),
    ],
)
def test_another_order_is_found(first: list[Collective], second: list[Collective], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_order([first, second])


def test_sizes_that_fit_differ_between_ranks_of_an_exchange() -> None:
    assert_same_order([[issued("alltoall", (1, 2), (1, 3))], [issued("alltoall", (3, 5), (2, 5))]])
