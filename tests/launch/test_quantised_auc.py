"""The quality of the demo's model with quantised rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.data.loader import open_data
from launch.metrics import quality
from launch.predict import Run
from tests.launch.jobs import run, with_set
from torchrec_qr.inference import quantize_embeddings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo of 60,000 rows, which is all of its tables and 0.3 of its steps."""
    folder = tmp_path_factory.mktemp("demo")
    run(folder, *with_set("data.generator.rows=60000"))
    return folder / "demo"


def auc_of(folder: Path, dtype: torch.dtype | None) -> float:
    """Returns the AUC on the validation rows of the run's model, with rows of ``dtype`` or as it is."""
    opened: Any = Run(folder, torch.device("cpu"))
    if dtype is not None:
        opened._task = quantize_embeddings(opened._task, dtype)
        rows = [name for name, tensor in opened._task.named_buffers() if tensor.dtype == torch.uint8]
        assert len(rows) == 14 * 2 + 12
        assert not any("embedding_bags" in name for name, _ in opened._task.named_parameters())
    logits, labels = [], []
    with open_data(opened.job, 0, 1).validation() as batches:
        for batch in batches:
            x, y, weights = opened.scored(batch)
            logits.append(x[weights > 0])
            labels.append(y[weights > 0])
    return quality(torch.cat(logits), torch.cat(labels)).auc


@pytest.mark.timeout(600)
def test_auc_falls_by_little(demo: Path) -> None:
    floats = auc_of(demo, None)
    assert floats > 0.79
    assert auc_of(demo, torch.qint8) >= floats - 0.0005
    assert auc_of(demo, torch.quint4x2) >= floats - 0.002
