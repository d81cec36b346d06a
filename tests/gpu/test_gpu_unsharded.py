"""Unsharded collections on the device train as the float64 reference does, and say what was wrong with a batch."""

import pytest
import torch
from gpu_setups import DEVICE
from parity_model import LR, Model, Run, TableCase, Trained, global_batch, loss_of
from parity_reference import assert_trained_as_reference
from pieces import pieces_of

from torchrec_qr import raise_pending

TABLES = (
    TableCase("mult", "strided", "table_wise"),
    TableCase("add", "chinese_remainder", "table_wise", k=3, operation="add", out_of_range="clamp"),
    TableCase("concat", "explicit", "table_wise", operation="concat", out_of_range="wrap"),
    TableCase("path", "strided", "table_wise", operation="path", out_of_range="unchecked"),
    TableCase("hash", "hash", "table_wise", k=1),
    TableCase("plain", "plain", "table_wise", operation="add"),
)
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
    model = Model(run.initial(), [name for name, _, _ in run.outputs()], run.pooled).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    outputs = []
    for step in range(run.steps):
        optimizer.zero_grad()
        out = model(global_batch(run, step).kjt(run.weighted, run.int32).to(DEVICE))
        outputs.append(out.detach().double().cpu().numpy())
        loss_of(out, 1).backward()
        optimizer.step()
    raise_pending()
    state = {k: pieces_of(v) for k, v in model.state_dict().items() if not k.endswith("fingerprint")}
    assert_trained_as_reference(run, [Trained(outputs, state, {}, {})], rtol=2e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_an_id_out_of_range_is_raised_by_raise_pending_at_the_latest(pooled: bool) -> None:
    run = Run((TableCase("t", "strided", "table_wise"),), pooled=pooled)
    model = Model(run.initial(), ["f_t"], pooled).to(DEVICE)
    batch = global_batch(run, 0)
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
