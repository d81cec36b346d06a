"""Jobs on any table of rows: malformed rows are reported, empty files are left out, dense features are optional."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from launch.config import read_job
from launch.data.loader import open_data
from launch.data.split import expanded
from launch.predict import main, predict
from tests.launch.jobs import refused, run, with_set
from tests.launch.parquet_job import config, rows, write
from tests.run_metrics import forget_the_end, metrics
from torchrec_qr.cli.schema import ConfigError


def half_bad(n: int, seed: int) -> dict[str, Any]:
    columns = rows(n, seed)
    return {**columns, "label": np.where(np.arange(n) % 2, columns["label"], 0.5)}


def test_skipped_rows_are_told_everywhere(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", half_bad(2000, seed=1))
    printed = run(tmp_path, config=config(tmp_path, files=["a.parquet"], on_bad_row="skip", shuffle=False))
    first = f"{tmp_path / 'a.parquet'}:1: label is 0.5; allowed: 0, 1"
    assert f"malformed rows of the train split are left out, the first is {first}" in printed
    assert "malformed rows left out  train 800, validation 100, test 100" in printed
    lines = metrics(tmp_path / "t")
    assert {line["skipped_rows"] for line in lines if line["split"] != "train"} == {100}
    # The rows that were trained count, not those that were read ahead.
    assert [line["skipped_rows"] for line in lines if line["split"] == "train"] == [64 * 5, 64 * 10]
    assert "rows skipped" in printed

    scored = predict(tmp_path / "t", [str(tmp_path / "a.parquet")], tmp_path / "scores.parquet")
    assert (scored.rows, scored.bad_rows.count, scored.quality.samples) == (2000, 1000, 1000)


# There are 13 steps an epoch: one stops in the first, one at its end, one in the second.
@pytest.mark.parametrize(
    ("stop", "log_every", "world_size"),
    [pytest.param(10, 5, 2, marks=pytest.mark.slow), (13, 13, 2), pytest.param(15, 5, 1, marks=pytest.mark.slow)],
)
def test_skipped_rows_are_counted_alike_after_a_restart(
    tmp_path: Path, world_size: int, stop: int, log_every: int
) -> None:
    write(tmp_path / "a.parquet", half_bad(2000, seed=1))
    job = config(tmp_path, files=["a.parquet"], on_bad_row="skip", shuffle_rows=100)
    often = (f"train.checkpoint_every={stop}", f"train.log_every={log_every}")
    overrides = with_set("train.epochs=2", f"train.batch_size={128 // world_size}", *often)
    run(tmp_path, *overrides, "--name", "unbroken", config=job, world_size=world_size)
    run(
        tmp_path,
        *overrides,
        *with_set(f"train.max_steps={stop}"),
        "--name",
        "broken",
        config=job,
        world_size=world_size,
    )
    forget_the_end(tmp_path / "broken")
    printed = run(tmp_path, *overrides, "--name", "broken", config=job, world_size=world_size)
    assert f"continues at step {stop}" in printed
    assert "malformed rows left out  train 800, validation 100, test 100" in printed
    unbroken, broken = (
        {line["step"]: line["skipped_rows"] for line in metrics(tmp_path / name) if line["split"] == "train"}
        for name in ("unbroken", "broken")
    )
    assert broken == unbroken
    if log_every == 13:
        assert broken == {13: 800, 26: 800}
    else:
        assert list(broken) == [5, 10, 15, 20, 25]
        assert broken[15] < broken[5] < broken[20] < broken[10] < broken[25] < 800


def test_a_split_may_begin_with_many_malformed_rows(tmp_path: Path) -> None:
    columns = rows(2000, seed=1)
    write(tmp_path / "a.parquet", {**columns, "label": np.where(np.arange(2000) < 500, 7, columns["label"])})
    job = config(tmp_path, files=["a.parquet"], on_bad_row="skip", shuffle=False)
    printed = run(tmp_path, *with_set("train.log_every=1"), config=job, world_size=1)
    assert "malformed rows left out  train 500" in printed


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_a_good_row_is_an_error_on_every_rank(tmp_path: Path, split: str) -> None:
    write(tmp_path / "good.parquet", rows(640, seed=1))
    write(tmp_path / "bad.parquet", {**rows(640, seed=2), "label": np.full(640, 7)})
    files = {"train_files": ["good.parquet"], "validation_files": ["good.parquet"], f"{split}_files": ["bad.parquet"]}
    for text in refused(tmp_path, config=config(tmp_path, on_bad_row="skip", ids="modulo", **files)):
        assert f"the {split} split: no row that was read is good, the first: {tmp_path / 'bad.parquet'}" in text


def test_a_job_whose_data_are_refused_leaves_a_run_that_has_ended(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(640, seed=1))
    job = config(tmp_path, files=["a.parquet"])
    run(tmp_path, *with_set("train.max_steps=1"), config=job, world_size=1)
    (text,) = refused(tmp_path, *with_set("data.parquet.label=clicked"), config=job, world_size=1)
    assert text == f"DataError: {tmp_path / 'a.parquet'}: no column 'clicked'; it has label, price, user, shop\n"
    assert not (tmp_path / "t.1").exists()
    assert metrics(tmp_path / "t")[-1]["split"] == "test"


def test_scoring_without_a_good_row_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.parquet", rows(640, seed=1))
    run(tmp_path, *with_set("train.max_steps=1"), config=config(tmp_path, files=["a.parquet"]), world_size=1)
    write(tmp_path / "bad.parquet", {**rows(3, seed=1), "price": np.full(3, np.inf)})
    out = tmp_path / "s.parquet"
    arguments = ["--run", str(tmp_path / "t"), "--data", str(tmp_path / "bad.parquet"), "--out", str(out)]
    assert main([*arguments, "--on-bad-row", "skip"]) == 1
    first = f"{tmp_path / 'bad.parquet'}:1: price is inf; allowed: a finite number or nothing"
    assert f"no row that was read is good, the first: {first}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("pattern", ["day.parquet", "day.parquet/*", "day.parquet/*.parquet"])
def test_a_folder_as_spark_writes_it(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "day.parquet"
    folder.mkdir()
    columns = rows(2000, seed=1)
    for i, part in enumerate((slice(0, 1000), slice(0, 0), slice(1000, 2000))):
        name = f"part-{i + 8}-c000.snappy.parquet"  # 8, 9, 10: by number, not by letter
        write(folder / name, {name: column[part] for name, column in columns.items()})
        (folder / f".{name}.crc").touch()
    (folder / "_SUCCESS").touch()
    job = config(tmp_path, files=[pattern], shuffle=False)
    with open_data(read_job(job), 0, 1).train(0) as batches:
        price = np.concatenate([batch.dense[batch.weights > 0, 0].numpy() for batch in batches])
    np.testing.assert_array_equal(price, columns["price"][:1600].astype(np.float32))
    printed = run(tmp_path, *with_set("train.max_steps=2"), config=job, world_size=1)
    assert f"{folder / 'part-9-c000.snappy.parquet'} has no rows and is left out" in printed


def test_folders_within_a_folder(tmp_path: Path) -> None:
    for name in ("all/day=10/a.csv", "all/day=9/b.csv", "all/_temporary/c.csv", "all/day=9/.d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert [p.name for p in expanded([str(tmp_path / "all")])] == ["b.csv", "a.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["dcn", "deepfm"])
def test_rows_of_categories_alone(tmp_path: Path, interaction: str) -> None:
    write(tmp_path / "a.parquet", {name: c for name, c in rows(4000, seed=1).items() if name != "price"})
    write(tmp_path / "new.parquet", {name: c for name, c in rows(500, seed=2).items() if name != "price"})
    job = config(tmp_path, files=["a.parquet"], dense_features=0, parquet={"dense": []})
    model = ["model.dense_in_features=0", f"model.interaction={interaction}", "model.bottom_mlp=[]"]
    top = "model.top_mlp=[16,8]"
    run(tmp_path, *with_set(*model, top, "train.epochs=4"), config=job)
    assert metrics(tmp_path / "t")[-1]["auc"] > 0.75
    scored = predict(tmp_path / "t", [str(tmp_path / "new.parquet")], tmp_path / "scores.parquet")
    assert scored.quality.auc > 0.75
    with pytest.raises(ConfigError, match="dense_in_features: 0; allowed: at least 1, under interaction: dot"):
        read_job(job, [*model[:1], "model.interaction=dot"])


def test_a_csv_of_ratings(tmp_path: Path) -> None:
    columns = rows(4000, seed=1)
    rating = np.where(columns["label"] == 1, 4.5, 2.0)
    table = pa.table(
        {
            "user": [f"user {i}" for i in columns["user"]],
            "rating": rating,
            "price": pa.array(columns["price"], mask=np.arange(4000) % 5 == 0),
            "shop": columns["shop"],
        }
    )
    pa.csv.write_csv(table, tmp_path / "a.csv")
    tsv = (tmp_path / "a.csv").read_text().replace('","', "\t").replace(",", "\t").replace('"', "")
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(tsv.encode()))
    auc = {}
    for name, csv in (("a.csv", {}), ("a.tsv.gz", {"delimiter": "\t", "quoted": False})):
        named = {"label": "rating", "dense": ["price"], **csv}
        job = config(tmp_path, files=[name], format="csv", csv=named, label_above=3.5)
        run(tmp_path, "--name", f"of_{name}", config=job, world_size=1)
        auc[name] = metrics(tmp_path / f"of_{name}")[-1]["auc"]
    assert auc["a.csv"] == auc["a.tsv.gz"] > 0.75

    unlabelled = table.drop_columns("rating")
    pa.csv.write_csv(unlabelled, tmp_path / "new.csv")
    scored = predict(tmp_path / "of_a.csv", [str(tmp_path / "new.csv")], tmp_path / "scores.parquet")
    assert (scored.rows, scored.quality.samples) == (4000, 0)


def test_an_id_outside_its_table_is_quoted_as_in_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**rows(640, seed=1), "user": [f"{i + 1990:x}" for i in range(640)]})
    parquet = {"dense": ["price"], "hexadecimal": ["user"]}
    job = config(tmp_path, files=["a.parquet"], ids="encoded", parquet=parquet, shuffle=False)
    (text,) = refused(tmp_path, config=job, world_size=1)
    assert f"{tmp_path / 'a.parquet'}:11: user is '7d0'; allowed: 0..1999, the rows of its table" in text
