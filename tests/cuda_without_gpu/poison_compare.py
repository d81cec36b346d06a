"""Poison must leave gloo's values as they are, to the bit, and ranks must agree upon their collectives."""

from collections.abc import Iterator

import torch
from parity_model import Run, TableCase, Trained
from parity_reference import pieces_of_table
from poison_group import Collective
from torch import Tensor


def assert_same(actual: Trained, expected: Trained, run: Run, table: TableCase) -> None:
    """Outputs, weights and optimizer state of a table are equal bit for bit, and numbers."""
    found, wanted = (dict(_of_table(outcome, run, table)) for outcome in (actual, expected))
    assert found.keys() == wanted.keys()
    assert len(found) >= run.steps
    for what, value in wanted.items():
        assert value.isfinite().all(), f"{what} on gloo: {value}"
        assert found[what].isfinite().all(), f"{what} has been computed from what had not arrived: {found[what]}"
        assert torch.equal(found[what], value), f"{what}: {found[what]}, on gloo {value}"


def assert_same_order(ranks: list[list[Collective]]) -> None:
    """The ranks of a group issue the same collectives in the same order, of sizes that fit: NCCL hangs otherwise."""
    for group in dict.fromkeys(c.group for issued in ranks for c in issued):
        of_each = [[c for c in ranks[rank] if c.group == group] for rank in group]
        for number, together in enumerate(zip(*of_each, strict=False)):
            what = f"group {group}, collective {number}: {together}"
            assert len({(c.kind, c.dtype) for c in together}) == 1, what
            match together[0].kind:
                case "alltoall":
                    for i, sender in enumerate(together):
                        assert [receiver.received[i] for receiver in together] == list(sender.sent), what
                case "gather":  # one rank receives
                    assert len({c.sent for c in together}) == 1, what
                case "scatter":  # one rank sends
                    assert len({c.received for c in together}) == 1, what
                case _:
                    assert len({(c.sent, c.received) for c in together}) == 1, what
        counts = [len(issued) for issued in of_each]
        assert len(set(counts)) == 1, f"group {group}: its ranks issue {counts} collectives"
    # Across the groups of two ranks, too, because kernels of two communicators that wait for one another hang as well.
    for a in range(len(ranks)):
        for b in range(a):
            first, second = ([(c.group, c.kind) for c in ranks[r] if {a, b} <= set(c.group)] for r in (a, b))
            assert first == second, f"ranks {b} and {a} take their groups in different orders"


def _of_table(outcome: Trained, run: Run, table: TableCase) -> Iterator[tuple[str, Tensor]]:
    for name, of, _ in run.outputs():
        if of == table:
            yield from ((f"{name} of step {i}", torch.from_numpy(v)) for i, v in enumerate(outcome.outputs[name]))
    for state in (outcome.state, outcome.optimizer_state):
        for key, pieces in pieces_of_table(state, table).items():
            yield from ((f"{key} at {at}", torch.from_numpy(value)) for _, at, value in pieces)
