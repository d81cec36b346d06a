"""The demo run's model is exported, and scored by Python with PyTorch alone and by C++, as the model itself scores."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from torchrec import KeyedJaggedTensor

from examples.serving.export_run import export_run
from launch.predict import Run
from tests.launch.jobs import SMALL, run, with_set
from torchrec_qr.ops.serving_library import load_operators

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not load_operators(), reason="the operators' library was not built"),
    pytest.mark.skipif(not hasattr(inductor.cpp, "march"), reason="torch 2.11 compiles for its own CPU alone"),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "serving"
# Prints the scores of batches of 1 to 64 rows, and of none with an id.
EVERY_SIZE = """
import sys, torch
folder = sys.argv[1]
torch.ops.load_library(f"{folder}/serving_operators.so")
model = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
torch.save([model(*rows) for rows in torch.load(f"{folder}/batches.pt")], f"{folder}/scores.pt")
dense, ids, lengths = torch.load(f"{folder}/batches.pt")[4]
ids[0] = 100_000
try:
    model(dense, ids, lengths)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("ended")
    run(folder, *with_set(*SMALL), world_size=1)
    return folder / "demo"


@pytest.fixture(scope="module", params=["fp32", "int8"])
def served(request: pytest.FixtureRequest, ended: Path) -> Path:
    """The folder with the run's exported model. Its name is the type of rows."""
    export_run(ended, ended / request.param, request.param)
    return ended / request.param


def torch_alone(*arguments: str) -> str:
    """Returns what a Python process prints that must import neither TorchRec nor FBGEMM nor this project."""
    code = (
        "import runpy, sys; script, *sys.argv[1:] = sys.argv[1:]; runpy.run_path(script, run_name='__main__');"
        "assert not {'torchrec', 'fbgemm_gpu', 'torchrec_qr'} & set(sys.modules), sorted(sys.modules)"
    )
    return printed(sys.executable, "-I", "-c", code, *arguments)


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(served: Path, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    dtype: Any = served.name
    model = Run(served.parent, torch.device("cpu"), dtype).model.eval()
    dense, ids, lengths = rows
    keys = [f"cat_{i}" for i in range(26)]
    with torch.no_grad():
        return model(dense, KeyedJaggedTensor(keys, ids, lengths=lengths.flatten())).squeeze(1).sigmoid()


def by_python(served: Path) -> str:
    return torch_alone(str(EXAMPLE / "score.py"), *rows_of(served))


def rows_of(served: Path) -> list[str]:
    return [str(served / name) for name in ("model.pt2", "rows.pt")]


def test_python_scores_as_the_model_with_torch_alone(served: Path) -> None:
    scores = torch.tensor([float(line) for line in by_python(served).split()])
    assert len(scores) == 100
    torch.testing.assert_close(scores, expected(served, torch.load(rows_of(served)[1])), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cpp_scores_as_python(served: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    printed("cmake", "-S", str(EXAMPLE), "-B", str(build), prefix, "-DCMAKE_BUILD_TYPE=Release")
    printed("cmake", "--build", str(build))
    assert printed(str(build / "score"), *rows_of(served)) == by_python(served)


def test_every_number_of_rows_is_scored_as_by_the_model(served: Path, tmp_path: Path) -> None:
    dense, ids, lengths = torch.load(served / "rows.pt")
    of_features = ids.split(lengths.sum(1).tolist())
    batches = []
    for count in range(1, 65):
        own = lengths[:, :count].clone()
        found = [x[: int(n.sum())] for x, n in zip(of_features, own, strict=True)]
        if count % 3 == 0:
            # Let a feature have no ids at all.
            own[3], found[3] = 0, found[3][:0]
        batches.append((dense[:count].clone(), torch.cat(found), own))
    batches.append((dense[:2].clone(), ids[:0], torch.zeros_like(lengths[:, :2])))
    torch.save(batches, served / "batches.pt")
    script = tmp_path / "every_size.py"
    script.write_text(EVERY_SIZE)
    message = torch_alone(str(script), str(served))
    assert "table 'cat_0', feature 'cat_0': id 100000 is outside [0, 100000)" in message
    for rows, scores in zip(batches, torch.load(served / "scores.pt"), strict=True):
        torch.testing.assert_close(scores, expected(served, rows), rtol=1e-5, atol=1e-6)


def test_a_package_names_its_cpu_and_no_path_of_this_machine(served: Path) -> None:
    package = served / "model.pt2"
    own = {str(Path.home()), str(Path.cwd()), sys.prefix, str(Path(torch.__file__).parent), str(served), "/tmp/"}
    own |= {os.path.realpath(path) for path in own}
    with zipfile.ZipFile(package) as archive:
        text = {name: archive.read(name) for name in archive.namelist()}
    assert not any(content for name, content in text.items() if name.endswith(".cpp"))
    libraries = [name for name in text if name.endswith(".so")]
    assert len(libraries) == 1
    for name, content in text.items():
        assert not [path for path in own if path.encode() + b"/" in content], name
    assert any(b'"torchrec_qr.cpu": "x86-64-v3"' in content for content in text.values())
    if shutil.which("objdump"):
        (tmp := served / "model.so").write_bytes(text[libraries[0]])
        assert "%zmm" not in printed("objdump", "-d", str(tmp))
