"""The README's examples run as they stand, and what it says of versions, targets and files is true."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.readme_example import README, example
from torchrec_qr.distributed.embeddingbag import ShardedCompositionalEmbeddingBagCollection

ROOT = README.parent
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def _run(program: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(program, str(README), "exec"), names)
    return names


def test_the_change_keeps_outputs_and_leaves_a_hundredth_of_the_rows() -> None:
    before, after = _run(example("-"), {}), _run(example("+"), {})
    rows = [sum(p.shape[0] for p in names["model"].sparse_arch.parameters()) for names in (before, after)]
    assert rows == [1_000_000 + 250, 10_100 + 250]
    assert "10,100 rows" in TEXT
    assert before["logits"].shape == after["logits"].shape == (2, 1)
    assert not torch.equal(before["logits"], after["logits"])


def test_a_model_is_sharded_compressed_and_served_as_shown(one_rank: None) -> None:
    sharded, compressed_and_served = [code for language, code in BLOCKS if language == "python"]
    names = _run(example("+"), {"device": torch.device("cpu")})
    _run(sharded, names)
    state = names["model"].state_dict()
    state.update((key, rows.local_tensor()) for key, rows in state.items() if isinstance(rows, ShardedTensor))
    unsharded = _run(example("+"), {})["model"]
    unsharded.load_state_dict(state)
    assert any(isinstance(module, ShardedCompositionalEmbeddingBagCollection) for module in names["model"].modules())
    want = unsharded(torch.ones(2, 4), names["batch"])
    torch.testing.assert_close(names["model"](torch.ones(2, 4), names["batch"]), want)

    names["trained"] = _run(example("-"), {})["model"]
    full = sum(p.numel() for p in names["trained"].parameters())
    _run(compressed_and_served, names)
    assert "t_user" in str(names["report"])
    assert sum(p.numel() for p in names["trained"].parameters()) < 0.26 * full
    want = names["trained"](torch.ones(2, 4), names["batch"])
    torch.testing.assert_close(names["served"](torch.ones(2, 4), names["batch"]), want, rtol=0.05, atol=0.01)


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_it_is_read_in_minutes() -> None:
    assert len(TEXT.splitlines()) <= 110


def test_it_links_to_files_that_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", TEXT)
    paths = [one or other for one, other in targets]
    assert len(paths) > 20
    assert [path for path in paths if not path.startswith("https://") and not (ROOT / path).exists()] == []


def test_it_names_targets_that_exist() -> None:
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE)
    assert {"train", "test", "docs", "wheel"} <= set(targets)
    rules = (ROOT / "Makefile").read_text()
    assert [name for name in targets if not re.search(rf"^{name}:", rules, re.MULTILINE)] == []


def test_its_versions_are_those_of_the_locks_and_of_the_badges() -> None:
    rows = re.findall(r"^\| (2\.\d+) \| (1\.\d) \| (1\.\d) \|", TEXT, re.MULTILINE)
    trios = []
    for lock in sorted((ROOT / "requirements").glob("trio-*.txt")):
        pins = dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line)
        trios.append(tuple(".".join(pins[name].split(".")[:2]) for name in ("torch", "fbgemm-gpu", "torchrec")))
    assert rows == trios
    (badge,) = re.findall(r"!\[TorchRec ([\d., ]+)\]", TEXT)
    assert badge.split(", ") == [torchrec for *_, torchrec in trios]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"![Python {project['requires-python'].replace('>=', '≥ ')}]" in TEXT
    assert f"![{project['license']}]" in TEXT


def test_its_table_has_the_methods_of_the_page_with_the_sources() -> None:
    page = (ROOT / "docs/comparison.md").read_text()
    methods = [cell.strip(" *") for cell in re.findall(r"^\| ([^|]+) \|", TEXT.split("| method |")[1], re.MULTILINE)]
    methods = methods[: methods.index("torchrec_qr") + 1]
    header = next(line for line in page.splitlines() if line.startswith("| | full tables"))
    assert [name for name in methods if name != "---"] == [cell.strip() for cell in header.split("|")[2:-1]]
