"""Work that runs ahead of its consumer, in a thread of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Prefetched(Iterator[T], Generic[T]):
    """Iterates over what ``make()`` yields, up to ``depth`` items ahead.

    An exception of ``make`` is raised where its item would have come. `close`, or the end, ends the thread.

    Attributes:
        wait_seconds (float): how long the consumer has waited for items so far.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int) -> None:
        self.wait_seconds = 0.0
        self._depth = depth
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._changed = threading.Condition()
        # Make it a daemon, because a process that ends by an error of its own must not wait for data.
        self._thread = threading.Thread(target=self._run, args=(make,), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended or self._closed)
            self.wait_seconds += time.perf_counter() - started
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread, which leaves out what it has not yet yielded; iteration ends."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._error = None
            self._changed.notify_all()
        # Do not join from the thread itself, where a generator that holds this may be collected.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, make: Callable[[], Iterator[T]]) -> None:
        items: Iterator[T] | None = None
        try:
            items = make()
            for item in items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._items) < self._depth or self._closed)
                    if self._closed:
                        break
                    self._items.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            close = getattr(items, "close", None)  # of a generator: what it holds open
            if close is not None:
                close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()


def mapped(function: Callable[[S], T], items: Iterable[S], threads: int) -> Generator[T, None, None]:
    """Yields ``function(item)`` of each item, in order, several of them being worked on at once.

    Example:
        >>> list(mapped(abs, [3, -2, -1], threads=2))
        [3, 2, 1]
    """
    own: set[int] = set()
    pool = ThreadPoolExecutor(threads, function.__name__, initializer=lambda: own.add(threading.get_ident()))
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Do not wait if this is collected on one of the threads, because none can join itself.
        pool.shutdown(wait=threading.get_ident() not in own, cancel_futures=True)
