"""Criteo's own rows, where a sample of them lies beside this checkout."""

from pathlib import Path

import pytest

from tests.launch.jobs import DEMO, run, with_set
from tests.run_metrics import metrics

DATA = Path(__file__).parents[3] / "shared" / "data"
KAGGLE, TERABYTE = DATA / "criteo_kaggle_137k.tsv.gz", DATA / "criteo_1tb_32768.parquet"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the real Criteo samples are not beside this checkout")


def test_quotient_remainder_on_a_week_of_clicks(tmp_path: Path) -> None:
    config = DEMO.with_name("criteo_sample_qr.yaml")
    run(tmp_path, f"--set=data.files=[{KAGGLE}]", config=config)
    test = metrics(tmp_path / "criteo_sample_qr")[-1]
    assert test["split"] == "test"
    assert test["auc"] >= 0.75
    assert test["ne"] < 0.87


def test_rows_of_the_terabyte_set_train(tmp_path: Path) -> None:
    columns = [f"cat_{i}" for i in range(26)]
    data = ("data.format=parquet", f"data.files=[{TERABYTE}]", "data.ids=modulo", f"data.parquet.ids={columns}")
    run(tmp_path, *with_set(*data, "train.max_steps=20", "train.log_every=5"))
    lines = metrics(tmp_path / "demo")
    assert [line["step"] for line in lines if line["split"] == "train"] == [5, 10, 15, 20]
    assert lines[-1]["logloss"] < 0.3
