"""The steps of a job compile nothing after the warm-up. No test here needs a GPU: see `warm_up_case`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.timeout(300)
CASE = Path(__file__).parent / "warm_up_case.py"
TESTS = CASE.parents[1]
KERNELS = ["blocks_of_tables", "forward", "keys_of_ids", "step_rows", "sum_long_rows", "sum_ranges", "sum_supers"]


@pytest.mark.parametrize(
    ("rule", "dtype", "pooling", "weights"),
    [
        pytest.param("adagrad", "float32", "pooled", "plain", marks=pytest.mark.slow),
        pytest.param("adam", "bfloat16", "pooled", "weighted", marks=pytest.mark.slow),
        pytest.param("rowwise_adagrad", "float16", "sequences", "plain", marks=pytest.mark.slow),
    ],
)
def test_steps_compile_nothing_after_the_warm_up(
    rule: str, dtype: str, pooling: str, weights: str, tmp_path: Path
) -> None:
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "cuda_without_gpu")))
    done = subprocess.run(
        [sys.executable, str(CASE), rule, dtype, pooling, weights],
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled["steps"] == []
    assert compiled["warm_up"] == sorted([*KERNELS, *(["weights_gradient"] if weights == "weighted" else [])])
