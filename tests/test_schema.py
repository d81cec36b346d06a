"""The ``planner:`` section and the document of both sections."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from schema_cases import error_of, written

from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingBagConfig,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.cli.schema import (
    ConstraintSpec,
    PlannerSpec,
    TableSpec,
    dump,
    load,
    read_planner,
    read_tables,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "config.md"


def test_planner_values() -> None:
    spec = load(
        PlannerSpec,
        {
            "topology": "2x8",
            "device": "h200",
            "hbm_gib": 100,
            "storage_reserve": 0,
            "batch_size": 4096,
            "constraints": {
                "a": {
                    "sharding_types": ["grid_shard", "table_wise"],
                    "compute_kernels": ["fused", "fused_uvm_caching"],
                },
                "b": {"min_partition": 32, "pooling_factor": 7, "ranks": [0, 15]},
            },
        },
    )
    assert (spec.topology, spec.world_size, spec.local_world_size, spec.device) == ("2x8", 16, 8, "h200")
    assert (spec.hbm_gib, spec.storage_reserve, spec.batch_size) == (100.0, 0.0, 4096)
    assert spec.constraints["b"].ranks == (0, 15)
    constraints = spec.parameter_constraints()
    assert list(constraints) == ["a", "b"]
    assert constraints["a"].sharding_types == ["grid_shard", "table_wise"]
    assert constraints["a"].compute_kernels == ["fused", "fused_uvm_caching"]
    assert (constraints["a"].min_partition, constraints["a"].pooling_factors) == (None, [1.0])
    assert (constraints["b"].sharding_types, constraints["b"].compute_kernels) == (None, None)
    assert (constraints["b"].min_partition, constraints["b"].pooling_factors) == (32, [7.0])
    assert load(PlannerSpec, dump(spec)) == spec
    assert load(PlannerSpec, {}) == PlannerSpec(None, None, None, 0.15, None, {})
    assert PlannerSpec().world_size is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"storage_reserves": 0.1}, "planner.storage_reserves: unknown key; did you mean 'storage_reserve'?"),
        ({"topology": "16"}, "planner.topology: '16'; allowed: '<nodes>x<ranks per node>', such as '2x8'"),
        ({"topology": "0x8"}, "planner.topology: '0x8'; allowed: '<nodes>x<ranks per node>', such as '2x8'"),
        ({"topology": 16}, "planner.topology: 16; allowed: str"),
        ({"device": "H100"}, "planner.device: 'H100'; allowed: 'cpu', 'a100', 'h100', 'h200'"),
        ({"hbm_gib": 0}, "planner.hbm_gib: 0; allowed: above 0"),
        ({"storage_reserve": 1}, "planner.storage_reserve: 1; allowed: at least 0 and below 1"),
        ({"storage_reserve": -0.1}, "planner.storage_reserve: -0.1; allowed: at least 0 and below 1"),
        ({"batch_size": 0}, "planner.batch_size: 0; allowed: at least 1"),
        (
            {"constraints": {"t": {"sharding_type": ["row_wise"]}}},
            "planner.constraints.t.sharding_type: unknown key; did you mean 'sharding_types'?",
        ),
        (
            {"constraints": {"t": {"sharding_types": ["table_wise", "rowwise"]}}},
            "planner.constraints.t.sharding_types[1]: 'rowwise'; allowed: 'data_parallel', 'table_wise', "
            "'column_wise', 'row_wise', 'table_row_wise', 'table_column_wise', 'grid_shard'; did you mean 'row_wise'?",
        ),
        (
            {"constraints": {"t": {"sharding_types": []}}},
            "planner.constraints.t.sharding_types: []; allowed: at least one",
        ),
        (
            {"constraints": {"t": {"compute_kernels": ["fuse"]}}},
            "planner.constraints.t.compute_kernels[0]: 'fuse'; allowed: 'dense', 'fused', ",
        ),
        ({"constraints": {"t": {"ranks": [-1]}}}, "planner.constraints.t.ranks[0]: -1; allowed: at least 0"),
        (
            {"topology": "1x4", "constraints": {"a.b": {"ranks": [3, 4]}}},
            "planner.constraints['a.b'].ranks[1]: 4; allowed: 0..3, the ranks of topology 1x4",
        ),
        (
            {"constraints": {"t": {"min_partition": 6}}},
            "planner.constraints.t.min_partition: 6; allowed: at least 4 and a multiple of 4",
        ),
        ({"constraints": {"t": {"pooling_factor": 0}}}, "planner.constraints.t.pooling_factor: 0; allowed: above 0"),
    ],
)
def test_errors_of_the_planner(section: dict[str, Any], message: str) -> None:
    assert error_of(load, PlannerSpec, section, "planner").startswith(message)


def test_constraints_on_unknown_tables() -> None:
    spec = PlannerSpec(constraints={name: ConstraintSpec() for name in ("t_usr", "t_item", "zzz")})
    assert error_of(spec.check_tables, ["t_item", "t_user"]) == (
        "2 errors\n  planner.constraints.t_usr: no such table; did you mean 't_user'?\n"
        "  planner.constraints.zzz: no such table; allowed: t_item, t_user"
    )
    many = [f"table_{i}" for i in range(10_000)]
    assert error_of(PlannerSpec(constraints={"q": ConstraintSpec()}).check_tables, many).endswith("table_19, …")
    spec.check_tables(["t_usr", "t_item", "zzz", "more"])
    tied = load(PlannerSpec, {"constraints": {"a": {"same_rank_as": "bb"}, "b": {"same_rank_as": "zzz"}}})
    assert error_of(tied.check_tables, ["a", "b", "bbb"], "planner") == (
        "2 errors\n  planner.constraints.a.same_rank_as: no table 'bb'; did you mean 'bbb'?\n"
        "  planner.constraints.b.same_rank_as: no table 'zzz'; allowed: a, b, bbb"
    )
    assert load(PlannerSpec, {"constraints": {"a": {"same_rank_as": "b"}}}).same_rank_as() == {"a": "b"}


# --- the document ---


def test_examples_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    opening, explained, anchored, planner, overlay = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    file = written(tmp_path, opening)
    assert [(t.name, t.num_embeddings) for t in read_tables(file)] == [("t_user", 1_000_000), ("t_country", 250)]
    assert read_planner(file).world_size == 16
    assert [(t.name, t.num_embeddings, t.partitions) for t in read_tables(written(tmp_path, anchored))] == [
        ("cat_0", 1_460, QuotientRemainder(num_collisions=4)),
        ("cat_1", 583, QuotientRemainder(num_collisions=4)),
        ("cat_2", 10_131_227, QuotientRemainder(num_collisions=60)),
    ]
    base = "criteo_kaggle_full.yaml"
    overlaid = read_tables(written(tmp_path, overlay.replace(base, str(DOCUMENT.parents[1] / "configs" / base))))
    assert [t.partitions.num_collisions for t in overlaid if isinstance(t, CompositionalEmbeddingBagConfig)] == [
        60 if t.name == "cat_2" else 4 for t in overlaid if t.num_embeddings > 200
    ]
    written(tmp_path, explained + planner)
    monkeypatch.chdir(tmp_path)
    spaces: list[dict[str, Any]] = [{}, {"__name__": __name__}]
    for code, space in zip(re.findall(r"```python\n(.*?)```", text, re.DOTALL), spaces, strict=True):
        exec(code, space)
    assert spaces[0]["tables"][0].partitions == QuotientRemainder(compression=4.0, grouping="adjacent")
    assert spaces[0]["planner"].world_size == 16
    assert spaces[0]["ebc"].embedding_bag_configs() == spaces[0]["tables"]


def test_document_lists_every_key() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    specs = (QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition)
    for cls in (TableSpec, *specs, PlannerSpec, ConstraintSpec):
        missing = [f.name for f in dataclasses.fields(cls) if f"`{f.name}" not in text]
        assert not missing, (cls, missing)
