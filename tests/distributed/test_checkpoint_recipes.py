"""The recipes of docs/checkpoints.md run as they stand, and give the values that were saved."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assert_all_close import assert_all_close
from batches import batch
from ranks import run_ranks
from sharded_model import weights_of
from torch import Tensor

from torchrec_qr.inference import materialize, to_plain

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
BLOCKS = re.findall(r"<!-- A test runs this( on every rank| on one rank)?\. -->\n```python\n(.*?)```", PAGE, re.DOTALL)
MODEL, SAVE, ONE_FILE, WITHOUT_CODE, BACK, ROWS, FULL, DLRM = (source for _, source in BLOCKS)


def run(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, "docs/checkpoints.md", "exec"), names)


def save(rank: int, world_size: int, folder: Path) -> None:
    os.chdir(folder)
    names: dict[str, Any] = {}
    for source in (MODEL, SAVE):
        run(source, names)
    values = weights_of(names["model"])
    if rank == 0:
        torch.save(values, "expected.pt")


def load_back(rank: int, world_size: int, folder: Path) -> None:
    os.chdir(folder)
    names: dict[str, Any] = {}
    for source in (MODEL, SAVE.replace('"checkpoint"', '"another"'), BACK):
        run(source, names)
    assert_all_close(weights_of(names["model"]), torch.load("expected.pt"), "values on ranks")


def test_which_blocks_need_ranks() -> None:
    assert [on == " on every rank" for on, _ in BLOCKS] == [False, True, False, False, True, False, False, False]


@pytest.mark.slow
def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(save, 2, tmp_path, alone=True)
    monkeypatch.chdir(tmp_path)
    expected = torch.load("expected.pt")
    names: dict[str, Any] = {}
    for source in (MODEL, ONE_FILE):
        run(source, names)
    assert not dist.is_initialized()
    served = names["served"]
    assert {p.device.type for p in served.parameters()} == {"cpu"}
    assert_all_close(dict(sorted(served.state_dict().items())), expected, "values of the one file")
    for p in served.parameters():
        p.data.zero_()
    run(WITHOUT_CODE, names)
    assert_all_close(dict(sorted(served.state_dict().items())), expected, "values of all of the checkpoint")
    assert names["everything"]["optimizer"]["state"]
    run(ROWS, names)
    check_rows(names)
    run_ranks(load_back, 2, tmp_path, alone=True)


def check_rows(names: dict[str, Any]) -> None:
    ids = list(range(10_000))
    given = batch({"user": [[x] for x in ids], "country": [[x % 250] for x in ids]})
    full: Tensor = names["ebc"](given)["user"]
    assert torch.equal(names["rows"], full)
    assert torch.equal(names["some"], full[[9_999, 0]])
    assert torch.equal(names["norms"], full.norm(dim=1))
    assert torch.equal(names["plain"](given).values(), names["ebc"](given).values())
    assert torch.equal(names["embedding"](torch.tensor(ids)), full)


def test_a_full_table_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full rows are products of partitions, so that the fit finds them again."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run(MODEL, names)
    model = names["make_model"]("cpu")
    full = to_plain(model.sparse_arch.embedding_bag_collection)
    state = {k: v for k, v in model.state_dict().items() if "embedding_bags" not in k}
    state |= {f"sparse_arch.embedding_bag_collection.{k}": v for k, v in full.state_dict().items()}
    torch.save(state, "full.pt")
    with pytest.raises(ValueError, match=r"table 't_user': .*compress_\(model, partitions, fit=True\)"):
        names["make_model"]("cpu").load_state_dict(torch.load("full.pt"), strict=False)
    run(FULL, names)
    fitted = names["make_model"]("meta")
    fitted.load_state_dict(torch.load("fitted.pt", weights_only=True), assign=True)
    ebc = fitted.sparse_arch.embedding_bag_collection
    expected = full.state_dict()["embedding_bags.t_user.weight"]
    assert (materialize(ebc, "t_user") - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(materialize(ebc, "t_country"), full.state_dict()["embedding_bags.t_country.weight"])


def test_a_checkpoint_of_dlrm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    q, r, full = torch.randn(5, 4), torch.randn(3, 4), torch.randn(7, 4)
    saved = {"emb_l.0.weight_q": q, "emb_l.0.weight_r": r, "emb_l.1.weight": full}
    torch.save({"state_dict": saved}, "dlrm.pt")
    names: dict[str, Any] = {"torch": torch}
    run(DLRM, names)
    # Two bags: ids 14 and 0, and ids 6 and none.
    offsets, indices = [torch.tensor([0, 1]), torch.tensor([0, 1])], [torch.tensor([14, 0]), torch.tensor([6])]
    out = names["ebc"](names["features_of"](offsets, indices))
    assert torch.equal(out["cat_0"], torch.stack([q[4] * r[2], q[0] * r[0]]))
    assert torch.equal(out["cat_1"], torch.stack([full[6], torch.zeros(4)]))
