"""The demo's model is served by quantised rows of embeddings at little cost in quality."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.predict import predict
from tests.launch.generated_files import write_generated
from tests.launch.jobs import run, with_set

ROWS = 200_000  # the demo's


@pytest.mark.slow
def test_the_demo_loses_little_auc(tmp_path: Path) -> None:
    """It is the demo on its own rows, in a file, because scores need one; the AUC is that of its test split."""
    rows, test = write_generated(tmp_path / "rows.parquet", ROWS), tmp_path / "test.parquet"
    run(tmp_path, *with_set("data.format=parquet", f"data.files=[{rows}]"))
    pq.write_table(pq.read_table(rows).slice(round(ROWS * 13 / 14)), test)

    def auc(dtype: str) -> float:
        return predict(tmp_path / "demo", [str(test)], tmp_path / f"{dtype}.parquet", dtype=dtype).quality.auc

    trained = auc("fp32")
    assert trained > 0.8
    assert auc("int8") > trained - 0.0005
    assert auc("int4") > trained - 0.002
