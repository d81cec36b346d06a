"""New rows are scored from a run's folder alone, as the trained model itself would score them."""

import json
import shutil
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401  (registers the operators of rows)
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.predict import main, predict
from tests.launch.click_rows import click_rows, tsv_lines, write_tsv
from tests.launch.jobs import DEMO, SMALL, refused, run, with_set
from tests.launch.parquet_job import config, rows, write
from tests.run_metrics import metrics

NEW = 1000  # rows, the last batch of which is not full


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run "t" of two ranks, and rows of later; the files of training are gone."""
    folder = tmp_path_factory.mktemp("ended")
    run(folder, config=job_of(folder, rows(4000, seed=1), rows(500, seed=3), min_count=2))
    for name in ("train.parquet", "validation.parquet", "job.yaml"):
        (folder / name).unlink()
    return folder


def job_of(folder: Path, train: dict[str, Any], validation: dict[str, Any], **data: Any) -> Path:
    """Writes the files of three splits, the test split being the rows of later, and the config of a job on them."""
    parts = {"train": train, "validation": validation, "test": rows(NEW, seed=5)}
    for name, columns in parts.items():
        write(folder / f"{name}.parquet", columns)
    return config(folder, **{f"{name}_files": [f"{name}.parquet"] for name in parts}, **data)


def scores(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def test_scores_are_those_of_the_models_own_evaluation(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(shutil.copytree(ended / "t", tmp_path / "t"), tmp_path / "elsewhere")
    out = tmp_path / "scores.parquet"
    assert main(["--run", str(tmp_path / "elsewhere"), "--data", str(ended / "test.parquet"), "--out", str(out)]) == 0
    tested = metrics(ended / "t")[-1]
    assert tested["split"] == "test"
    printed = capsys.readouterr().out
    assert f"{NEW:,} with labels: AUC {tested['auc']:.4f}  logloss {tested['logloss']:.4f}" in printed

    quality = predict(tmp_path / "elsewhere", [str(ended / "test.parquet")], out).quality
    # Two ranks evaluated halves, in other batches: float32 sums of another order.
    assert quality.auc == pytest.approx(tested["auc"], abs=1e-6)
    assert quality.logloss == pytest.approx(tested["logloss"], rel=1e-6)
    given = scores(out)
    assert len(given["score"]) == NEW
    np.testing.assert_allclose(given["score"], 1 / (1 + np.exp(-given["logit"].astype(np.float64))), rtol=1e-6)
    labels = rows(NEW, seed=5)["label"]
    loss = -np.where(labels == 1, np.log(given["score"]), np.log1p(-given["score"])).mean()
    assert loss == pytest.approx(tested["logloss"], rel=1e-5)  # row by row, in the order of the input


def test_on_one_rank_the_metrics_are_equal_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path, config=job_of(tmp_path, rows(3000, seed=1), rows(500, seed=3)), world_size=1)
    quality = predict(tmp_path / "t", [str(tmp_path / "test.parquet")], tmp_path / "scores.parquet").quality
    tested = metrics(tmp_path / "t")[-1]
    assert (quality.auc, quality.logloss, quality.ne) == (tested["auc"], tested["logloss"], tested["ne"])


def rounded(run: Path, bits: int) -> Path:
    """Returns a copy of a run with the values that FBGEMM's rows of so many bits have."""
    copy, ops = shutil.copytree(run, run.parent / f"rounded_{bits}"), torch.ops.fbgemm
    weights = copy / "weights" / "00000.safetensors"
    with safe_open(weights, "pt") as file:
        about = file.metadata()
    tensors = load_file(weights)
    for name in [n for n in tensors if "embedding_bags" in n and n.endswith("weight")]:
        stored = ops.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(tensors[name], bits)
        tensors[name] = ops.FusedNBitRowwiseQuantizedSBHalfToFloat(stored, bits)
    save_file(tensors, weights, about)
    return copy


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_score_as_the_values_that_they_keep(
    ended: Path, tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(ended / "test.parquet"), tmp_path / "scores.parquet"
    arguments = ["--run", str(ended / "t"), "--data", file, "--out", str(out), "--dtype", f"int{bits}"]
    assert main(arguments) == 0
    assert f"{NEW:,} with labels: AUC " in capsys.readouterr().out
    given = scores(out)["logit"]
    predict(rounded(ended / "t", bits), [file], out)
    np.testing.assert_allclose(given, scores(out)["logit"], rtol=1e-4, atol=1e-5)
    predict(ended / "t", [file], out)
    assert np.abs(given - scores(out)["logit"]).max() > 1e-4
    assert main([*arguments, "--device", "cuda"]) == 1
    assert f"--dtype int{bits}: --device is cuda; allowed: cpu, for which" in capsys.readouterr().err


KINDS = {
    "dcn, amsgrad": ["model.interaction=dcn", "model.bottom_mlp=[]", "optimizer.sparse.name=amsgrad"],
    "half-precision tables": ["tables[*].data_type=fp16"],
    "path": ["tables[0].operation=path", "tables[0].path_hidden=8"],
    "frozen, bf16 layers": ["train.frozen=[shop]", "train.bf16=true"],
    "modulo": ["data.ids=modulo"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_leaves_what_scores_rows(tmp_path: Path, kind: str) -> None:
    run(tmp_path, *with_set(*KINDS[kind]), config=job_of(tmp_path, rows(600, seed=1), rows(600, seed=1)))
    quality = predict(tmp_path / "t", [str(tmp_path / "test.parquet")], tmp_path / "scores.parquet").quality
    tested = metrics(tmp_path / "t")[-1]
    # Halves in other batches: bf16 layers round to 8 bits, and all else to 24.
    assert quality.logloss == pytest.approx(tested["logloss"], rel=1e-3 if "bf16" in kind else 1e-6)
    assert quality.auc == pytest.approx(tested["auc"], abs=1e-2 if "bf16" in kind else 1e-4)


def test_rows_without_labels_get_the_same_scores_in_the_order_of_files(ended: Path, tmp_path: Path) -> None:
    columns = rows(NEW, seed=5)
    unlabelled = {name: values for name, values in columns.items() if name != "label"}
    for part, of in enumerate((slice(700, None), slice(0, 700))):
        write(tmp_path / f"part_{part}.parquet", {name: values[of] for name, values in unlabelled.items()})
    both = predict(ended / "t", [str(tmp_path / "part_*.parquet")], tmp_path / "parts.parquet")
    predict(ended / "t", [str(ended / "test.parquet")], tmp_path / "whole.parquet")
    assert (both.rows, both.quality.samples) == (NEW, 0)
    whole = scores(tmp_path / "whole.parquet")["logit"]
    parts = scores(tmp_path / "parts.parquet")["logit"]
    np.testing.assert_allclose(parts, np.concatenate([whole[700:], whole[:700]]), rtol=1e-5, atol=1e-6)


def test_values_that_training_never_saw_are_the_unknown_one(ended: Path, tmp_path: Path) -> None:
    columns = rows(2, seed=5)
    columns["price"][:] = columns["price"][0]
    columns["shop"][:] = columns["shop"][0]
    columns["user"][:] = [10**9, 7]
    write(tmp_path / "new.parquet", columns)
    predict(ended / "t", [str(tmp_path / "new.parquet")], tmp_path / "scores.parquet")
    logits = scores(tmp_path / "scores.parquet")["logit"]
    assert logits[0] == logits[1]


def test_a_malformed_row_is_an_error_or_has_no_score(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = rows(300, seed=5)
    columns["price"][7] = np.inf
    new, out = write(tmp_path / "new.parquet", columns), tmp_path / "scores.parquet"
    arguments = ["--run", str(ended / "t"), "--data", str(new), "--out", str(out)]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"launch.predict: {new}:8: price is inf; allowed: a finite number or nothing\n"
    assert not out.exists()
    assert main([*arguments, "--on-bad-row", "skip"]) == 0
    assert "1 malformed rows have no score, the first is" in capsys.readouterr().out
    missing = pq.read_table(out)["score"].is_null().to_numpy()
    assert np.flatnonzero(missing).tolist() == [7]


def test_criteos_text_without_labels(tmp_path: Path) -> None:
    lines = tsv_lines(click_rows(np.random.default_rng(0), 900))
    text = write_tsv(tmp_path / "train.txt", lines)
    test = write_tsv(tmp_path / "test.txt", [line.partition("\t")[2] for line in lines[:300]])
    data = ("data.format=criteo_tsv", "data.ids=modulo", f"data.files=[{text}]", "train.max_steps=3")
    run(tmp_path, *with_set(*SMALL, *data), world_size=1)
    labelled = predict(tmp_path / "demo", [str(text)], tmp_path / "labelled.parquet")
    assert labelled.quality.samples == 900
    assert predict(tmp_path / "demo", [str(test)], tmp_path / "scores.parquet").quality.samples == 0
    given, expected = (scores(tmp_path / f"{name}.parquet")["logit"] for name in ("scores", "labelled"))
    np.testing.assert_allclose(given, expected[:300], rtol=1e-5, atol=1e-6)
    test.write_text(test.read_text() + "1\t2\n")
    with pytest.raises(Exception, match=r"test\.txt:301: 2 columns; allowed: 39"):
        predict(tmp_path / "demo", [str(test)], tmp_path / "scores.parquet")


def test_files_of_two_runs_are_refused(ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(ended / "test.parquet"), "--out", str(tmp_path / "scores.parquet")]
    mixed = shutil.copytree(ended / "t", tmp_path / "mixed")
    weights = mixed / "weights" / "00000.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights, {"meaning": "0" * 64})
    assert main(["--run", str(mixed), *arguments]) == 1
    assert "trained with the map 0000" in capsys.readouterr().err

    other = shutil.copytree(ended / "t", tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("ids: vocabulary", "ids: modulo"))
    assert main(["--run", str(other), *arguments]) == 1
    assert "config.yaml is not of its meaning.json: ids: saved 'vocabulary', here 'modulo'" in capsys.readouterr().err

    regrouped = shutil.copytree(ended / "t", tmp_path / "regrouped")
    (regrouped / "config.yaml").write_text(text.replace("grouping: strided", "grouping: adjacent"))
    assert main(["--run", str(regrouped), *arguments]) == 1
    error = capsys.readouterr().err
    assert f"{regrouped / 'weights'}: of another model than config.yaml: table 'user': " in error
    assert "grouping: saved strided, here adjacent" in error

    unended = shutil.copytree(ended / "t", tmp_path / "unended", ignore=shutil.ignore_patterns("weights"))
    assert main(["--run", str(unended), *arguments]) == 1
    assert "no weights; allowed: the folder of a run that came to its end" in capsys.readouterr().err
    assert main(["--run", str(tmp_path / "none"), *arguments]) == 1
    assert capsys.readouterr().err == f"launch.predict: {tmp_path / 'none' / 'config.yaml'}: no such file\n"
    assert main(["--run", str(ended / "t"), *arguments[:-1], str(unended)]) == 1
    assert capsys.readouterr().err == f"launch.predict: {unended}: a folder; allowed: the name of a file to write\n"
    assert main(["--run", str(ended / "t"), *arguments[:-1], str(tmp_path / "scores.csv")]) == 1
    assert "scores.csv: scores are written as Parquet; allowed: a name that ends in .parquet" in capsys.readouterr().err


def test_weights_are_whole_tensors_in_a_public_format(ended: Path) -> None:
    tensors = load_file(ended / "t" / "weights" / "00000.safetensors")
    tables = {name.split("embedding_bags.")[1]: t for name, t in tensors.items() if "embedding_bags." in name}
    assert {name: tuple(t.shape) for name, t in tables.items() if t.dtype == torch.float32} == {
        "user.partition_0.weight": (500, 8),
        "user.partition_1.weight": (4, 8),
        "shop.weight": (30, 8),
    }


def test_a_run_starts_from_the_weights_of_another(ended: Path, tmp_path: Path) -> None:
    """With a tiny learning rate it validates as the other run does, though its own rows would map otherwise."""
    job = job_of(tmp_path, rows(2000, seed=2, shift=20), rows(NEW, seed=5), min_count=2)
    rates = ("optimizer.sparse.lr=1e-12", "optimizer.dense.lr=1e-12", "optimizer.sparse.name=sgd")
    started = (f"train.init_from={ended / 't'}", "train.max_steps=2")
    printed = run(tmp_path, *with_set(*rates, *started), config=job)
    assert f"starts from the weights of {ended / 't' / 'best'}" in printed
    lines, other = metrics(tmp_path / "t"), metrics(ended / "t")[-1]
    assert lines[-1]["auc"] == pytest.approx(other["auc"], abs=1e-6)
    assert lines[-1]["logloss"] == pytest.approx(other["logloss"], rel=1e-6)
    assert lines[-1]["step"] == 2
    for name in ("meaning.json", "vocabulary.npz"):
        assert (tmp_path / "t" / name).read_bytes() == (ended / "t" / name).read_bytes()

    for text in refused(tmp_path, "--name=u", *with_set(*started, "data.min_count=5"), config=job):
        assert "vocabulary.min_count: saved 2, here 5" in text
    (text,) = refused(tmp_path, "--name=u", *with_set(*started, "model.top_mlp=[8]"), config=job, world_size=1)
    assert "is of another model: model.top_mlp: saved [16], here [8]" in text
    (text,) = refused(tmp_path, "--name=t", *with_set(f"train.init_from={tmp_path / 't'}"), config=job, world_size=1)
    assert "allowed: the folder of another run" in text
    assert (tmp_path / "t" / "weights").is_dir()


def test_a_class_map_lies_in_the_runs_folder(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", rows(1000, seed=1))
    np.save(tmp_path / "classes.npy", np.stack([np.arange(2000) // 50, np.arange(2000) % 50]))
    job = config(tmp_path, files=["rows.parquet"])
    explicit = "tables[0].partitions={kind: explicit, file: classes.npy}"
    run(tmp_path, *with_set(explicit, "train.max_steps=3"), config=job, world_size=1)
    (tmp_path / "classes.npy").unlink()
    assert predict(tmp_path / "t", [str(tmp_path / "rows.parquet")], tmp_path / "s.parquet").quality.samples == 1000


def test_a_run_on_generated_rows_has_no_files_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *with_set(*SMALL, "train.max_steps=2"), config=DEMO, world_size=1)
    arguments = ["--run", str(tmp_path / "demo"), "--data", "x.gz", "--out", str(tmp_path / "scores.parquet")]
    assert main(arguments) == 1
    assert "allowed: a run that was trained on files" in capsys.readouterr().err
    assert json.loads((tmp_path / "demo" / "meaning.json").read_text())["ids"] == "encoded"
