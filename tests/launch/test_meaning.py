"""The map from raw values to rows belongs to the run: other files keep it, and what would change it is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.config import read_job
from launch.data.errors import DataError
from launch.data.id_mapping import Vocabulary
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
