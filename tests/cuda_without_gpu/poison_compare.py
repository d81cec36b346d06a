"""What poison must not change: the values of gloo, to the bit, and the reference's; and what ranks must agree upon."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from parity_model import EPS, Pieces, Run, TableCase, assembled, global_batch
from parity_reference import Reference
from poison_group import Collective
from poison_tables import DENSE, DENSE_EPS, Outcome, parts_of
from torch import Tensor

# How far three steps may lead from exact ones, of storage in 16 bits: relative to a value, and to the largest.
_ROUNDED = {"FP32": 1e-5, "FP16": 4e-3, "BF16": 4e-2}


def assert_same(actual: Outcome, expected: Outcome, run: Run, table: TableCase) -> None:
    """Outputs, weights and optimizer state of a table are equal bit for bit, and numbers."""
    found, wanted = (dict(_of_table(outcome, run, table)) for outcome in (actual, expected))
    assert found.keys() == wanted.keys()
    assert len(found) >= run.steps
    for what, value in wanted.items():
        assert value.isfinite().all(), f"{what} on gloo: {value}"
        assert found[what].isfinite().all(), f"{what} has been computed from what had not arrived: {found[what]}"
        assert torch.equal(found[what], value), f"{what}: {found[what]}, on gloo {value}"


class Exact:
    """The float64 reference of a run, against which the outcomes of its ranks are held table by table."""

    def __init__(self, run: Run, ranks: list[Outcome], max_gradient: float = float("inf")) -> None:
        self._run, self._ranks = run, ranks
        reference = Reference(replace(run, optimizer=DENSE.get(run.optimizer, run.optimizer)), ranks[0].columns)
        reference.max_gradient = max_gradient
        reference.eps = DENSE_EPS if run.optimizer in DENSE else EPS
        # By step and rank, as `Outcome.outputs` has them by name.
        self._outputs = []
        for step in range(run.steps):
            batch = global_batch(run, step)
            outputs = reference.step(batch, len(ranks))
            self._outputs.append([parts_of(run, batch.part(r, len(ranks)), out) for r, out in enumerate(outputs)])
        self._weights = list(reference.weights())
        self._state = [] if run.optimizer in DENSE else list(reference.optimizer_state())

    def assert_close(self, table: TableCase) -> None:
        rtol = _ROUNDED[table.data_type]
        for step, of_ranks in enumerate(self._outputs):
            for r, parts in enumerate(of_ranks):
                for (name, of, _), value in zip(self._run.outputs(), parts, strict=True):
                    if of == table:
                        found = torch.from_numpy(self._ranks[r].outputs[name][step])
                        _assert_close(found.double(), value, rtol, f"step {step}, rank {r}: {name}")
        for kind, exact in (("state", self._weights), ("optimizer_state", self._state)):
            found_all = assembled([_pieces_of_table(getattr(rank, kind), table) for rank in self._ranks])
            for key, of, value in exact:
                if of == table:
                    _assert_close(found_all[key], value, rtol, key)


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


def _of_table(outcome: Outcome, run: Run, table: TableCase) -> Iterator[tuple[str, Tensor]]:
    for name, of, _ in run.outputs():
        if of == table:
            yield from ((f"{name} of step {i}", torch.from_numpy(v)) for i, v in enumerate(outcome.outputs[name]))
    for state in (outcome.state, outcome.optimizer_state):
        for key, pieces in _pieces_of_table(state, table).items():
            yield from ((f"{key} at {at}", torch.from_numpy(value)) for _, at, value in pieces)


def _pieces_of_table(state: dict[str, Pieces], table: TableCase) -> dict[str, Pieces]:
    return {key: pieces for key, pieces in state.items() if f".{table.name}." in key}


def _assert_close(actual: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=rtol * scale + 1e-12, msg=lambda message: f"{what}: {message}"
    )
