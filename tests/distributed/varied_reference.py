"""The outcomes of `varied_runs`, held against the float64 reference table by table."""

from dataclasses import replace

import torch
from near import assert_near
from parity_model import EPS, Run, TableCase, global_batch
from parity_reference import Reference
from pieces import Pieces, assembled
from varied_runs import DENSE, DENSE_EPS, Outcome, parts_of

# How far three steps may lead from exact ones, of storage in 16 bits: relative to a value, and to the largest.
_ROUNDED = {"FP32": 1e-5, "FP16": 4e-3, "BF16": 4e-2}


class Exact:
    """The float64 reference of a run, against which the outcomes of its ranks are held table by table."""

    def __init__(self, run: Run, ranks: list[Outcome], max_gradient: float = float("inf")) -> None:
        self._run, self._ranks = run, ranks
        reference = Reference(replace(run, optimizer=DENSE.get(run.optimizer, run.optimizer)), ranks[0].columns)
        reference.max_gradient = max_gradient
        reference.eps = DENSE_EPS if run.optimizer in DENSE else EPS
        # They are by step and rank, where `Outcome.outputs` has them by name.
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
                        assert_near(found, value, rtol, f"step {step}, rank {r}: {name}")
        for kind, exact in (("state", self._weights), ("optimizer_state", self._state)):
            found_all = assembled([pieces_of_table(getattr(rank, kind), table) for rank in self._ranks])
            for key, of, value in exact:
                if of == table:
                    assert_near(found_all[key], value, rtol, key)


def pieces_of_table(state: dict[str, Pieces], table: TableCase) -> dict[str, Pieces]:
    return {key: pieces for key, pieces in state.items() if f".{table.name}." in key}
