"""The job's YAML: overrides, round trips, and the error of each mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.config import Job, override, read_job, write_job
from launch.model import build_model
from torchrec_qr.cli.schema import ConfigError, build_tables, dump, load
from torchrec_qr.cli.schema.key_paths import overlaid

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def sections(**changed: Any) -> dict[str, Any]:
    return {
        "data": {"features": ["a", "b"]},
        "model": {"bottom_mlp": [8, 16]},
        "tables": [{"name": name, "num_embeddings": 100, "embedding_dim": 16} for name in "ab"],
        **changed,
    }


def error_of(given: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Job, given)
    return str(caught.value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_load_build_and_come_back(file: Path, tmp_path: Path) -> None:
    job = read_job(file)
    assert job.train.name == file.stem
    written = tmp_path / "config.yaml"
    written.write_text(write_job(job))
    assert read_job(written) == job
    short = dump(job, defaults=False)
    assert load(Job, short) == job
    assert "prefetch" not in short["data"]
    configs = build_tables(job.tables, file.parent)
    model = build_model(job.model, configs, torch.device("meta"))
    embeddings = [p for name, p in model.named_parameters() if "embedding_bags" in name]
    assert {p.device.type for p in embeddings} == {"meta"}
    stored = sum(p.numel() for p in embeddings)
    full = sum(t.num_embeddings * t.embedding_dim for t in configs)
    assert stored == full if file.stem.endswith(("full", "full_dcn")) else stored < 0.27 * full


def test_shipped_configs_are_all_there() -> None:
    kaggle = {f"criteo_kaggle_{variant}{model}" for variant in KAGGLE for model in ("", "_dcn")}
    assert {file.stem for file in CONFIGS} == {
        *kaggle,
        *("demo", "criteo_sample_full", "criteo_sample_qr", "mlperf_dcnv2_full", "mlperf_dcnv2_qr"),
    }


QR = {"kind": "quotient_remainder", "num_collisions": 4}
KAGGLE: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (2**40, {}),
    "hash": (4, {"partitions": {"kind": "hash", "compression": 4.0}}),
    "qr_mult": (4, {"partitions": QR, "operation": "mult"}),
    "qr_add": (4, {"partitions": QR, "operation": "add"}),
    "qr_concat": (4, {"partitions": QR, "operation": "concat"}),
    "qr_threshold": (200, {"partitions": QR, "operation": "mult"}),
    "mixed_radix": (200, {"partitions": {"kind": "mixed_radix", "compression": 4.0, "num_partitions": 3}}),
    "chinese_remainder": (200, {"partitions": {"kind": "chinese_remainder", "compression": 4.0, "num_partitions": 3}}),
    "path": (200, {"partitions": QR, "operation": "path", "path_hidden": 64}),
}
DCN = {"interaction": "dcn", "bottom_mlp": [], "cross_layers": 6, "top_mlp": [512, 256, 64]}


@pytest.mark.parametrize("model", ["", "_dcn"])
@pytest.mark.parametrize("variant", KAGGLE)
def test_kaggle_jobs_differ_in_method_model_and_name_alone(variant: str, model: str) -> None:
    folder = CONFIGS[0].parent
    least, method = KAGGLE[variant]
    expected = dump(read_job(folder / "criteo_kaggle_full.yaml"))
    for table in expected["tables"]:
        table |= method if table["num_embeddings"] > least else {}
    expected["model"] |= DCN if model else {}
    expected["train"]["name"] = f"criteo_kaggle_{variant}{model}"
    assert read_job(folder / f"criteo_kaggle_{variant}{model}.yaml") == load(Job, expected)


def test_the_recipes_totals() -> None:
    by_name = {file.stem: file for file in CONFIGS}
    kaggle = read_job(by_name["criteo_kaggle_full"])
    assert sum(kaggle.rows_of_features()) * 16 == 540_201_232  # the paper's 5.4 * 10^8 parameters
    mlperf = read_job(by_name["mlperf_dcnv2_full"])
    assert sum(mlperf.rows_of_features()) == 204_184_588
    assert sum(mlperf.data.multi_hot or ()) == 214
    assert mlperf.train.batch_size * (mlperf.planner.world_size or 0) == 65_536


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
        ({"train": {"batchsize": 3}}, "train.batchsize: unknown key; did you mean 'batch_size'?"),
        ({"train": {"batch_size": 0}}, "train.batch_size: 0; allowed: at least 1"),
        ({"train": {"name": "a/b"}}, "train.name: 'a/b'; allowed: the name of a folder"),
        ({"train": {"stop_at_auc": 80.0}}, "train.stop_at_auc: 80.0; allowed: 0..1"),
        ({"optimizer": {"sparse": {"name": "adagard"}}}, "did you mean 'adagrad'?"),
        ({"optimizer": {"sparse": {"lr": 0}}}, "optimizer.sparse.lr: 0; allowed: above 0"),
        ({"optimizer": {"dense": {"name": "rowwise_adagrad"}}}, "optimizer.dense.name: 'rowwise_adagrad'; allowed"),
        ({"optimizer": {"dense": {"name": "lamb"}}}, "optimizer.dense.name: 'lamb'; allowed: 'sgd', 'adagrad', 'adam'"),
        ({"optimizer": {"sparse": {"lr": float("inf")}}}, "optimizer.sparse.lr: inf; allowed: above 0 and below inf"),
        (
            {"optimizer": {"sparse": {"weight_decay": 0.5}}},
            "optimizer.sparse.weight_decay_mode: 'none'; allowed: 'l2' or 'decoupled', under weight_decay: 0.5 of adag",
        ),
        (
            {"optimizer": {"sparse": {"name": "adam", "weight_decay_mode": "l2"}}},
            "optimizer.sparse.weight_decay_mode: 'l2'; allowed: 'decoupled', under weight_decay: 0 of adam",
        ),
        (
            {"optimizer": {"dense": {"name": "sgd", "weight_decay_mode": "decoupled"}}},
            "optimizer.dense.weight_decay_mode: 'decoupled'; allowed: 'l2', under weight_decay: 0 of sgd",
        ),
        ({"schedule": {"kind": "poly"}}, "schedule.decay_steps: 0; allowed: at least 1, under kind: poly"),
        ({"model": {"bottom_mlp": [8, 32]}}, "model.bottom_mlp: [8, 32]; allowed: widths that end in embedding_dim=16"),
        (
            {"model": {"interaction": "dcn", "bottom_mlp": [16]}},
            "model.bottom_mlp: [16]; allowed: none, under interaction",
        ),
        (
            {"model": {"bottom_mlp": [32], "embedding_dim": 32}},
            "tables[1].embedding_dim: 16; allowed: 32, as model.embedding_dim",
        ),
        (
            {"data": {"features": ["a", "c"]}},
            "tables[1].feature_names: 'b'; allowed: features that are in data.features",
        ),
        (
            {"data": {"features": ["a", "b", "c"]}},
            "data.features[2]: 'c'; allowed: features that have a table in tables",
        ),
        ({"data": {"missing_flags": True}}, "model.dense_in_features: 13; allowed: 26"),
        ({"data": {"format": "npy"}}, "data.files: []; allowed: files, or train_files"),
        ({"data": {"files": ["x"]}}, "data.files: ['x']; allowed: none, under format: generator"),
        ({"data": {"multi_hot": [1]}}, "data.multi_hot: [1]; allowed: one for each of the 2"),
        ({"data": {"split": [0.5, 0.1, 0.1]}}, "data.split: [0.5, 0.1, 0.1]; allowed: three shares"),
        ({"data": {"format": "criteo_tsv", "files": ["x"]}}, "data.features: ['a', 'b']; allowed: 26"),
        ({"planner": {"batch_size": 5}}, "planner.batch_size: 5; allowed: 1024, as train.batch_size, or nothing"),
        ({"planner": {"constraints": {"aa": {}}}}, "planner.constraints.aa: no such table; did you mean 'a'?"),
    ],
)
def test_mistakes(changed: dict[str, Any], message: str) -> None:
    assert message in error_of(overlaid(sections(), changed))


def test_tables_of_one_name() -> None:
    table = {"num_embeddings": 9, "embedding_dim": 16}
    tables = [*sections()["tables"], {**table, "name": "a"}]
    expected = "tables[2].name: 'a'; allowed: another name than tables[0]'s"
    assert error_of(sections(tables=tables)) == expected
    other_features = [*sections()["tables"], {**table, "name": "a", "feature_names": ["b"]}]
    assert expected in error_of(sections(tables=other_features))


def test_an_empty_file_lacks_tables_and_layers() -> None:
    error = error_of({})
    assert "tables: missing, and has no default" in error
    assert "model.bottom_mlp: []; allowed: widths that end in embedding_dim=16" in error


def test_a_feature_in_two_tables() -> None:
    tables = [*sections()["tables"], {"name": "c", "num_embeddings": 9, "embedding_dim": 16, "feature_names": ["a"]}]
    expected = "tables[2].feature_names: 'a'; allowed: each feature in one table, which for 'a' is 'a'"
    assert error_of(sections(tables=tables)) == expected


def test_overrides_change_their_own_place_alone(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        """
data: {features: [a, b]}
model: {bottom_mlp: [16]}
tables:
  - &a {name: a, num_embeddings: 100, embedding_dim: 16, partitions: {kind: hash, rows: 10}}
  - {<<: *a, name: b}
"""
    )
    job = read_job(
        file,
        [
            "tables[1].partitions.rows=5",
            "tables[*].embedding_dim=32",
            "model.embedding_dim=32",
            "model.bottom_mlp=[64, 32]",
            "optimizer.sparse.lr=1e-3",
            "train.stop_at_auc=0.8",
            "train.stop_at_auc=null",
            "train.name=x=y",
            "planner.constraints.a.sharding_types=[row_wise]",
        ],
    )
    partitions = [table.partitions for table in job.tables]
    assert [p.rows for p in partitions] == [10, 5]
    assert [table.embedding_dim for table in job.tables] == [32, 32]
    assert (job.model.bottom_mlp, job.optimizer.sparse.lr) == ((64, 32), 0.001)
    assert (job.train.stop_at_auc, job.train.name) == (None, "x=y")
    assert job.planner.parameter_constraints()["a"].sharding_types == ["row_wise"]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.batch_size", "'train.batch_size'; allowed: KEY=VALUE"),
        ("train..x=1", "'train..x'; allowed: a path of keys, such as model.embedding_dim"),
        ("tables[2].name=x", "tables[2].name: tables has 2 entries"),
        ("tables[bb].name=x", "tables[bb].name: tables has no entry of the name 'bb'; did you mean 'b'?"),
        ("tables.a.name=x", "tables.a.name: tables has no keys"),
        ("train[0]=x", "train[0]: train is not a list"),
        ("train.name=[", "train.name: '[' is not YAML"),
    ],
)
def test_overrides_that_are_wrong(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(sections(train={}), [assignment])
    assert message in str(caught.value)


def test_an_override_is_checked_as_the_file_is(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(sections()))
    with pytest.raises(ConfigError, match=r"job.yaml: train.batch_sise: unknown key; did you mean 'batch_size'\?"):
        read_job(file, ["train.batch_sise=3"])
