"""Errors of memory that does not suffice, which name the tables of the rank and the changes that would fit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from torchrec_qr.ops.out_of_memory import bytes_wanted, free_text, in_units, is_out_of_memory

_SHOWN = 5
_WOULD_FIT = (
    "more ranks; other sharding types or ranks of the largest tables (planner.constraints); fewer rows of them "
    "(partitions with more compression, or num_embeddings); a smaller train.batch_size. `torchrec-qr plan --config "
    "FILE --topology NxM --device NAME --fit` finds the least compression that fits, without a GPU"
)


@contextmanager
def tables_named(doing: str, held: Mapping[str, int], device: torch.device) -> Iterator[None]:
    """Adds to an error of memory the tables of this rank and the changes that would fit.

    Args:
        doing (str): the present work of the rank.
        held (Mapping[str, int]): bytes of values per table of this rank; see `launch.table_bytes`.
        device (torch.device): of this rank.

    Raises:
        OutOfMemoryError: torch's, also for a CPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = described(doing, error, held, f"{device}, which has {free_text(device)} free")
        raise torch.OutOfMemoryError(f"rank {dist.get_rank()}, {text}") from error


def described(doing: str, error: BaseException, held: Mapping[str, int], place: str) -> str:
    """Returns the message of an error of memory.

    Example:
        >>> error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")
        >>> held = {"t_country": 2**20, "t_user": 60 * 2**30}
        >>> print(described("step 3", error, held, "cuda:0, which has 1.2 GiB free"))  # doctest: +ELLIPSIS
        step 3: out of memory: 2.00 GiB wanted of cuda:0, which has 1.2 GiB free. Tables of this rank, largest first,
        values alone: t_user 60.0 GiB, t_country 1.0 MiB; in all 60.0 GiB. These would fit: more ranks; ...
    """
    largest = sorted(held.items(), key=lambda item: -item[1])
    tables = ", ".join(f"{name} {in_units(size)}" for name, size in largest[:_SHOWN]) or "none"
    if rest := largest[_SHOWN:]:
        tables += f", and {len(rest)} more"
    return (
        f"{doing}: out of memory: {_cause(error)}{bytes_wanted(error) or 'memory'} wanted of {place}. Tables of this "
        f"rank, largest first, values alone: {tables}; in all {in_units(sum(held.values()))}. These would fit: "
        f"{_WOULD_FIT}"
    )


def _cause(error: BaseException) -> str:
    """Returns the table and a comma if the library has named one, else nothing."""
    text = str(error)
    return f"{text.partition(':')[0]}, " if text.startswith("table ") else ""
