"""The float64 reference of the runs of `parity_model`: the oracle forward, then `optimizer_reference`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import oracle
import torch
from cases import oracle_of
from near import assert_near
from optimizer_reference import ROWWISE, STATES, OptimizerReference, gradient_of, zero_state
from parity_model import DENSE, DENSE_EPS, NOT_PLAIN, ROW_SPLIT, Batch, Run, TableCase, Trained, parts_of
from pieces import Pieces, assembled
from sharded_model import EPS, LR
from torch import Tensor


class Reference:
    """The run in float64 on one machine: the oracle forward and textbook optimizers.

    Rowwise Adagrad keeps one accumulator per row *and column shard* where columns are split, as TorchRec does: so it
    depends on ``columns``, the plan's blocks of logical columns. So do the second moments of partial rowwise rules and
    the norms of LAMB. Under ``concat`` a partition has those parts of the blocks that fall into its own columns.
    Partitions that all ranks hold whole have one accumulator per row.
    """

    def __init__(self, run: Run, columns: dict[str, list[tuple[int, int]]] | None = None) -> None:
        self.run = run
        self._columns = columns or {}
        collection = run.initial()
        modules = collection.embedding_bags if run.pooled else collection.embeddings
        self.prefix = f"collection.{'embedding_bags' if run.pooled else 'embeddings'}"
        self.tables: dict[str, oracle.OracleTable] = {}
        for case, config in zip(run.tables, run.configs(), strict=True):
            if case.kind == "plain":
                weight = modules[case.name].weight.detach().double().requires_grad_()
                self.tables[case.name] = oracle.OracleTable(lambda x: (x,), [weight], "add", case.pooling)
            else:
                self.tables[case.name] = oracle_of(config, case.of_kind(), modules[case.name])
        self._states: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        self._steps = 0
        self.lr, self.eps, self.max_gradient = LR, EPS, float("inf")
        self.loss_scale = 1.0

    def forward(self, batch: Batch) -> Tensor:
        """Outputs as `Model` returns them."""
        outputs = []
        for _, case, feature in self.run.outputs():
            table = self.tables[case.name]
            bags = [[_bounded(x, case) for x in bag] for bag in batch.ids[feature]]
            if self.run.pooled:
                weights = [torch.tensor(w).double() for w in batch.weights[feature]] if self.run.weighted else None
                outputs.append(table.pool(bags, weights))
            else:
                outputs += [table.embed(x) for bag in bags for x in bag]
        if self.run.pooled:
            return torch.cat(outputs, dim=1)
        return torch.cat(outputs) if outputs else torch.zeros(0, dtype=torch.float64)

    def step(self, batch: Batch, world_size: int = 1) -> list[Tensor]:
        """One step on the global batch; returns the outputs of each rank."""
        outs = [self.forward(batch.part(rank, world_size)) for rank in range(world_size)]
        loss = sum(self.loss_scale * loss_of_exactly(out) for out in outs)
        if isinstance(loss, Tensor) and loss.requires_grad:  # not where no rank has ids
            loss.backward()
        self._steps += 1
        optimizer = OptimizerReference(
            self.run.optimizer, self.lr, self.eps, self.max_gradient, self.run.weight_decay, self.run.mode
        )
        with torch.no_grad():
            for case in self.run.tables:
                ids = {_bounded(x, case) for f in case.feature_names for bag in batch.ids[f] for x in bag}
                for j, weight in enumerate(self.tables[case.name].weights):
                    rows = torch.tensor(sorted({self.tables[case.name].rows_of(x)[j] for x in ids}), dtype=torch.int64)
                    blocks = self._blocks(case, j)
                    if (case.name, j) not in self._states:
                        self._states[case.name, j] = [zero_state(self.run.optimizer, weight[:, a:b]) for a, b in blocks]
                    gradient = gradient_of(weight)
                    for (a, b), state in zip(blocks, self._states[case.name, j], strict=True):
                        optimizer.step(weight[:, a:b], gradient[:, a:b], state, rows, self._steps)
                    weight.grad = None
        return [out.detach() for out in outs]

    def average_with(self, other: "Reference") -> None:
        """Gives both the mean of their weights and states."""
        with torch.no_grad():
            for name, table in self.tables.items():
                pairs = list(zip(table.weights, other.tables[name].weights, strict=True))
                for j in range(len(table.weights)):
                    of_blocks = zip(self._states[name, j], other._states[name, j], strict=True)
                    pairs += [(own[state], of_other[state]) for own, of_other in of_blocks for state in own]
                for a, b in pairs:
                    a.copy_((a + b) / 2)
                    b.copy_(a)

    def _blocks(self, case: TableCase, j: int) -> list[tuple[int, int]]:
        """The blocks of a partition's own columns of which each has accumulators of its own."""
        config, logical = case.config(self.run.pooled), self._columns.get(case.name)
        if self.run.optimizer not in (*ROWWISE, "lamb"):
            logical = None
        if case.kind == "plain":
            return logical or [(0, case.dim)]
        width = config.partition_columns[j]
        has_replica = case.sharding.removesuffix("_per_node") in ROW_SPLIT and j != config.base_partition
        if logical is None or case.operation == "path" or has_replica:
            return [(0, width)]
        first = sum(config.partition_columns[:j]) if case.operation == "concat" else 0
        cut = [(max(a - first, 0), min(b - first, width)) for a, b in logical]
        return [(a, b) for a, b in cut if a < b]

    def weights(self) -> Iterator[tuple[str, TableCase, Tensor]]:
        """Final values by the key of the sharded ``state_dict``."""
        for case in self.run.tables:
            for j, weight in enumerate(self.tables[case.name].weights):
                yield f"{self._key(case, j)}.weight", case, weight.detach()

    def optimizer_state(self) -> Iterator[tuple[str, TableCase, Tensor]]:
        """State by key and name; accumulators of column shards end to end, as TorchRec shows them."""
        cases = {case.name: case for case in self.run.tables}
        for (name, j), of_blocks in self._states.items():
            case = cases[name]
            own = name if case.kind == "plain" else f"{name}.partition_{j}"
            for state in STATES[self.run.optimizer]:
                blocks = [of[state] for of in of_blocks]
                yield f"{self._key(case, j)}.weight {own}.{state}", case, torch.cat(blocks, dim=blocks[0].dim() - 1)
            if self.run.optimizer in NOT_PLAIN:
                yield f"{self._key(case, j)}.weight {own}.step", case, torch.tensor(self._steps, dtype=torch.float64)

    def _key(self, case: TableCase, j: int) -> str:
        return f"{self.prefix}.{case.name}" if case.kind == "plain" else f"{self.prefix}.{case.name}.partition_{j}"


def loss_of_exactly(out: Tensor) -> Tensor:
    return 0.1 * (out**2).sum()


def _bounded(x: int, case: TableCase) -> int:
    if case.out_of_range == "clamp":
        return min(max(x, 0), case.num_ids - 1)
    return x % case.num_ids if case.out_of_range == "wrap" else x


# How far three steps may lead from exact ones, of storage in 16 bits: relative to a value, and to the largest.
ROUNDED = {"FP32": 1e-5, "FP16": 4e-3, "BF16": 4e-2}


class Exact:
    """The float64 reference of a run, against which what its ranks trained is held table by table."""

    def __init__(
        self,
        run: Run,
        ranks: list[Trained],
        learning_rates: list[float] | None = None,
        max_gradient: float = float("inf"),
    ) -> None:
        self._run, self._ranks = run, ranks
        reference = Reference(replace(run, optimizer=DENSE.get(run.optimizer, run.optimizer)), ranks[0].columns)
        reference.max_gradient = max_gradient
        reference.eps = DENSE_EPS if run.optimizer in DENSE else EPS
        self._outputs = []  # by step and rank, where `Trained.outputs` has them by name
        for step in range(run.steps):
            reference.lr = learning_rates[step] if learning_rates else LR
            batch = run.batch(step)
            outputs = reference.step(batch, len(ranks))
            self._outputs.append([parts_of(run, batch.part(r, len(ranks)), out) for r, out in enumerate(outputs)])
        self._weights = list(reference.weights())
        self._state = [] if run.optimizer in DENSE else list(reference.optimizer_state())
        assert {key for rank in ranks for key in rank.state} == {key for key, _, _ in self._weights}

    def assert_close(self, table: TableCase, rtol: float | None = None) -> None:
        """Outputs of every rank and step, all weights and all optimizer state of a table are the reference's."""
        rtol = rtol or ROUNDED[table.data_type]
        names = [name for name, of, _ in self._run.outputs() if of == table]
        for step, of_ranks in enumerate(self._outputs):
            for r, parts in enumerate(of_ranks):
                for name in names:
                    found = torch.from_numpy(self._ranks[r].outputs[name][step])
                    assert_near(found, parts[name], rtol, f"step {step}, rank {r}: {name}")
        for kind, exact in (("state", self._weights), ("optimizer_state", self._state)):
            found_all = assembled([pieces_of_table(getattr(rank, kind), table) for rank in self._ranks])
            for key, of, value in exact:
                if of == table:
                    assert_near(found_all[key], value, rtol, f"{table}: {key}")


def pieces_of_table(state: dict[str, Pieces], table: TableCase) -> dict[str, Pieces]:
    return {key: pieces for key, pieces in state.items() if f".{table.name}." in key}


def assert_trained_as_reference(run: Run, ranks: list[Trained], rtol: float | None = None, **rule: Any) -> None:
    """All tables of a run are as the reference's, which steps by the `Exact` arguments in ``rule``."""
    exact = Exact(run, ranks, **rule)
    for table in run.tables:
        exact.assert_close(table, rtol)
