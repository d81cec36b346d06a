"""The ``tables:`` section: what it builds, the way back, and what every mistake is told."""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from schema_cases import error_of, written
from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    Partitions,
    QuotientRemainder,
)
from torchrec_qr.schema import (
    ConfigError,
    PartitionsSpec,
    TableSpec,
    build_tables,
    dump,
    load,
    load_tables,
    read_planner,
    read_tables,
    to_spec,
)


def table(**fields: Any) -> dict[str, Any]:
    return {"name": "t", "num_embeddings": 1000, "embedding_dim": 16, **fields}


def fields_of(config: BaseEmbeddingConfig) -> dict[str, Any]:
    """All fields, TorchRec's default ``init_fn`` (a partial, equal to itself alone) as what it does."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(fields["init_fn"], partial):
        fields["init_fn"] = (fields["init_fn"].func, fields["init_fn"].keywords)
    return {"class": type(config), **fields}


S = 1000
# The map of the class of every id that a hash of 30 rows and a quotient of 40 rows would give: complementary.
CLASSES = np.stack([np.arange(S) % 30, np.arange(S) // 30])

SIZED = [
    ({"kind": "quotient_remainder", "num_collisions": 4}, QuotientRemainder(S, 4)),
    ({"kind": "quotient_remainder", "num_collisions": 4, "grouping": "adjacent"}, QuotientRemainder(S, 4, "adjacent")),
    ({"kind": "quotient_remainder", "balanced": True}, QuotientRemainder(S, 32)),
    (
        {"kind": "quotient_remainder", "compression": 4, "grouping": "adjacent"},
        QuotientRemainder.for_compression(S, 4.0, grouping="adjacent"),
    ),
    ({"kind": "quotient_remainder", "rows": 205, "num_partitions": 2}, QuotientRemainder(S, 5)),
    ({"kind": "mixed_radix", "sizes": [10, 10, 10]}, MixedRadix(S, [10, 10, 10])),
    ({"kind": "mixed_radix", "balanced": True, "num_partitions": 3}, MixedRadix(S, [10, 10, 10])),
    ({"kind": "mixed_radix", "balanced": False, "sizes": [50, 20]}, MixedRadix(S, [50, 20])),
    ({"kind": "mixed_radix", "compression": 4.0}, MixedRadix.for_budget(S, 250)),
    ({"kind": "mixed_radix", "rows": 250, "num_partitions": 3}, MixedRadix.for_budget(S, 250, 3)),
    ({"kind": "chinese_remainder", "sizes": [11, 10, 13]}, ChineseRemainder(S, [11, 10, 13])),
    ({"kind": "chinese_remainder", "balanced": True, "num_partitions": 3}, ChineseRemainder.balanced(S, 3)),
    ({"kind": "chinese_remainder", "compression": 5.0}, ChineseRemainder.for_budget(S, 200)),
    ({"kind": "chinese_remainder", "rows": 100, "num_partitions": 3}, ChineseRemainder.for_budget(S, 100, 3)),
    ({"kind": "hash", "num_rows": 300}, HashPartition(S, 300)),
    ({"kind": "hash", "compression": 4.0}, HashPartition(S, 250)),
    ({"kind": "hash", "rows": 77}, HashPartition(S, 77)),
    ({"kind": "explicit", "file": "maps/classes.npy"}, ExplicitPartitions(torch.from_numpy(CLASSES))),
]


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "classes.npy", CLASSES)
    np.save(tmp_path / "maps" / "floats.npy", CLASSES.astype(np.float32))
    np.save(tmp_path / "maps" / "short.npy", CLASSES[:, :999])
    np.save(tmp_path / "maps" / "equal.npy", CLASSES % 30)
    np.savez(tmp_path / "maps" / "two.npz", CLASSES, CLASSES)
    (tmp_path / "maps" / "text.npy").write_text("no array")
    return tmp_path


@pytest.mark.parametrize(("partitions", "expected"), SIZED)
def test_kinds_and_sizings(base_dir: Path, partitions: dict[str, Any], expected: Partitions) -> None:
    (config,) = load_tables([table(partitions=partitions)], base_dir)
    assert config == CompositionalEmbeddingBagConfig(
        name="t", num_embeddings=S, embedding_dim=16, feature_names=["t"], partitions=expected
    )
    assert load(PartitionsSpec, dump(load(PartitionsSpec, partitions))).build(S, base_dir) == expected


def test_every_key_of_a_table() -> None:
    path = {"operation": "path", "path_hidden": 8, "path_activation": "tanh"}
    radix = {"kind": "mixed_radix", "sizes": [50, 20]}
    concat = {"operation": "concat", "partition_dims": [12, 4], "init": "balanced", "out_of_range": "wrap"}
    common = {"feature_names": ["f", "g"], "data_type": "bf16", "weight_init_min": -0.5, "weight_init_max": 0.5}
    first, second, third = (
        table(partitions=radix, pooling="mean", **common, **path),
        table(partitions=radix, **common, **concat) | {"name": "u"},
        table(pooling="mean", **common) | {"name": "v"},
    )
    fields = {**common, "num_embeddings": S, "embedding_dim": 16, "data_type": DataType.BF16}
    partitions = MixedRadix(S, [50, 20])
    mean = PoolingType.MEAN
    assert [fields_of(config) for config in load_tables([first, second, third])] == [
        fields_of(CompositionalEmbeddingBagConfig(name="t", partitions=partitions, pooling=mean, **path, **fields)),
        fields_of(CompositionalEmbeddingBagConfig(name="u", partitions=partitions, **concat, **fields)),
        fields_of(EmbeddingBagConfig(name="v", pooling=mean, **fields)),
    ]
    assert fields_of(load(TableSpec, second).build_sequence()) == fields_of(
        CompositionalEmbeddingConfig(name="u", partitions=partitions, **concat, **fields)
    )
    sequence = load(TableSpec, table(**common)).build_sequence()
    assert fields_of(sequence) == fields_of(EmbeddingConfig(name="t", **fields))
    assert error_of(load(TableSpec, third).build_sequence) == (
        "pooling: 'mean'; allowed: none, as table 'v' is not pooled"
    )


QR = {"kind": "quotient_remainder", "num_collisions": 4}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (table(num_embedings=3), "tables[1].num_embedings: unknown key; did you mean 'num_embeddings'?"),
        (table(num_embeddings=0), "tables[1].num_embeddings: 0; allowed: 1..1099511627776"),
        (table(num_embeddings=2**40 + 1), "tables[1].num_embeddings: 1099511627777; allowed: 1..1099511627776"),
        (table(embedding_dim=0), "tables[1].embedding_dim: 0; allowed: at least 1"),
        (table(feature_names="f"), "tables[1].feature_names: 'f'; allowed: a list"),
        (table(feature_names=[]), "tables[1].feature_names: []; allowed: at least one feature"),
        (table(feature_names=[False]), "tables[1].feature_names[0]: False; allowed: str"),
        (table(pooling="avg"), "tables[1].pooling: 'avg'; allowed: 'sum', 'mean'"),
        (table(data_type="int8"), "tables[1].data_type: 'int8'; allowed: 'fp32', 'fp16', 'bf16'"),
        (
            table(operation="add"),
            "tables[1].operation: 'add'; allowed: only beside partitions, which table 't' lacks",
        ),
        (
            table(out_of_range="clamp"),
            "tables[1].out_of_range: 'clamp'; allowed: only beside partitions, which table 't' lacks",
        ),
        (
            table(partitions=QR, embedding_dim=6),
            "tables[1]: table 't': embedding_dim=6; allowed: positive multiples of 4",
        ),
        (
            table(partitions=QR, operation="mul"),
            "tables[1].operation: 'mul'; allowed: 'mult', 'add', 'concat', 'path'; did you mean 'mult'?",
        ),
        (
            table(partitions=QR, operation="concat", partition_dims=[8, 4]),
            "tables[1]: table 't': partition_dims=[8, 4]; allowed: a sum equal to embedding_dim=16",
        ),
        (
            table(partitions=QR, path_hidden=4),
            "tables[1]: table 't': path_hidden=4; allowed: None, except under operation='path'",
        ),
        (
            table(partitions=QR, weight_init_min=1.0, weight_init_max=0.5),
            "tables[1]: table 't': weight_init_max=0.5; allowed: above weight_init_min=1.0",
        ),
        (table() | {"name": "first"}, "tables[1].name: 'first'; allowed: a name of its own, which tables[0] has too"),
    ],
)
def test_errors_of_tables(entry: dict[str, Any], message: str) -> None:
    first = table() | {"name": "first"}
    error = error_of(load_tables, [first, entry])
    if entry["name"] == "first":
        error = error.splitlines()[-1].strip()
    assert error.startswith(message)


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        (
            {"kind": "qr"},
            ".kind: 'qr'; allowed: 'quotient_remainder', 'mixed_radix', 'chinese_remainder', 'explicit', 'hash'",
        ),
        ({"kind": "mixed_radx"}, ".kind: 'mixed_radx'; allowed: "),
        ({"num_collisions": 4}, ".kind: missing, and has no default"),
        ({**QR, "num_collision": 4}, ".num_collision: unknown key; did you mean 'num_collisions'?"),
        ({**QR, "num_collisions": 0}, ".num_collisions: 0; allowed: 1..1000"),
        ({**QR, "num_collisions": 1001}, ".num_collisions: 1001; allowed: 1..1000"),
        ({**QR, "num_collisions": 4.0}, ".num_collisions: 4.0; allowed: int"),
        ({**QR, "grouping": "stride"}, ".grouping: 'stride'; allowed: 'strided', 'adjacent'; did you mean 'strided'?"),
        (
            {**QR, "sizes": [250, 4]},
            ".sizes: not a key of kind 'quotient_remainder', whose keys are num_collisions, balanced, compression, "
            "rows, grouping, num_partitions",
        ),
        ({**QR, "num_partitions": 2}, ".num_partitions: 2; allowed: only without num_collisions, which implies it"),
        (
            {"kind": "quotient_remainder"},
            ": no size; allowed: exactly one of num_collisions, balanced, compression, rows",
        ),
        (
            {"kind": "mixed_radix", "balanced": True, "rows": 500},
            ": balanced, rows; allowed: exactly one of sizes, balanced, compression, rows",
        ),
        (
            {"kind": "mixed_radix", "balanced": False},
            ": no size; allowed: exactly one of sizes, balanced, compression, rows",
        ),
        ({"kind": "explicit"}, ": no size; allowed: file"),
        ({"kind": "hash", "balanced": True}, ".balanced: not a key of kind 'hash', whose keys are num_rows, "),
        ({"kind": "hash", "num_rows": 0}, ".num_rows: 0; allowed: 1..1099511627776"),
        ({"kind": "mixed_radix", "sizes": [10, 0]}, ".sizes[1]: 0; allowed: 1..1099511627776"),
        ({"kind": "mixed_radix", "compression": 0.5}, ".compression: 0.5; allowed: at least 1"),
        ({"kind": "mixed_radix", "rows": 0}, ".rows: 0; allowed: at least 1"),
        ({"kind": "mixed_radix", "rows": 9, "num_partitions": 0}, ".num_partitions: 0; allowed: at least 1"),
        (
            {"kind": "mixed_radix", "sizes": [10, 10]},
            ": table 't': MixedRadix: the product of sizes must be at least num_ids (1000), got sizes [10, 10]",
        ),
        (
            {"kind": "mixed_radix", "sizes": []},
            ": table 't': MixedRadix: sizes must hold at least one size, got none",
        ),
        (
            {"kind": "chinese_remainder", "sizes": [40, 30]},
            ": table 't': ChineseRemainder: sizes must be pairwise coprime, got [40, 30]",
        ),
        (
            {"kind": "mixed_radix", "compression": 100.0},
            ": table 't': MixedRadix: rows must be at least 64, the least total that keeps 1000 ids apart with 2 "
            "partitions, got 10 (ratio 100.0)",
        ),
        (
            {"kind": "quotient_remainder", "rows": 500, "num_partitions": 3},
            ": table 't': QuotientRemainder: num_partitions must be 2 (MixedRadix takes more), got 3",
        ),
        ({"kind": "explicit", "file": "maps/none.npy"}, ".file: 'maps/none.npy' cannot be read: "),
        ({"kind": "explicit", "file": "maps/text.npy"}, ".file: 'maps/text.npy' cannot be read: "),
        (
            {"kind": "explicit", "file": "maps/two.npz"},
            ".file: 'maps/two.npz' is several arrays; allowed: a .npy file of integers, of shape (K, 1000)",
        ),
        (
            {"kind": "explicit", "file": "maps/short.npy"},
            ".file: 'maps/short.npy' is of shape (2, 999); allowed: a .npy file of integers, of shape (K, 1000)",
        ),
        ({"kind": "explicit", "file": "maps/floats.npy"}, ": table 't': ExplicitPartitions: classes must have one of "),
        (
            {"kind": "explicit", "file": "maps/equal.npy"},
            ": table 't': ExplicitPartitions: classes must be complementary",
        ),
    ],
)
def test_errors_of_partitions(base_dir: Path, partitions: dict[str, Any], message: str) -> None:
    first = table() | {"name": "first"}
    error = error_of(load_tables, [first, table(partitions=partitions)], base_dir)
    assert error.startswith(f"tables[1].partitions{message}")


def test_errors_of_all_tables_come_together() -> None:
    bad = {"kind": "mixed_radix", "sizes": [2, 2]}
    entries = [table(partitions=bad) | {"name": name} for name in ("a", "b")]
    assert [error.split(", got")[0] for error in error_of(load_tables, entries).split("\n")] == [
        "2 errors",
        "  tables[0].partitions: table 'a': MixedRadix: the product of sizes must be at least num_ids (1000)",
        "  tables[1].partitions: table 'b': MixedRadix: the product of sizes must be at least num_ids (1000)",
    ]
    assert error_of(load_tables, {"planner": {}}) == "tables: missing, and has no default"
    assert error_of(load_tables, {"tables": None}) == "tables: None; allowed: a list"
    assert load_tables({"tables": [], "other": 3}) == []


def test_tables_of_a_larger_config(base_dir: Path) -> None:
    entry = table(partitions={"kind": "explicit", "file": "maps/classes.npy"})
    specs = load(tuple[TableSpec, ...], [entry, table() | {"name": "u"}], "tables")
    configs = build_tables(specs, base_dir)
    assert [fields_of(config) for config in configs] == [fields_of(spec.build(base_dir)) for spec in specs]
    with pytest.raises(ConfigError, match=r"^tables\[0\].partitions.file: 'maps/classes.npy' cannot be read: "):
        build_tables(specs, base_dir / "maps")


def test_file_builds_the_collection_that_code_builds(base_dir: Path) -> None:
    file = written(
        base_dir,
        """
learning_rate: 0.1
tables:
  - name: t_user
    feature_names: [user, seen_by]
    num_embeddings: 1_000
    embedding_dim: 16
    pooling: mean
    data_type: fp16
    partitions: &qr {kind: quotient_remainder, num_collisions: 4, grouping: adjacent}
  - name: t_item
    num_embeddings: 1_000
    embedding_dim: 16
    partitions: {kind: explicit, file: maps/classes.npy}
    operation: concat
    partition_dims: [12, 4]
  - {name: t_shop, num_embeddings: 500, embedding_dim: 8, partitions: *qr, operation: path, path_hidden: 2}
  - {name: t_country, num_embeddings: 250, embedding_dim: 8}
planner: {topology: 1x2}
""",
    )
    in_code = [
        CompositionalEmbeddingBagConfig(
            name="t_user",
            feature_names=["user", "seen_by"],
            num_embeddings=1000,
            embedding_dim=16,
            pooling=PoolingType.MEAN,
            data_type=DataType.FP16,
            partitions=QuotientRemainder(1000, 4, "adjacent"),
        ),
        CompositionalEmbeddingBagConfig(
            name="t_item",
            feature_names=["t_item"],
            num_embeddings=1000,
            embedding_dim=16,
            partitions=ExplicitPartitions(torch.from_numpy(CLASSES)),
            operation="concat",
            partition_dims=[12, 4],
        ),
        CompositionalEmbeddingBagConfig(
            name="t_shop",
            feature_names=["t_shop"],
            num_embeddings=500,
            embedding_dim=8,
            partitions=QuotientRemainder(500, 4, "adjacent"),
            operation="path",
            path_hidden=2,
        ),
        EmbeddingBagConfig(name="t_country", feature_names=["t_country"], num_embeddings=250, embedding_dim=8),
    ]
    from_file = read_tables(file)
    assert [fields_of(config) for config in from_file] == [fields_of(config) for config in in_code]
    states = [CompositionalEmbeddingBagCollection(tables=tables).state_dict() for tables in (from_file, in_code)]
    shapes = [{key: (value.shape, value.dtype) for key, value in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    fingerprints = [key for key in states[0] if key.endswith("fingerprint")]
    assert len(fingerprints) == 3
    assert all(torch.equal(states[0][key], states[1][key]) for key in fingerprints)


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = written(
        tmp_path, "tables: [{name: t, num_embeddings: 10, embedding_dim: 4, pooling: max}]\nplanner: {devic: cpu}"
    )
    assert error_of(read_tables, file) == f"{file}: tables[0].pooling: 'max'; allowed: 'sum', 'mean'"
    assert error_of(read_planner, file) == f"{file}: planner.devic: unknown key; did you mean 'device'?"
    with pytest.raises(FileNotFoundError):
        read_tables(tmp_path / "none.yaml")


# Valid tables of 1000 ids whose partitions are given by their own key, so that to_spec gives them back as they are.
closed_forms = st.sampled_from(
    [
        PartitionsSpec("quotient_remainder", num_collisions=7, grouping="strided"),
        PartitionsSpec("quotient_remainder", num_collisions=40, grouping="adjacent"),
        PartitionsSpec("mixed_radix", sizes=(10, 20, 5)),
        PartitionsSpec("chinese_remainder", sizes=(31, 37)),
        PartitionsSpec("hash", num_rows=99),
    ]
)
sized = st.sampled_from(
    [
        PartitionsSpec("quotient_remainder", balanced=True),
        PartitionsSpec("mixed_radix", compression=3.5, num_partitions=3),
        PartitionsSpec("chinese_remainder", rows=300),
        PartitionsSpec("hash", compression=2.0),
    ]
)
plain_fields: dict[str, Any] = {
    "name": st.text("abc.-é1", min_size=1),
    "num_embeddings": st.just(S),
    "embedding_dim": st.integers(3, 9).map(lambda n: 4 * n),
    "feature_names": st.none() | st.lists(st.text("xyz", min_size=1), min_size=1, unique=True).map(tuple),
    "pooling": st.sampled_from(["sum", "mean"]),
    "data_type": st.sampled_from(["fp32", "fp16", "bf16"]),
    "weight_init_max": st.none() | st.floats(1, 2),
}
compositional_fields: dict[str, Any] = plain_fields | {
    "init": st.just("unit"),
    "out_of_range": st.sampled_from(["error", "clamp", "wrap", "unchecked"]),
}
specs = st.one_of(
    st.builds(TableSpec, **plain_fields),
    st.builds(
        TableSpec,
        partitions=closed_forms | sized,
        operation=st.sampled_from(["mult", "add", "concat"]),
        **compositional_fields,
    ),
    st.builds(
        TableSpec,
        partitions=closed_forms | sized,
        operation=st.just("path"),
        path_hidden=st.none() | st.integers(1, 9),
        path_activation=st.sampled_from(["relu", "tanh"]),
        **compositional_fields,
    ),
)


@given(specs, st.booleans())
def test_tables_survive_yaml_and_to_spec(spec: TableSpec, defaults: bool) -> None:
    entry = yaml.safe_load(yaml.safe_dump(dump(spec, defaults=defaults)))
    assert load(TableSpec, entry) == spec
    config = spec.build()
    again = to_spec(config)
    assert fields_of(again.build()) == fields_of(config)
    assert to_spec(again.build()) == again
    sequence = dataclasses.replace(spec, pooling="sum").build_sequence()
    assert fields_of(to_spec(sequence).build_sequence()) == fields_of(sequence)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CompositionalEmbeddingBagConfig(
                name="t", num_embeddings=S, embedding_dim=8, partitions=ExplicitPartitions(torch.from_numpy(CLASSES))
            ),
            "table 't': explicit partitions cannot be expressed in YAML; save class_map as a .npy file",
        ),
        (
            CompositionalEmbeddingConfig(
                name="t", num_embeddings=S, embedding_dim=8, partitions=HashPartition(S, 9), init_fn=nn.init.zeros_
            ),
            "table 't': init_fn=<function zeros_",
        ),
        (
            EmbeddingBagConfig(name="t", num_embeddings=S, embedding_dim=8, init_fn=nn.init.zeros_),
            "table 't': init_fn=<function zeros_",
        ),
        (
            EmbeddingBagConfig(name="t", num_embeddings=S, embedding_dim=8, need_pos=True),
            "table 't': need_pos=True cannot be expressed in YAML",
        ),
        (
            EmbeddingBagConfig(
                name="t", num_embeddings=S, embedding_dim=8, feature_names=["f"], data_type=DataType.INT8
            ),
            "table 't'.data_type: 'int8'; allowed: 'fp32', 'fp16', 'bf16'",
        ),
        (
            EmbeddingBagConfig(
                name="t", num_embeddings=S, embedding_dim=8, feature_names=["f"], pooling=PoolingType.NONE
            ),
            "table 't'.pooling: 'none'; allowed: 'sum', 'mean'",
        ),
    ],
)
def test_what_to_spec_refuses(config: BaseEmbeddingConfig, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_spec(config)
