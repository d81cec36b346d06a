"""The map from raw values to rows belongs to the run: other files keep it, and what would change it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.config import read_job
from launch.data.errors import BadRows, DataError
from launch.data.id_mapping import Vocabulary, save_vocabularies
from launch.data.loader import open_data
from launch.data.meaning import Meaning
from tests.launch.jobs import refused, run, with_set
from tests.launch.parquet_job import config, rows, write
from tests.run_metrics import forget_the_end, metrics


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, its files, and a run of two ranks that has a checkpoint of step 10 but not ended."""
    folder = tmp_path_factory.mktemp("stopped")
    write(folder / "day_0.parquet", rows(4000, seed=1))
    write(folder / "validation.parquet", rows(1000, seed=3))
    job = config(folder, train_files=["day_*.parquet"], validation_files=["validation.parquet"])
    run(folder, *with_set("train.max_steps=10"), config=job)
    forget_the_end(folder / "t")
    return folder


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the same, at another place; the job reads the copied files."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    config(folder, train_files=["day_*.parquet"], validation_files=["validation.parquet"])
    return folder


def validated(folder: Path) -> dict[int, float]:
    return {line["step"]: line["auc"] for line in metrics(folder / "t") if line["split"] == "validation"}


def test_the_run_keeps_the_map_its_counts_and_its_hash(stopped: Path) -> None:
    kept = Meaning.read(stopped / "t")
    job = read_job(stopped / "job.yaml")
    assert kept.described == Meaning.of_job(job, open_data(job, 0, 1).splits.train).described
    values, counts = np.unique(rows(4000, seed=1)["user"], return_counts=True)
    order = np.lexsort((values, -counts))
    assert kept.vocabularies is not None
    users = kept.vocabularies["user"]
    np.testing.assert_array_equal(users.values, values[order])
    assert users.counts is not None
    np.testing.assert_array_equal(users.counts, counts[order])
    for place in ("checkpoints", "best"):
        for whole in (stopped / "t" / place).glob("*/whole.json"):
            assert json.loads(whole.read_text())["meaning"] == kept.hash


def test_a_new_day_before_a_restart_changes_no_row(again: Path) -> None:
    before = validated(again)[10]
    new = write(again / "day_1.parquet", rows(12_000, seed=2, shift=20))
    job = read_job(again / "job.yaml")
    kept = Meaning.read(again / "t")
    assert Meaning.of_job(job, open_data(job, 0, 1).splits.train).hash != kept.hash  # what a new run would get
    # Nothing is trained after the last step: the same rows are validated through the map that the run kept.
    whole = again / "t" / "checkpoints" / "step_10" / "whole.json"
    whole.write_text(json.dumps({**json.loads(whole.read_text()), "validated": 5}))
    shutil.rmtree(again / "t" / "best")
    printed = run(again, *with_set("train.max_steps=10"), config=again / "job.yaml")
    assert "continues at step 10" in printed
    assert new.exists()
    assert validated(again)[10] == before
    assert Meaning.read(again / "t").hash == kept.hash


CHANGES = {
    "data.ids=modulo": "ids: saved 'vocabulary', here 'modulo'",
    "data.min_count=3": "vocabulary.min_count: saved 1, here 3",
    "tables[0].num_embeddings=1000": "features.user.rows: saved 2000, here 1000",
    "data.parquet.ids=[shop,user]": "features.user.column: saved 'user', here 'shop'",
    "data.parquet.dense=[label]": "dense.columns: saved ['price'], here ['label']",
    "data.dense_transform=log1p": "dense.transform: saved 'none', here 'log1p'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_meaning_is_refused_on_every_rank(again: Path, change: str) -> None:
    before = {path: path.read_bytes() for path in (again / "t").glob("*.*") if not path.name.startswith("lock.")}
    for text in refused(again, *with_set(change), config=again / "job.yaml"):
        assert f"{again / 't'}: its stored rows would get another meaning" in text
        assert CHANGES[change] in text
    assert {path: path.read_bytes() for path in before} == before


def test_another_vocabulary_file_is_refused_and_the_runs_own_is_not(again: Path) -> None:
    own = again / "t" / "vocabulary.npz"
    other = again / "other.npz"
    with np.load(own) as arrays:
        np.savez(other, user=arrays["user"][::-1], shop=arrays["shop"])
    (text,) = refused(again, *with_set(f"data.vocabulary={other}"), config=again / "job.yaml", world_size=1)
    assert "vocabulary.sha256: saved" in text
    printed = run(again, *with_set(f"data.vocabulary={own}", "train.max_steps=11"), config=again / "job.yaml")
    assert "continues at step 10" in printed


def test_a_map_that_is_not_the_checkpoints_is_refused(again: Path) -> None:
    """Both files of the map are of another run, and fit together: only the checkpoint's hash shows that."""
    kept = Meaning.read(again / "t")
    assert kept.vocabularies is not None
    turned = {feature: Vocabulary(v.values[::-1]) for feature, v in kept.vocabularies.items()}
    job = read_job(again / "job.yaml")
    Meaning({**kept.described}, turned).write(again / "t")
    with pytest.raises(DataError, match=r"vocabulary\.npz: its values have the SHA-256"):
        Meaning.read(again / "t")
    write(again / "day_0.parquet", rows(4000, seed=1, shift=20))
    Meaning.of_job(job, open_data(job, 0, 1).splits.train).write(again / "t")
    for text in refused(again, config=again / "job.yaml"):
        assert "step_10: its rows have the meaning" in text


def test_a_checkpoint_without_a_map_is_refused(again: Path) -> None:
    (again / "t" / "meaning.json").unlink()
    for text in refused(again, config=again / "job.yaml"):
        assert f"{again / 't' / 'meaning.json'}: no such file" in text


def test_a_run_without_a_checkpoint_makes_its_map_anew(again: Path) -> None:
    shutil.rmtree(again / "t" / "checkpoints")
    run(again, *with_set("data.min_count=3", "train.max_steps=2"), config=again / "job.yaml")
    assert Meaning.read(again / "t").described["vocabulary"]["min_count"] == 3
    assert {path.name for path in (again / "t" / "best").iterdir()} == {"step_2"}  # not that of the rows of before


def shared_job(folder: Path, **data: Any) -> Path:
    """A job whose user and seen users are features of one table."""
    columns = rows(300, seed=1)
    write(folder / "a.parquet", {**columns, "seen": rows(300, seed=2, shift=7)["user"]})
    path = config(folder, files=["a.parquet"], features=["user", "seen", "shop"], **data)
    job = yaml.safe_load(path.read_text())
    job["tables"][0] |= {"feature_names": ["user", "seen"], "num_embeddings": 30}
    path.write_text(yaml.safe_dump(job))
    return path


def test_a_value_has_one_row_whichever_feature_of_the_table_has_it(tmp_path: Path) -> None:
    job = read_job(shared_job(tmp_path))
    data = open_data(job, 0, 1)
    meaning = data.meaning
    assert meaning.vocabularies is not None
    train = data.splits.train
    read = train.source.read(train.start, train.stop, BadRows("error"))
    values, counts = np.unique(read.ids[:, :2], return_counts=True)
    expected = values[np.lexsort((values, -counts))]
    for feature in ("user", "seen"):
        np.testing.assert_array_equal(meaning.vocabularies[feature].values, expected)
    # Row 0 and the 29 most frequent of 40 users; the shops' table of 30 rows holds all 20.
    assert meaning.without_rows() == {"user": len(expected) - 29, "seen": len(expected) - 29}


def test_a_vocabulary_that_gives_a_value_two_rows_of_a_table_is_refused(tmp_path: Path) -> None:
    shops, users = Vocabulary(np.arange(20)), np.arange(1000, 1040)
    file = tmp_path / "given.npz"
    job = read_job(shared_job(tmp_path, vocabulary=str(file)))
    save_vocabularies(file, {"user": Vocabulary(users), "seen": Vocabulary(users), "shop": shops})
    assert open_data(job, 0, 1).meaning.vocabularies is not None
    save_vocabularies(file, {"user": Vocabulary(users), "seen": Vocabulary(users[::-1]), "shop": shops})
    with pytest.raises(DataError, match=r"'user' and 'seen' have other values, and share table 'user'; allowed: "):
        open_data(job, 0, 1)


def test_without_a_good_row_no_vocabulary_is_built(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**rows(100, seed=1), "label": np.full(100, 2)})
    job = read_job(config(tmp_path, files=["a.parquet"], on_bad_row="skip"))
    with pytest.raises(DataError, match=r"the train split: no row that was read is good, the first: .*: label is 2"):
        open_data(job, 0, 1)
