"""The cells of docs/status.md for sharded tables: each is trained on four ranks, or refused by name on each of them."""

from parity_model import Run, TableCase, shard_run, train
from parity_reference import assert_trained_as_reference
from placements import PER_NODE, SHARDINGS
from ranks import run_ranks
from status_cells import OPERATIONS

TYPES = (*SHARDINGS, *PER_NODE)
SEQUENCES = "sequences"
COLUMNS = (*OPERATIONS, SEQUENCES)


def case(sharding: str, column: str) -> TableCase:
    operation = "mult" if column == SEQUENCES else column
    return TableCase(f"{column}_{sharding}", "strided", sharding, operation=operation, plan="hand")


def refusals(rank: int, world_size: int, cases: list[tuple[TableCase, bool]]) -> list[str]:
    """Runs on a rank. Returns the error of each table, pooled or not, or an empty string for one that is sharded."""
    found = []
    for table, pooled in cases:
        try:
            shard_run(Run((table,), pooled=pooled))
        except (NotImplementedError, ValueError) as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def assert_refused(cells: list[tuple[str, str]]) -> None:
    """Checks that every rank raises an error that names the table and the sharding type, for each cell alone."""
    cases = [(case(*cell), cell[1] != SEQUENCES) for cell in cells]
    for messages in run_ranks(refusals, 4, cases, local_world_size=2):
        for (sharding, _), (table, _), message in zip(cells, cases, messages, strict=True):
            assert f"'{table.name}'" in message
            assert sharding in message
            assert "; allowed: " in message


def assert_trained(cells: list[tuple[str, str]]) -> None:
    """Trains the tables of all cells for three steps of Adagrad, and compares with the float64 reference."""
    for pooled in (True, False):
        run = Run(tuple(case(*cell) for cell in cells if (cell[1] != SEQUENCES) == pooled), "adagrad", pooled=pooled)
        assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))
