"""The file of `torchrec-qr plan --json`: its plan is the planner's, and one of another request is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planner_models import collection, plain, planner, qr, sharders, table
from torch import nn
from torchrec.distributed.planner.types import Topology

from torchrec_qr import ExplicitPartitions, MixedRadix, QuotientRemainder
from torchrec_qr.cli.commands import main
from torchrec_qr.cli.schema import ConfigError, PlannerSpec, load, read_planner
from torchrec_qr.cli.sizing.plan_file import as_json, read_plan_file
from torchrec_qr.cli.sizing.saved_plan import saved_plan
from torchrec_qr.planner import hardware_named

JOB = """
tables:
  - {name: user, num_embeddings: 40_000_000, embedding_dim: 128,
     partitions: {kind: quotient_remainder, num_collisions: 4}}
  - {name: item, num_embeddings: 5_000_000, embedding_dim: 64, partitions: {kind: mixed_radix, balanced: true}}
  - {name: country, num_embeddings: 250, embedding_dim: 128}
  - {name: city, num_embeddings: 90_000, embedding_dim: 128}
planner:
  topology: 2x4
  batch_size: 2048
  constraints:
    user: {pooling_factor: 20, sharding_types: [column_wise], min_partition: 32}
    item: {sharding_types: [table_row_wise]}
    city: {sharding_types: [row_wise]}
"""
SPEC = PlannerSpec(device="h100")
TABLES = [
    qr("user", 40_000_000),
    table("item", MixedRadix(balanced=True), 5_000_000, dim=64),
    plain("country", 250),
    plain("city", 90_000),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    (folder / "job.yaml").write_text(JOB)
    path = folder / "plan.json"
    command = ["plan", "--config", str(folder / "job.yaml"), "--device", "h100,a100", "--optimizer", "adagrad"]
    assert main([*command, "--json", str(path)]) == 0
    return path


def topology(world_size: int = 8, local: int = 4) -> Topology:
    return hardware_named("h100").topology(world_size, local)


def changed(file: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(file.read_text())
    change(content["devices"])
    (folder / "changed.json").write_text(json.dumps(content))
    return folder / "changed.json"


def refusal(path: Path, tables: list[Any] = TABLES, spec: PlannerSpec = SPEC, on: Topology | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        saved_plan(path, spec, collection(tables), sharders(), on or topology())
    return str(caught.value)


def test_the_plan_of_a_file_is_the_planners(file: Path) -> None:
    section = read_planner(file.parent / "job.yaml")
    made = planner(8, 4, batch_size=2048, constraints=section.parameter_constraints())
    estimated = made.propose(collection(TABLES), sharders())
    plan = saved_plan(file, replace(section, device="h100"), collection(TABLES), sharders(), topology())
    assert plan.plan == estimated.sharding_plan().plan
    assert {s.sharding_type for s in plan.plan[""].values()} >= {"column_wise", "table_row_wise", "row_wise"}  # type: ignore[attr-defined]
    # The collection may lie deeper in a job's model.
    model = nn.ModuleDict({"sparse": collection(TABLES)})
    deeper = saved_plan(file, SPEC, model, sharders(), topology())
    assert deeper.plan == {"sparse": plan.plan[""]}
    saved = read_plan_file(file)
    assert read_plan_file(file) == saved
    assert as_json(saved) == file.read_text().rstrip()
    h100 = saved.devices["h100"]
    assert h100.peak_bytes == max(rank.peak_bytes for rank in h100.ranks) == int(max(estimated.ranks.memory))
    for rank in h100.ranks:
        assert rank.peak_bytes == pytest.approx(rank.value_bytes + rank.state_bytes + rank.buffer_bytes, abs=3)
    assert [rank.work_ms for rank in h100.ranks] == pytest.approx(estimated.ranks.work_ms)
    assert h100.step_ms == pytest.approx(estimated.step_ms)


@pytest.mark.slow
def test_the_fingerprint_is_that_of_the_request(file: Path, tmp_path: Path) -> None:
    def fingerprint(text: str, *arguments: str, device: str = "h100") -> str:
        (tmp_path / "job.yaml").write_text(text)
        command = ["plan", "--config", str(tmp_path / "job.yaml"), "--device", device, "--optimizer", "adagrad"]
        assert main([*command, "--json", str(tmp_path / "plan.json"), *arguments]) == 0
        return read_plan_file(tmp_path / "plan.json").devices[device].fingerprint

    saved = read_plan_file(file).devices
    assert fingerprint(JOB) == saved["h100"].fingerprint  # alone or beside other devices
    assert fingerprint(JOB, device="a100") == saved["a100"].fingerprint != saved["h100"].fingerprint
    others = [
        fingerprint(JOB.replace("num_collisions: 4", "num_collisions: 4, grouping: adjacent")),
        fingerprint(JOB.replace("40_000_000", "40_000_004")),
        fingerprint(JOB.replace("pooling_factor: 20", "pooling_factor: 21")),
        fingerprint(JOB, "--batch-size", "1024"),
        fingerprint(JOB, "--hbm-gib", "79"),
        fingerprint(JOB, "--topology", "1x8"),
        fingerprint(JOB, "--sharding-group-size", "4"),
    ]
    assert len({*others, saved["h100"].fingerprint}) == len(others) + 1


def test_tables_of_a_job_that_are_one_partition_of_all_rows_are_plain_to_a_plan(file: Path) -> None:
    single = [*TABLES[:3], table("city", MixedRadix(sizes=[90_000]), 90_000)]
    plan: Any = saved_plan(file, SPEC, collection(single), sharders(), topology()).plan[""]
    assert plan["city"].sharding_type == "row_wise"
    hashed = [*TABLES[:3], table("city", MixedRadix(sizes=[300, 301]), 90_000)]
    assert "table 'city': physical_rows: saved 90000, here 601" in refusal(file, hashed)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([*TABLES[:3], plain("city", 90_001)], "table 'city': num_embeddings: saved 90000, here 90001"),
        ([*TABLES[:3], plain("city", 90_000, dim=64)], "table 'city': embedding_dim: saved 128, here 64"),
        ([*TABLES[:3], plain("town", 90_000)], "table 'town': not in the plan"),
        (TABLES[:3], "table 'city': in the plan, and not in this job"),
        ([qr("user", 40_000_000, operation="add"), *TABLES[1:]], "table 'user': operation: saved mult, here add"),
        (
            [table("user", QuotientRemainder(num_collisions=4, grouping="adjacent"), 40_000_000), *TABLES[1:]],
            "table 'user': grouping: saved strided, here adjacent",
        ),
        ([*TABLES[:3], plain("city", 90_000, feature_names=["a", "b"])], "table 'city': num_features: saved 1, here 2"),
    ],
)
def test_a_plan_of_other_tables_is_refused(file: Path, tables: list[Any], said: str) -> None:
    message = refusal(file, tables)
    assert message.startswith(f"planner.plan_file: {file} does not fit this job:\n  ")
    assert said in message
    assert message.endswith("makes of this config on these ranks, or no planner.plan_file")


BY_NODE = "table_row_wise; allowed: the 4 of a node for each block of columns, in order"


@pytest.mark.parametrize(
    ("name", "constraint", "change", "said"),
    [
        ("city", {}, {"ranks": [7, 6, 5, 4, 3, 2, 1, 0]}, "row_wise; allowed: 0..7, in order"),
        ("city", {}, {"ranks": [0] * 8}, "row_wise; allowed: 0..7, in order"),
        ("city", {}, {"sharding_type": "data_parallel", "compute_kernel": "dense", "ranks": [0] * 8}, "0..7, in order"),
        ("item", {}, {"ranks": [2, 3, 4, 5]}, BY_NODE),
        ("item", {}, {"ranks": [1, 0, 2, 3]}, BY_NODE),
        ("item", {"sharding_types": ["row_wise"]}, {}, "item.sharding_types: the plan has table_row_wise"),
        ("item", {"compute_kernels": ["dense"]}, {}, "item.compute_kernels: the plan has fused"),
        ("item", {"ranks": [4, 5, 6, 7]}, {"ranks": [0, 1, 2, 3]}, "item.ranks: the plan has [0, 1, 2, 3]"),
        ("country", {"same_rank_as": "city"}, {"ranks": [3]}, "country.same_rank_as: the plan has [3]"),
        ("country", {}, {"name": "city"}, "table 'city': twice in the plan; a plan has one"),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_refused(
    file: Path, tmp_path: Path, name: str, constraint: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    constraints = {name: constraint} if constraint else {}

    def edit(devices: dict[str, Any]) -> None:
        (edited,) = (t for t in devices["h100"]["tables"] if t["name"] == name)
        edited.update(change)
        devices["h100"]["request"]["constraints"].update(constraints)

    spec = load(PlannerSpec, {"device": "h100", "constraints": constraints})
    assert said in refusal(changed(file, tmp_path, edit), spec=spec)


def test_a_plan_of_other_ranks_devices_and_constraints_is_refused(file: Path, tmp_path: Path) -> None:
    message = refusal(file, on=topology(16, 8))
    assert "\n  world_size: saved 8, here 16\n  local_world_size: saved 4, here 8\n" in message
    assert "has no plan for planner.device 'h200'; allowed: h100, a100" in refusal(
        file, spec=PlannerSpec(device="h200")
    )
    assert "has no plan for no planner.device; allowed: h100, a100" in refusal(file, spec=PlannerSpec())
    other = load(PlannerSpec, {"device": "h100", "constraints": {"city": {"sharding_types": ["table_wise"]}}})
    assert "planner.constraints.city: not those of the plan" in refusal(file, spec=other)
    groups = changed(file, tmp_path, lambda d: d["h100"]["request"].update(sharding_group_size=4))
    assert "sharding_group_size: saved 4, here none" in refusal(groups)
    twice = nn.ModuleDict({"a": collection(TABLES), "b": collection(TABLES[3:])})
    with pytest.raises(ConfigError, match=r"table 'city': in the modules 'a' and 'b'; a plan has one"):
        saved_plan(file, SPEC, twice, sharders(), topology())


def test_a_file_that_is_none_of_plans_or_was_changed_is_refused(file: Path, tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory; allowed: a file that" in refusal(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    assert refusal(tmp_path / "bad.json").startswith(f"{tmp_path / 'bad.json'}: not JSON: ")

    def of_city(**changes: Any) -> str:
        return refusal(changed(file, tmp_path, lambda d: d["h100"]["tables"][3].update(changes)))

    assert "devices.h100.tables[3].sharding_type: 'row'; allowed: " in of_city(sharding_type="row")
    assert "table 'city': kernel quant; allowed on cuda: " in of_city(compute_kernel="quant")
    assert "table 'city': rank 8; allowed: 0..7" in of_city(ranks=[*range(1, 9)])
    assert "table 'city': 7 ranks; allowed: 8, one for each shard of row_wise" in of_city(ranks=[*range(7)])
    assert "table 'city': 0 ranks; allowed: 1" in of_city(sharding_type="table_wise", ranks=[])


def test_an_explicit_map_is_recognised_by_its_classes(tmp_path: Path) -> None:
    def of_classes(shift: int) -> Any:
        ids = torch.arange(10_000)
        classes = torch.stack([(ids + shift) % 100, ids // 100])
        return table("map", ExplicitPartitions(classes), 10_000, dim=16)

    np.save(tmp_path / "map.npy", np.stack([np.arange(10_000) % 100, np.arange(10_000) // 100]))
    (tmp_path / "job.yaml").write_text(
        "tables: [{name: map, num_embeddings: 10_000, embedding_dim: 16,\n"
        "          partitions: {kind: explicit, file: map.npy}}]\n"
        "planner: {topology: 1x2, device: h100, batch_size: 8}"
    )
    assert main(["plan", "--config", str(tmp_path / "job.yaml"), "--json", str(tmp_path / "plan.json")]) == 0
    plan = saved_plan(tmp_path / "plan.json", SPEC, collection([of_classes(0)]), sharders(), topology(2, 2))
    assert set(plan.plan[""]) == {"map"}  # type: ignore[call-overload]
    message = refusal(tmp_path / "plan.json", [of_classes(1)], on=topology(2, 2))
    assert "table 'map': map_hash: saved " in message
