"""How fast a process trains."""

import time

import torch.distributed as dist

_Clocks = tuple[float, float]


class Speed:
    """Adds up rows and seconds of training steps.

    Attributes:
        waited (float): seconds in which this rank waited for data.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._samples = 0
        self._seconds = self._cpu_seconds = 0.0

    def now(self) -> _Clocks:
        """Returns the clocks at which a step starts."""
        return time.perf_counter(), time.process_time()

    def add(self, started: _Clocks, samples: int) -> None:
        """Adds a step that ends now.

        Args:
            started (tuple[float, float]): what `now` returned at its start.
            samples (int): rows that this rank trained in it.
        """
        ended = self.now()
        self._seconds += ended[0] - started[0]
        self._cpu_seconds += ended[1] - started[1]
        self._samples += samples * dist.get_world_size()

    @property
    def samples_per_s(self) -> float:
        """Rows of all ranks per second spent in training steps."""
        return self._samples / self._seconds if self._seconds else 0.0

    @property
    def cpu_us_per_sample(self) -> float:
        """Processor time of this process, all threads together, per row that it trained: on a busy host steadier."""
        return 1e6 * self._cpu_seconds * dist.get_world_size() / self._samples if self._samples else 0.0

    @property
    def waited_share(self) -> float:
        """The share of this rank's waiting for data in the time spent in training steps."""
        return self.waited / self._seconds if self._seconds else 0.0
