"""Errors of data: the problem, and its file and line."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

OnBadRow = Literal["error", "skip"]


class DataError(Exception):
    """Data cannot be used: a file that is missing, unreadable or malformed, or a row that is.

    Attributes:
        location (str): ``file`` or ``file:line``, counted from 1.
        problem (str): what is wrong there.

    Example:
        >>> print(DataError("day_0.gz:17", "label is '2'; allowed: 0, 1"))
        day_0.gz:17: label is '2'; allowed: 0, 1
    """

    def __init__(self, location: str, problem: str) -> None:
        super().__init__(location, problem)
        self.location = location
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.location}: {self.problem}"


@contextmanager
def readable(path: str | Path, content: str = "", *errors: type[Exception]) -> Iterator[None]:
    """Turns errors of reading a file into `DataError`.

    Args:
        path (str | Path): of the file.
        content (str): what the file should be, such as ``"Parquet"``.
        errors (type[Exception]): beside the operating system's, those that mean that it is not.

    Example:
        >>> with readable("meaning.json", "JSON", ValueError):
        ...     int("{")
        Traceback (most recent call last):
        ...
        launch.data.errors.DataError: meaning.json: not JSON, or corrupt: invalid literal for int() with base 10: '{'
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(str(path), "no such file") from error
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror or error}") from error
    except errors as error:
        raise DataError(str(path), f"not {content}, or corrupt: {error}") from error


class BadRows:
    """Malformed rows of one pass over data: an error at once, or counted and left out.

    Args:
        policy (OnBadRow): ``"error"``: `report` raises; ``"skip"``: it counts.

    Example:
        >>> bad = BadRows("skip")
        >>> bad.report("train.txt:3", "2 columns; allowed: 40")
        >>> bad.count, bad.first
        (1, 'train.txt:3: 2 columns; allowed: 40')
    """

    def __init__(self, policy: OnBadRow) -> None:
        self.policy = policy
        self.count = 0
        self.first: str | None = None
        self._lock = threading.Lock()

    def report(self, location: str, problem: str | Callable[[], str]) -> None:
        """Raises DataError, or counts one row.

        Args:
            location (str): ``file:line``.
            problem (str | Callable[[], str]): what is wrong; a function is called if the text is needed.
        """
        with self._lock:
            self.count += 1
            if self.first is not None:
                return
            error = DataError(location, problem if isinstance(problem, str) else problem())
            if self.policy == "error":
                raise error
            self.first = str(error)

    def require_good(self, good: int, location: str) -> None:
        """Checks that a pass had a row that counts.

        Args:
            good (int): rows of all ranks that counted.
            location (str): of the rows.

        Raises:
            DataError: there was none.
        """
        if good == 0:
            first = f", the first: {self.first}" if self.first else ""
            raise DataError(location, f"no row that was read is good{first}")
