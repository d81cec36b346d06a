"""The cost of a shard or of a rank, in bytes and milliseconds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """The estimated cost of one step on one rank.

    Args:
        parameters (float): bytes of table values.
        optimizer (float): bytes of optimizer state.
        maps (float): bytes of class maps.
        buffers (float): bytes of ids, outputs, and gradients of replicas.
        host (float): bytes in the host's memory, for TorchRec's UVM kernels.
        lookup_ms (float): ms to read, compose, pool and step rows, forward and backward.
        comms_ms (float): ms to send ids and embeddings between ranks.
        reduce_ms (float): ms to all-reduce and apply the gradients of replicas.

    Example:
        >>> from torchrec_qr.planner import Cost
        >>> both = Cost(parameters=4096, lookup_ms=0.5) + Cost(buffers=1024, comms_ms=0.25)
        >>> both.memory, both.work_ms
        (5120.0, 0.75)
    """

    parameters: float = 0.0
    optimizer: float = 0.0
    maps: float = 0.0
    buffers: float = 0.0
    host: float = 0.0
    lookup_ms: float = 0.0
    comms_ms: float = 0.0
    reduce_ms: float = 0.0

    @property
    def memory(self) -> float:
        """The bytes of the device's memory."""
        return self.parameters + self.optimizer + self.maps + self.buffers

    @property
    def work_ms(self) -> float:
        """The ms of all three parts, which plans balance over ranks."""
        return self.lookup_ms + self.comms_ms + self.reduce_ms

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def times(self, factor: float) -> "Cost":
        """Returns the cost with every part multiplied by ``factor``."""
        return Cost(*(factor * getattr(self, name) for name in self.__slots__))


NO_COST = Cost()
