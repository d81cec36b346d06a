"""A table with an ``id_hash`` takes raw 64-bit ids: a run keeps nothing of them, and new days bring any others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.config import read_job
from launch.data.id_values import hash_of_text
from launch.data.loader import open_data
from launch.data.meaning import Meaning
from launch.predict import predict
from tests.launch.jobs import run, with_set
from tests.launch.parquet_job import config, rows, write
from tests.run_metrics import forget_the_end, metrics
from torchrec_qr.cli.schema import ConfigError

HASHED = {"id_hash": "splitmix64", "hash_seed": 3, "num_embeddings": 2**40}
PARTITIONS = {"kind": "mixed_radix", "num_partitions": 3, "rows": 31_000}


def named_rows(n: int, seed: int, shift: int = 0) -> dict[str, Any]:
    """Rows whose users are strings, and whose labels depend on the user."""
    columns = rows(n, seed, shift)
    return {**columns, "user": [f"u_{user}" for user in columns["user"].tolist()]}


def hashed_config(folder: Path, tables: tuple[str, ...] = ("user",), **data: Any) -> Path:
    """Writes the config of a job some tables of which have an ``id_hash``."""
    path = config(folder, **data)
    job = yaml.safe_load(path.read_text())
    for table in job["tables"]:
        if table["name"] in tables:
            table.update(HASHED, partitions=PARTITIONS)
    path.write_text(yaml.safe_dump(job))
    return path


def ids_of(job_file: Path, feature: str) -> list[int]:
    job = read_job(job_file)
    with open_data(job, 0, 1).test() as batches:
        return [i for batch in batches for i in batch.sparse[feature].values().tolist()]


def test_strings_and_integers_reach_the_table_as_they_are(tmp_path: Path) -> None:
    user = ["u_1", "17", None, "ffffffffffffffff", "-3"] * 20
    raw = [hash_of_text(b"u_1"), 17, -(2**63), hash_of_text(b"ffffffffffffffff"), -3] * 20
    columns = {"label": [0, 1] * 50, "price": np.zeros(100), "user": user, "shop": [5] * 100}
    write(tmp_path / "a.parquet", columns)
    files = {"train_files": ["a.parquet"], "validation_files": ["a.parquet"], "test_files": ["a.parquet"]}
    job_file = hashed_config(tmp_path, **files)
    assert ids_of(job_file, "user") == raw
    assert ids_of(job_file, "shop") == [1] * 100  # of a vocabulary, as before


def test_hexadecimal_values_are_the_integers_that_they_write(tmp_path: Path) -> None:
    user = ["68fd1e64", "ffffffff", "ffffffffffffffff"] * 30
    columns = {"label": [0, 1, 1] * 30, "price": np.zeros(90), "user": user, "shop": [5] * 90}
    write(tmp_path / "a.parquet", columns)
    parquet = {"label": "label", "dense": ["price"], "hexadecimal": ["user"]}
    files = {"train_files": ["a.parquet"], "validation_files": ["a.parquet"], "test_files": ["a.parquet"]}
    job_file = hashed_config(tmp_path, tables=("user", "shop"), ids="modulo", parquet=parquet, **files)
    assert ids_of(job_file, "user") == [0x68FD1E64, 0xFFFFFFFF, -1] * 30


def test_nothing_is_kept_of_raw_values(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", named_rows(200, seed=1))
    files = {"train_files": ["a.parquet"], "validation_files": ["a.parquet"]}
    mixed = read_job(hashed_config(tmp_path, **files))
    meaning = Meaning.of_job(mixed, open_data(mixed, 0, 1).splits.train)
    folder = tmp_path / "mixed"
    folder.mkdir()
    meaning.write(folder)
    with np.load(folder / "vocabulary.npz") as arrays:
        assert set(arrays) == {"shop", "counts of shop"}
    assert Meaning.read(folder).described == meaning.described
    hashes = {f: of.get("id_hash") for f, of in meaning.described["features"].items()}
    assert hashes == {"user": "splitmix64", "shop": None}

    every = read_job(hashed_config(tmp_path, tables=("user", "shop"), ids="modulo", **files))
    meaning = Meaning.of_job(every, open_data(every, 0, 1).splits.train)
    folder = tmp_path / "every"
    folder.mkdir()
    meaning.write(folder)
    assert [path.name for path in folder.iterdir()] == ["meaning.json"]
    assert Meaning.read(folder).described["vocabulary"] is None


REFUSED = {
    "ids": ({"ids": "vocabulary"}, "data.ids: 'vocabulary'; allowed: 'modulo' or 'encoded', because every table has"),
    "min_count": ({"ids": "modulo", "min_count": 2}, "data.min_count: 2; allowed: 1, because every table has"),
    "file": ({"ids": "vocabulary", "vocabulary": "v.npz"}, "data.ids: 'vocabulary'; allowed: 'modulo' or 'encoded'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_vocabulary_that_no_table_uses_is_refused(tmp_path: Path, case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        read_job(hashed_config(tmp_path, tables=("user", "shop"), files=["a.parquet"], **data))


def test_numbers_of_a_vocabulary_are_no_raw_ids(tmp_path: Path) -> None:
    npy = {"format": "npy", "files": ["a"], "ids": "vocabulary", "parquet": {}}
    with pytest.raises(ConfigError, match="npy files have the numbers of a vocabulary otherwise, and table 'user'"):
        read_job(hashed_config(tmp_path, **npy))
    assert read_job(hashed_config(tmp_path, **{**npy, "vocabulary": "v.npz"})).mapped_features() == ("shop",)


@pytest.mark.slow
def test_a_new_day_of_new_ids_goes_on_and_is_scored(tmp_path: Path) -> None:
    write(tmp_path / "day_0.parquet", named_rows(3000, seed=1))
    write(tmp_path / "validation.parquet", named_rows(500, seed=3))
    files = {"train_files": ["day_*.parquet"], "validation_files": ["validation.parquet"]}
    job_file = hashed_config(tmp_path, tables=("user", "shop"), ids="modulo", **files)
    run(tmp_path, *with_set("train.max_steps=10"), config=job_file)
    forget_the_end(tmp_path / "t")
    assert not (tmp_path / "t" / "vocabulary.npz").exists()
    kept = Meaning.read(tmp_path / "t").hash

    new = named_rows(3000, seed=2)
    new["user"] = [f"new_{user}" for user in new["user"]]
    write(tmp_path / "day_1.parquet", new)
    unseen = {**new, "user": [f"unseen_{user}" for user in new["user"]]}
    write(tmp_path / "validation.parquet", {key: values[-1000:] for key, values in new.items()})
    printed = run(tmp_path, *with_set("train.max_steps=60"), config=job_file)
    assert "continues at step 10" in printed
    assert Meaning.read(tmp_path / "t").hash == kept
    # The label depends on the user alone: a row of all new ids would leave nothing to learn.
    assert metrics(tmp_path / "t")[-1]["auc"] > 0.65

    write(tmp_path / "unseen.parquet", unseen)
    scored = predict(tmp_path / "t", [str(tmp_path / "validation.parquet")], tmp_path / "scores.parquet")
    assert scored.quality.auc > 0.65
    strangers = predict(tmp_path / "t", [str(tmp_path / "unseen.parquet")], tmp_path / "strangers.parquet")
    assert strangers.rows == 3000
    assert strangers.quality.auc < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tables[user].hash_seed=4", "features.user.hash_seed: saved 3, here 4"),
        ("tables[user].id_hash=null", "features.user.id_hash: saved 'splitmix64', here None"),
    ],
)
def test_another_hash_is_another_meaning(tmp_path: Path, change: str, message: str) -> None:
    write(tmp_path / "a.parquet", named_rows(400, seed=1))
    files = {"train_files": ["a.parquet"], "validation_files": ["a.parquet"]}
    job = read_job(hashed_config(tmp_path, **files))
    meaning = Meaning.of_job(job, open_data(job, 0, 1).splits.train)
    overrides = [change] if "seed" in change else [change, "tables[user].hash_seed=0"]
    with pytest.raises(ValueError, match=message):
        meaning.check(read_job(tmp_path / "job.yaml", overrides), tmp_path)
