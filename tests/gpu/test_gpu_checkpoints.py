"""A checkpoint of ranks of the device goes on as if there had been none, there and on a CPU."""

from pathlib import Path

import pytest
from gpu_setups import SETUPS, Setup
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import ADAGRAD
from test_checkpoints import load_and_finish, save_midway


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_checkpoint_continues_under_every_plan(setup: Setup, tmp_path: Path) -> None:
    where = {"backend": setup.backend, "device": setup.device, "timeout": 240}
    run_ranks(save_midway, setup.world_size, "row_wise", ADAGRAD, tmp_path, **where)
    run_ranks(load_and_finish, setup.world_size, BASIC_SHARDINGS, ADAGRAD, tmp_path, "row_wise", **where)
    run_ranks(load_and_finish, 2, ("table_wise",), ADAGRAD, tmp_path, None)
