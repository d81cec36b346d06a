"""What a plan costs: bytes and milliseconds, of a shard, of a rank, of everything."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step on one rank.

    Args:
        parameters: bytes of table values.
        optimizer: bytes of optimizer state.
        maps: bytes of explicit maps.
        buffers: bytes of ids, outputs, and gradients of replicated partitions.
        host: bytes outside of the device's memory (TorchRec's UVM kernels).
        lookup_ms: of reading, composing, pooling and stepping rows, forward and backward.
        exchange_ms: of ids and embeddings between ranks.
        reduce_ms: of gradients of what is replicated.

    Example:
        >>> from torchrec_qr.planner import Cost
        >>> both = Cost(parameters=4096, lookup_ms=0.5) + Cost(buffers=1024, exchange_ms=0.25)
        >>> both.memory, both.work_ms
        (5120.0, 0.75)
    """

    parameters: float = 0.0
    optimizer: float = 0.0
    maps: float = 0.0
    buffers: float = 0.0
    host: float = 0.0
    lookup_ms: float = 0.0
    exchange_ms: float = 0.0
    reduce_ms: float = 0.0

    @property
    def memory(self) -> float:
        """Bytes of the device's memory."""
        return self.parameters + self.optimizer + self.maps + self.buffers

    @property
    def work_ms(self) -> float:
        """All of a rank's time: what plans balance."""
        return self.lookup_ms + self.exchange_ms + self.reduce_ms

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def times(self, factor: float) -> "Cost":
        return Cost(*(factor * getattr(self, name) for name in self.__slots__))


NO_COST = Cost()
