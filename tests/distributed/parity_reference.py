"""The float64 reference of the runs of `parity_model`: the oracle forward, then `optimizer_reference`."""

from collections.abc import Iterator

import oracle
import torch
from cases import oracle_of
from near import assert_near
from optimizer_reference import STATES, OptimizerReference, gradient_of, zero_state
from parity_model import EPS, LR, NOT_PLAIN, ROW_SPLIT, Batch, Run, TableCase, Trained, global_batch
from pieces import assembled
from torch import Tensor


class Reference:
    """The run in float64 on one machine: the oracle forward and textbook optimizers.

    Rowwise Adagrad keeps one accumulator per row *and column shard* where columns are split, as TorchRec does: so it
    depends on ``columns``, the plan's blocks of logical columns. Under ``concat`` a partition has those parts of the
    blocks that fall into its own columns. Partitions that all ranks hold whole have one accumulator per row.
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
        loss = sum(loss_of_exactly(out) for out in outs)
        if isinstance(loss, Tensor) and loss.requires_grad:  # not where no rank has ids
            loss.backward()
        self._steps += 1
        optimizer = OptimizerReference(self.run.optimizer, self.lr, self.eps, self.max_gradient)
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

    def _blocks(self, case: TableCase, j: int) -> list[tuple[int, int]]:
        """The blocks of a partition's own columns of which each has accumulators of its own."""
        config, logical = case.config(self.run.pooled), self._columns.get(case.name)
        if self.run.optimizer != "rowwise_adagrad":
            logical = None
        if case.kind == "plain":
            return logical or [(0, case.dim)]
        width = config.partition_columns[j]
        if logical is None or case.operation == "path" or (case.sharding in ROW_SPLIT and j != config.base_partition):
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
                yield f"{self._key(case, j)}.weight {own}.{state}", case, torch.cat([of[state] for of in of_blocks])
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


def assert_trained_as_reference(
    run: Run,
    ranks: list[Trained],
    rtol: float = 1e-5,
    learning_rates: list[float] | None = None,
    max_gradient: float = float("inf"),
) -> None:
    """Outputs of every rank and step, all weights and all optimizer state are the reference's."""
    reference = Reference(run, ranks[0].columns)
    reference.max_gradient = max_gradient
    for step in range(run.steps):
        reference.lr = learning_rates[step] if learning_rates else LR
        expected = reference.step(global_batch(run, step), len(ranks))
        for rank, out in enumerate(expected):
            assert_near(torch.from_numpy(ranks[rank].outputs[step]), out, rtol, f"step {step}, rank {rank}: output")
    weights = assembled([r.state for r in ranks])
    assert set(weights) == {key for key, _, _ in reference.weights()}
    for key, case, value in reference.weights():
        assert_near(weights[key], value, rtol, f"{case}: {key}")
    state = assembled([r.optimizer_state for r in ranks])
    for key, case, value in reference.optimizer_state():
        assert_near(state[key], value, rtol, f"{case}: {key}")
