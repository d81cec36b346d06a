"""Sharded tables of hashed ids; `test_parity_pooled` and `test_parity_sequence` have them beside all others."""

import logging

import pytest
from parity_model import Run, TableCase, one_of_each, shard_run, train
from parity_reference import assert_trained_as_reference
from ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [True, False])
def test_an_open_vocabulary_of_2_40_ids_trains_as_reference(pooled: bool) -> None:
    shardings = () if pooled else (("table_wise", "column_wise", "row_wise", "data_parallel"),)
    tables = one_of_each(*shardings, kind="open", k=3, hash_seed=1, dim=8)
    run = Run(tables, optimizer="rowwise_adagrad", pooled=pooled)
    assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def warnings_of_first_batch(rank: int, world_size: int, run: Run) -> list[str]:
    found, logger = _Messages(), logging.getLogger("torchrec.sparse.jagged_tensor_validator")
    model, batch = shard_run(run), run.batch(0)
    batch.ids["f_plain"][0] = [-1]
    logger.addHandler(found)
    try:
        model.module.collection.input_dist(model.module.collection.create_context(), batch.kjt())
    finally:
        logger.removeHandler(found)
    return found.texts


def test_torchrec_warns_of_ids_of_plain_tables_alone() -> None:
    tables = (*one_of_each(hash_seed=1), TableCase("wrap", "strided", "table_wise", out_of_range="wrap"))
    run = Run((*tables, TableCase("plain", "plain", "table_wise")), wild_ids=True)
    (texts,) = run_ranks(warnings_of_first_batch, 1, run)
    assert len(texts) == 1
    assert texts[0].startswith("Feature f_plain has range")
