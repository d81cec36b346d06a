"""The ``tables:`` section: what it builds, the way back, and the error of each mistake."""

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
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.cli.schema import (
    ConfigError,
    TableSpec,
    build_tables,
    dump,
    load,
    load_tables,
    read_planner,
    read_tables,
    to_spec,
)
from torchrec_qr.partitions import PartitionSpec


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

# An entry, the spec that code would give, and the rows per partition of S ids.
SIZED: list[tuple[dict[str, Any], PartitionSpec, tuple[int, ...]]] = [
    ({"kind": "quotient_remainder", "num_collisions": 4}, QuotientRemainder(num_collisions=4), (250, 4)),
    (
        {"kind": "quotient_remainder", "num_collisions": 4, "grouping": "adjacent"},
        QuotientRemainder(num_collisions=4, grouping="adjacent"),
        (250, 4),
    ),
    ({"kind": "quotient_remainder", "balanced": True}, QuotientRemainder(balanced=True), (32, 32)),
    (
        {"kind": "quotient_remainder", "compression": 4, "grouping": "adjacent"},
        QuotientRemainder(compression=4.0, grouping="adjacent"),
        (200, 5),
    ),
    ({"kind": "mixed_radix", "sizes": [10, 10, 10]}, MixedRadix(sizes=[10, 10, 10]), (10, 10, 10)),
    (
        {"kind": "mixed_radix", "balanced": True, "num_partitions": 3},
        MixedRadix(balanced=True, num_partitions=3),
        (10, 10, 10),
    ),
    ({"kind": "mixed_radix", "balanced": False, "sizes": [50, 20]}, MixedRadix(sizes=[50, 20]), (50, 20)),
    ({"kind": "mixed_radix", "rows": 250, "num_partitions": 3}, MixedRadix(rows=250, num_partitions=3), (245, 3, 2)),
    ({"kind": "chinese_remainder", "sizes": [11, 10, 13]}, ChineseRemainder(sizes=[11, 10, 13]), (11, 10, 13)),
    (
        {"kind": "chinese_remainder", "balanced": True, "num_partitions": 3},
        ChineseRemainder(balanced=True, num_partitions=3),
        (13, 11, 7),
    ),
    ({"kind": "hash", "rows": 77}, HashPartition(rows=77), (77,)),
]


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "classes.npy", CLASSES)
    np.save(tmp_path / "maps" / "short.npy", CLASSES[:, :999])
    np.savez(tmp_path / "maps" / "two.npz", CLASSES, CLASSES)
    (tmp_path / "maps" / "text.npy").write_text("no array")
    return tmp_path


@pytest.mark.parametrize(("partitions", "spec", "sizes"), SIZED)
def test_kinds_and_sizings(partitions: dict[str, Any], spec: PartitionSpec, sizes: tuple[int, ...]) -> None:
    (config,) = load_tables([table(partitions=partitions)])
    assert config == CompositionalEmbeddingBagConfig(
        name="t", num_embeddings=S, embedding_dim=16, feature_names=["t"], partitions=spec
    )
    assert config.bound_partitions.sizes == sizes  # type: ignore[union-attr]
    for defaults in (False, True):
        entry = table(partitions=dump(spec, defaults=defaults))
        assert load(TableSpec, entry).partitions == spec


def test_a_file_of_classes_is_relative_to_the_base_dir(base_dir: Path) -> None:
    entry = table(partitions={"kind": "explicit", "file": "maps/classes.npy"})
    (config,) = load_tables([entry], base_dir)
    assert config.bound_partitions == ExplicitPartitions(torch.from_numpy(CLASSES)).bind(S)  # type: ignore[union-attr]
    assert config.partitions == ExplicitPartitions(file=str(base_dir / "maps" / "classes.npy"))  # type: ignore[union-attr]
    assert to_spec(config).build() == config
    assert dump(load(TableSpec, entry), defaults=False) == entry


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
    partitions = MixedRadix(sizes=[50, 20])
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
            table(partitions=QR, embedding_dim=6),
            "tables[1]: table 't': embedding_dim=6; allowed: positive multiples of 4",
        ),
        (
            table(partitions=QR, operation="mul"),
            "tables[1].operation: 'mul'; allowed: 'mult', 'add', 'concat', 'path'; did you mean 'mult'?",
        ),
        (table(id_hash="splitmix64"), "tables[1].id_hash: 'splitmix64'; allowed: only beside partitions, which table"),
        (
            table(partitions=QR, id_hash="splitmix"),
            "tables[1].id_hash: 'splitmix'; allowed: 'splitmix64'; did you mean 'splitmix64'?",
        ),
        (table(partitions=QR, id_hash="splitmix64", hash_seed=2**31), "tables[1].hash_seed: 2147483648; allowed: 0..2"),
        (table(partitions=QR, hash_seed=3), "tables[1]: table 't': hash_seed=3; allowed: 0, except beside id_hash"),
        (
            table(partitions=QR, id_hash="splitmix64", out_of_range="wrap"),
            "tables[1]: table 't': out_of_range='wrap'; allowed: the default, 'error', beside id_hash='splitmix64'",
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
        ({"num_collisions": 4}, ".kind: missing, and has no default"),
        ({**QR, "num_collision": 4}, ".num_collision: unknown key; did you mean 'num_collisions'?"),
        (
            {**QR, "num_collisions": 1001},
            ": table 't': QuotientRemainder: num_collisions must be between 1 and 1000 (num_embeddings), got 1001",
        ),
        ({**QR, "num_collisions": 4.0}, ".num_collisions: 4.0; allowed: int"),
        ({**QR, "grouping": "stride"}, ".grouping: 'stride'; allowed: 'strided', 'adjacent'; did you mean 'strided'?"),
        (
            {**QR, "sizes": [250, 4]},
            ".sizes: not a key of kind 'quotient_remainder', whose keys are num_collisions, compression, rows, "
            "balanced, grouping",
        ),
        (
            {"kind": "mixed_radix", "sizes": [50, 20], "num_partitions": 2},
            ": MixedRadix: num_partitions must not be given beside sizes, got 2",
        ),
        ({"kind": "explicit", "classes": [[0]]}, ".classes: unknown key; allowed: file"),
        ({"kind": "hash", "balanced": True}, ".balanced: not a key of kind 'hash', whose keys are rows, "),
        ({"kind": "mixed_radix", "sizes": [10, 0.5]}, ".sizes[1]: 0.5; allowed: int"),
        (
            {"kind": "quotient_remainder", "rows": 500, "num_partitions": 3},
            ".num_partitions: not a key of kind 'quotient_remainder', whose keys are ",
        ),
        (
            {"kind": "explicit", "file": "maps/none.npy"},
            ": table 't': ExplicitPartitions: file 'BASE/maps/none.npy' cannot be read: ",
        ),
        (
            {"kind": "explicit", "file": "maps/text.npy"},
            ": table 't': ExplicitPartitions: file 'BASE/maps/text.npy' cannot be read: ",
        ),
        (
            {"kind": "explicit", "file": "maps/two.npz"},
            ": table 't': ExplicitPartitions: file 'BASE/maps/two.npz' holds several arrays; allowed: a .npy "
            "file of integers, of shape (K, S)",
        ),
        (
            {"kind": "explicit", "file": "maps/short.npy"},
            ": table 't': ExplicitPartitions: num_embeddings must be 999, the ids of file 'BASE/maps/short.npy', "
            "got 1000",
        ),
    ],
)
def test_errors_of_partitions(base_dir: Path, partitions: dict[str, Any], message: str) -> None:
    first = table() | {"name": "first"}
    error = error_of(load_tables, [first, table(partitions=partitions)], base_dir)
    assert error.replace(str(base_dir), "BASE").startswith(f"tables[1].partitions{message}")


def test_errors_of_all_tables_come_together() -> None:
    bad = {"kind": "mixed_radix", "sizes": [2, 2]}
    entries = [table(partitions=bad) | {"name": name} for name in ("a", "b")]
    assert [error.split(", got")[0] for error in error_of(load_tables, entries).split("\n")] == [
        "2 errors",
        "  tables[0].partitions: table 'a': MixedRadix: the product of sizes must be at least num_embeddings (1000)",
        "  tables[1].partitions: table 'b': MixedRadix: the product of sizes must be at least num_embeddings (1000)",
    ]
    assert error_of(load_tables, {"planner": {}}) == "tables: missing, and has no default"
    assert error_of(load_tables, {"tables": None}) == "tables: None; allowed: a list"
    assert load_tables({"tables": [], "other": 3}) == []


def test_tables_of_a_larger_config(base_dir: Path) -> None:
    entry = table(partitions={"kind": "explicit", "file": "maps/classes.npy"})
    specs = load(tuple[TableSpec, ...], [entry, table() | {"name": "u"}], "tables")
    configs = build_tables(specs, base_dir)
    assert [fields_of(config) for config in configs] == [fields_of(spec.build(base_dir)) for spec in specs]
    with pytest.raises(ConfigError, match=r"^tables\[0\].partitions: table 't': .*maps/classes.npy' cannot be read: "):
        build_tables(specs, base_dir / "maps")


def test_a_file_of_classes_is_relative_to_the_file_that_names_it(base_dir: Path) -> None:
    entries = [table(partitions={"kind": "explicit", "file": "maps/classes.npy"}), table() | {"name": "u"}]
    sections = {"learning_rate": 0.1, "tables": entries, "planner": {"topology": "1x2"}}
    explicit, plain = read_tables(written(base_dir, yaml.safe_dump(sections)))
    assert explicit.partitions == ExplicitPartitions(file=str(base_dir / "maps" / "classes.npy"))  # type: ignore[union-attr]
    in_code = EmbeddingBagConfig(name="u", feature_names=["u"], num_embeddings=1000, embedding_dim=16)
    assert fields_of(plain) == fields_of(in_code)


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = written(
        tmp_path, "tables: [{name: t, num_embeddings: 10, embedding_dim: 4, pooling: max}]\nplanner: {devic: cpu}"
    )
    assert error_of(read_tables, file) == f"{file}: tables[0].pooling: 'max'; allowed: 'sum', 'mean'"
    assert error_of(read_planner, file) == f"{file}: planner.devic: unknown key; did you mean 'device'?"
    with pytest.raises(FileNotFoundError):
        read_tables(tmp_path / "none.yaml")


# Valid for tables of 1000 ids.
closed_forms = st.sampled_from([spec for _, spec, _ in SIZED])
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
hashed_fields = compositional_fields | {
    "out_of_range": st.just("error"),
    "id_hash": st.just("splitmix64"),
    "hash_seed": st.integers(0, 2**31 - 1),
}
specs = st.one_of(
    st.builds(TableSpec, **plain_fields),
    st.builds(
        TableSpec,
        partitions=closed_forms,
        operation=st.sampled_from(["mult", "add", "concat"]),
        **compositional_fields,
    ),
    st.builds(TableSpec, partitions=closed_forms, **hashed_fields),
    st.builds(
        TableSpec,
        partitions=closed_forms,
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


IN_MEMORY = {"partitions": ExplicitPartitions(torch.from_numpy(CLASSES))}
ZEROS = {"init_fn": nn.init.zeros_}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (CompositionalEmbeddingBagConfig, IN_MEMORY, ": classes in memory cannot be expressed in YAML; save them as"),
        (CompositionalEmbeddingConfig, ZEROS | {"partitions": HashPartition(rows=9)}, ": init_fn=<function zeros_"),
        (EmbeddingBagConfig, ZEROS, ": init_fn=<function zeros_"),
        (EmbeddingBagConfig, {"need_pos": True}, ": need_pos=True cannot be expressed in YAML"),
        (EmbeddingBagConfig, {"data_type": DataType.INT8}, ".data_type: 'int8'; allowed: 'fp32', 'fp16', 'bf16'"),
        (EmbeddingBagConfig, {"pooling": PoolingType.NONE}, ".pooling: 'none'; allowed: 'sum', 'mean'"),
    ],
)
def test_what_to_spec_refuses(config: type[BaseEmbeddingConfig], fields: dict[str, Any], message: str) -> None:
    common = {"name": "t", "num_embeddings": S, "embedding_dim": 8, "feature_names": ["f"]}
    with pytest.raises(ValueError, match=re.escape(f"table 't'{message}")):
        to_spec(config(**common | fields))
