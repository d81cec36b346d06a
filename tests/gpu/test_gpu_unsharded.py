"""Unsharded collections on the device train as the float64 reference does, and say what was wrong with a batch."""

from typing import Any

import pytest
import torch
from gpu_setups import DEVICE
from parity_model import Run, TableCase, Trained, parts_of
from parity_reference import assert_trained_as_reference
from pieces import numpy_of
from sharded_model import LR, Model, loss_of, own_weights

from torchrec_qr import raise_pending
from torchrec_qr.inference import materialize, score_all, to_plain, top_items

TABLES = (
    TableCase("mult", "strided", "table_wise"),
    TableCase("add", "chinese_remainder", "table_wise", k=3, operation="add", out_of_range="clamp"),
    TableCase("concat", "explicit", "table_wise", operation="concat", out_of_range="wrap"),
    TableCase("path", "strided", "table_wise", operation="path", out_of_range="unchecked"),
    TableCase("hash", "hash", "table_wise", k=1),
    TableCase("plain", "plain", "table_wise", operation="add"),
)
PREFIX = {True: "embedding_bags", False: "embeddings"}
MEAN = tuple(TableCase(**{**vars(table), "pooling": "mean"}) for table in TABLES)


@pytest.mark.parametrize(
    "run",
    [
        Run(TABLES, wild_ids=True),
        Run(MEAN, wild_ids=True, weighted=True),
        Run(TABLES, wild_ids=True, pooled=False),
        Run(TABLES, wild_ids=True, int32=True),
    ],
    ids=["bags", "weighted_mean", "sequences", "int32"],
)
def test_trains_as_reference(run: Run) -> None:
    model = Model(run.initial()).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    outputs: dict[str, list[Any]] = {name: [] for name, _, _ in run.outputs()}
    for step in range(run.steps):
        optimizer.zero_grad()
        batch = run.batch(step)
        out = model(batch.kjt(run.weighted, run.int32).to(DEVICE))
        for name, part in parts_of(run, batch, out).items():
            outputs[name].append(numpy_of(part))
        loss_of(out, 1).backward()
        optimizer.step()
    raise_pending()
    assert_trained_as_reference(run, [Trained(outputs, own_weights(model), {}, {})], rtol=2e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_an_id_out_of_range_is_raised_by_raise_pending_at_the_latest(pooled: bool) -> None:
    run = Run((TableCase("t", "strided", "table_wise"),), pooled=pooled)
    model = Model(run.initial()).to(DEVICE)
    batch = run.batch(0)
    right = batch.kjt(weighted=False).to(DEVICE)
    batch.ids["f_t"][1] = [3, 100]
    wrong = batch.kjt(weighted=False).to(DEVICE)

    def forward() -> None:
        model(wrong)
        raise_pending()

    with pytest.raises(IndexError, match=r"table 't', feature 'f_t': id 100 .* \[0, 100\)"):
        forward()
    raise_pending()
    assert model(right).isfinite().all()
    raise_pending()


@pytest.mark.parametrize("pooled", [True, False])
def test_full_rows_on_the_device_are_those_on_the_cpu(pooled: bool) -> None:
    run = Run(TABLES, pooled=pooled)
    on_cpu, collection = Model(run.initial()).collection, Model(run.initial()).to(DEVICE).collection
    plain = to_plain(collection)
    for config in collection.embedding_configs():
        full = materialize(on_cpu, config.name)
        for rows in (
            materialize(collection, config.name),
            plain.get_parameter(f"{PREFIX[pooled]}.{config.name}.weight"),
        ):
            assert rows.device.type == DEVICE
            torch.testing.assert_close(rows.detach().cpu(), full, rtol=1e-5, atol=1e-5)
        few = materialize(collection, config.name, torch.tensor([5, 0]))
        torch.testing.assert_close(few.cpu(), full[[5, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_scores_on_the_device_are_those_of_the_full_rows(pooled: bool) -> None:
    collection = Model(Run(TABLES, pooled=pooled).initial()).to(DEVICE).collection
    for config in collection.embedding_configs():
        users = torch.randn(5, config.embedding_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        dense = users @ materialize(collection, config.name).T
        scores = score_all(collection, config.name, users)
        best = top_items(collection, config.name, users, 7)
        assert {scores.device.type, best.scores.device.type, best.ids.device.type} == {DEVICE}
        torch.testing.assert_close(scores, dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(best.scores, dense.topk(7).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores.gather(1, best.ids), best.scores, rtol=1e-4, atol=1e-4)
