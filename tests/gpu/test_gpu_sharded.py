"""Every sharding of every kind of table on ranks of the device, NCCL's and gloo's, trains as the reference does."""

from functools import cache

import pytest
from gpu_setups import SETUPS, Setup
from parity_model import Run, TableCase, Trained, shard_run
from parity_reference import Exact
from placements import SHARDINGS
from ranks import own_device, run_ranks
from varied_runs import FACTORS, SEQUENCE_FACTORS, runs_of, train_all

from torchrec_qr import raise_pending

RUNS = runs_of(FACTORS, pooled=True) | runs_of(SEQUENCE_FACTORS, pooled=False)
pytestmark = pytest.mark.timeout(600)
each_setup = pytest.mark.parametrize("setup", SETUPS, ids=str)


@cache
def together(setup: Setup) -> list[dict[str, Trained]] | None:
    """All runs in one start of the ranks; None where one of them fails, and may take the others along."""
    try:
        return run_ranks(train_all, setup.world_size, RUNS, backend=setup.backend, device=setup.device, timeout=280)
    except Exception:
        return None


def trained(setup: Setup, name: str) -> list[Trained]:
    """Returns the outcome of a run on each rank."""
    ranks = together(setup)
    if ranks is None:
        one = {name: RUNS[name]}
        ranks = run_ranks(train_all, setup.world_size, one, backend=setup.backend, device=setup.device, timeout=240)
    return [rank[name] for rank in ranks]


@each_setup
@pytest.mark.parametrize("name", RUNS)
def test_trains_as_reference(setup: Setup, name: str) -> None:
    exact = Exact(RUNS[name], trained(setup, name))
    for table in RUNS[name].tables:
        exact.assert_close(table)


def out_of_range(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, str]:
    """Returns, by run, the error that `raise_pending` raises at the latest. All ranks have the same bad id."""
    messages = {}
    for name, run in runs.items():
        dmp = shard_run(run)
        batch = run.batch(0)
        batch.ids[f"f_{run.tables[0].name}"][0] = [100]
        try:
            dmp(batch.kjt(weighted=False).to(own_device()))
            raise_pending()
            messages[name] = "nothing"
        except IndexError as error:
            messages[name] = str(error)
        raise_pending()
    return messages


def test_an_id_out_of_range_is_raised_by_raise_pending_at_the_latest() -> None:
    runs = {s: Run((TableCase(s, "strided", s),)) for s in SHARDINGS}
    (messages,) = run_ranks(out_of_range, 1, runs, backend=SETUPS[0].backend, device=SETUPS[0].device)
    for sharding, message in messages.items():
        assert f"table '{sharding}'" in message
        assert "id 100" in message
