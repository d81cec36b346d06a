"""Generators that hold threads may be collected on one of these, and end all the same."""

import gc
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from launch.data.prefetch import Prefetched, mapped


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Python could only print, since it happened while an object was collected."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: found.append(repr(args.exc_value)))
    return found


def test_mapped_is_collected_on_a_thread_of_its_own(unraisable: list[Any]) -> None:
    suspended, collected = threading.Event(), threading.Event()
    held: list[Iterator[int]] = []

    def work(item: int) -> int:
        if item == 1:
            suspended.wait(10)
            held.clear()
            gc.collect()
            collected.set()
        return item

    held.append(mapped(work, [0, 1, 2], threads=1))
    assert next(held[0]) == 0
    suspended.set()
    assert collected.wait(10)
    assert held == []
    assert unraisable == []


def test_prefetched_is_collected_on_its_own_thread(unraisable: list[Any]) -> None:
    suspended, collected = threading.Event(), threading.Event()
    held: list[Iterator[int]] = []

    def items() -> Iterator[int]:
        yield 0
        suspended.wait(10)
        held.clear()
        gc.collect()
        collected.set()
        yield 1

    def consumer() -> Iterator[int]:
        with Prefetched(items, depth=1) as ahead:
            yield from ahead

    held.append(consumer())
    assert next(held[0]) == 0
    suspended.set()
    assert collected.wait(10)
    assert held == []
    assert unraisable == []
