"""The queue of checks whose verdict comes from a device, later."""

import threading
from collections.abc import Callable

import pytest

import torchrec_qr
from torchrec_qr import late_errors
from torchrec_qr.late_errors import LateErrors


class Flag:
    """An arrival set by hand; waiting for it sets it, as waiting for a device does."""

    def __init__(self) -> None:
        self.arrived = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True


def failing(what: str) -> Callable[[], None]:
    def check() -> None:
        raise IndexError(what)

    return check


def passing() -> None:
    pass


def test_a_check_is_run_once_it_has_arrived() -> None:
    errors, flag = LateErrors(), Flag()
    errors.add(failing("a"), flag)
    errors.raise_failed(wait=False)  # not arrived: not looked at
    assert len(errors) == 1
    flag.arrived = True
    with pytest.raises(IndexError, match="a"):
        errors.raise_failed(wait=False)
    errors.raise_failed(wait=True)  # raised once
    assert len(errors) == 0


def test_waiting_runs_all() -> None:
    errors, flag = LateErrors(), Flag()
    errors.add(failing("a"), flag)
    with pytest.raises(IndexError, match="a"):
        errors.raise_failed(wait=True)
    assert flag.arrived


def test_the_oldest_failure_comes_first_and_those_behind_it_stay() -> None:
    errors, flags = LateErrors(), [Flag() for _ in range(4)]
    for flag, check in zip(flags, (passing, failing("b"), passing, failing("d")), strict=True):
        errors.add(check, flag)
        flag.arrived = True
    with pytest.raises(IndexError, match="b"):
        errors.raise_failed(wait=False)
    assert len(errors) == 2
    with pytest.raises(IndexError, match="d"):
        errors.raise_failed(wait=True)
    assert len(errors) == 0


def test_a_check_that_never_arrives_holds_up_no_other() -> None:
    errors, never, arrived = LateErrors(), Flag(), Flag()
    errors.add(failing("a"), never)
    errors.add(failing("b"), arrived)
    arrived.arrived = True
    with pytest.raises(IndexError, match="b"):
        errors.raise_failed(wait=False)
    assert len(errors) == 1


def test_threads_take_every_check_once() -> None:
    errors, taken = LateErrors(), []
    for number in range(2000):
        flag = Flag()
        flag.arrived = True
        errors.add(lambda number=number: taken.append(number), flag)  # type: ignore[misc]
    threads = [threading.Thread(target=errors.raise_failed, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(taken) == list(range(2000))


def test_the_library_has_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrec_qr.raise_pending()
    queue = LateErrors()
    monkeypatch.setattr(late_errors, "_late", queue)
    queue.add(failing("of the kernels"), Flag())
    torchrec_qr.raise_pending(wait=False)
    with pytest.raises(IndexError, match="of the kernels"):
        torchrec_qr.raise_pending()
