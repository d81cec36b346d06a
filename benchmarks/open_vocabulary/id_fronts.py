"""Functions that turn raw ids into a table's ids, each with the bytes of what it has to keep."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule

from benchmarks.open_vocabulary.daily_rows import Day

UNKNOWN = 0
BYTES_OF_VOCABULARY_ID = 8  # as in a run's vocabulary.npz, where the place of a value is its id
_SIGN = 2**63 - 1


class IdFront(Protocol):
    """A module that stands in front of a table."""

    def start(self, day: Day) -> None:
        """Gets the rows of the day that is to be trained."""

    def __call__(self, raw: Tensor, training: bool) -> Tensor:
        """Returns ids of the table for raw ones (n, H), and may learn from them in training."""

    def renewed(self) -> Tensor | None:
        """Returns the rows whose ids the last call has replaced, or None."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that it keeps, which grow with ids or with the table."""


class Stateless:
    """A function of the id alone, with nothing to keep."""

    kept_bytes = 0

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def start(self, day: Day) -> None: ...

    def __call__(self, raw: Tensor, training: bool) -> Tensor:
        return self._function(raw)

    def renewed(self) -> Tensor | None:
        return None


def modulo(rows: int) -> Stateless:
    """Returns id mod rows, the id without its sign bit."""
    return Stateless(lambda raw: (raw & _SIGN) % rows)


def as_they_are() -> Stateless:
    """Returns raw ids, which a table with ``id_hash`` takes."""
    return Stateless(lambda raw: raw)


class KnownIds:
    """A vocabulary of the training days: the most frequent id first after `UNKNOWN`, ids of later days after those.

    Args:
        capacity: S, ids beyond which are `UNKNOWN`.
        grows: whether each day that is to be trained adds its ids; otherwise the first one alone does.
    """

    def __init__(self, capacity: int, grows: bool) -> None:
        self._capacity, self._grows = capacity, grows
        self._sorted = torch.empty(0, dtype=torch.int64)
        self._ids = torch.empty(0, dtype=torch.int64)

    def start(self, day: Day) -> None:
        if len(self._sorted) and not self._grows:
            return
        values, counts = torch.unique(day.raw, return_counts=True)
        new = ~self._known(values)[1]
        values, counts = values[new], counts[new]
        values = values[torch.argsort(counts, descending=True, stable=True)]
        first = len(self._sorted) + 1
        values = values[: max(self._capacity - first, 0)]
        both = torch.cat([self._sorted, values])
        ids = torch.cat([self._ids, torch.arange(first, first + len(values))])
        self._sorted, order = both.sort()
        self._ids = ids[order]

    def __call__(self, raw: Tensor, training: bool) -> Tensor:
        place, known = self._known(raw)
        return torch.where(known, self._ids[place], UNKNOWN)

    def renewed(self) -> Tensor | None:
        return None

    @property
    def kept_bytes(self) -> int:
        return len(self._sorted) * BYTES_OF_VOCABULARY_ID

    def _known(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self._sorted):
            return torch.zeros_like(values), torch.zeros_like(values, dtype=torch.bool)
        place = torch.searchsorted(self._sorted, values).clamp_(max=len(self._sorted) - 1)
        return place, self._sorted[place] == values


class ManagedIds:
    """TorchRec's managed collisions, as `ManagedCollisionEmbeddingBagCollection` calls them in front of its tables.

    Args:
        module: of the table.
        config: of the table.
        resets: whether rows of replaced ids start anew, as in TorchRec's sharded class; its unsharded one leaves the
            new id the row as it is.
    """

    def __init__(self, module: ManagedCollisionModule, config: EmbeddingBagConfig, resets: bool) -> None:
        self._collection = ManagedCollisionCollection({config.name: module}, [config])
        self._features, self._resets = list(config.feature_names), resets
        self._renewed: Tensor | None = None

    def start(self, day: Day) -> None: ...

    def __call__(self, raw: Tensor, training: bool) -> Tensor:
        self._collection.train(training)
        num_features = len(self._features)
        values = raw.unflatten(0, (num_features, -1))
        lengths = torch.full((num_features * values.shape[1],), values.shape[2], dtype=torch.int32)
        ids = self._collection(KeyedJaggedTensor(self._features, values.reshape(-1), lengths=lengths))
        (evicted,) = self._collection.evict().values()
        self._renewed = evicted if self._resets else None
        return ids.values().view_as(raw)

    def renewed(self) -> Tensor | None:
        return self._renewed

    @property
    def kept_bytes(self) -> int:
        # Leave out the history of some batches, because it does not grow with the table.
        return sum(
            buffer.numel() * buffer.element_size()
            for name, buffer in self._collection.named_buffers()
            if "_history_" not in name and "_output_segments" not in name
        )
