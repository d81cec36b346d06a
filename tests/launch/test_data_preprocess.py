"""The preprocessing command: its files give the same batches as the text that they were made of."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_rows import NUM_FEATURES, click_rows, job, tsv_lines, write_tsv

from launch.data.loader import Data, open_data
from launch.data.preprocess import main


def opened(**data: Any) -> Data:
    return open_data(job({"shuffle": False, **data}, batch_size=50, rows=40), 0, 1)


def lines_of(n: int) -> list[str]:
    rows = click_rows(np.random.default_rng(0), n)
    rows.ids[:] = np.minimum(rows.ids, rows.ids % (np.arange(NUM_FEATURES) * 3 + 2))
    return tsv_lines(rows)


def test_binary_files_give_the_batches_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_tsv(tmp_path / "train.gz", lines_of(700))
    out = tmp_path / "made" / "train"
    assert main([str(text), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "700 rows written" in printed
    assert re.search(r"cat_0\W+2\W+2\W+3\W", printed)
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "train_dense.npy",
        "train_labels.npy",
        "train_sparse.npy",
        "train_vocabulary.npz",
    ]
    from_text = opened(format="criteo_tsv", files=[str(text)], ids="vocabulary")
    vocabulary = f"{out}_vocabulary.npz"
    with_file = opened(format="criteo_tsv", files=[str(text)], ids="vocabulary", vocabulary=vocabulary)
    binary = opened(format="npy", files=[str(out)], ids="vocabulary")
    for a, b, c in zip(from_text.train(0), with_file.train(0), binary.train(0), strict=True):
        for other in (b, c):
            assert torch.equal(a.sparse.values(), other.sparse.values())
            assert torch.equal(a.dense, other.dense)
            assert torch.equal(a.labels, other.labels)
            assert torch.equal(a.weights, other.weights)
    # Ids by frequency: id 1 is the most frequent one, and tables of 40 rows leave out the rarest alone.
    counts = np.bincount(np.load(f"{out}_sparse.npy")[:600, 25], minlength=40)
    assert counts[1:].tolist() == sorted(counts[1:], reverse=True)


def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(100)
    lines[10] = lines[95] = "?"
    text = write_tsv(tmp_path / "train.txt", lines)
    out = tmp_path / "train"
    assert main([str(text), "--out", str(out)]) == 1
    assert f"error: {text}:11: 1 columns; allowed: 40" in capsys.readouterr().err
    assert main([str(text), "--out", str(out), "--on-bad-row", "skip"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "98 rows written" in printed
    assert "2 malformed rows left out, the first: " in printed
    labels = np.load(f"{out}_labels.npy")
    assert labels[:, 0].tolist() == [int(line[0]) for line in lines if line != "?"]
    assert main([str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "none: no such file" in capsys.readouterr().err


def test_rare_values_are_unknown(tmp_path: Path) -> None:
    text = write_tsv(tmp_path / "train.txt", lines_of(100))
    assert main([str(text), "--out", str(tmp_path / "all"), "--vocabulary-share", "1"]) == 0
    assert main([str(text), "--out", str(tmp_path / "some"), "--vocabulary-share", "1", "--min-count", "3"]) == 0
    every, some = (np.load(tmp_path / f"{name}_sparse.npy") for name in ("all", "some"))
    assert (every > 0).all()
    for f in range(NUM_FEATURES):
        rare = np.bincount(every[:, f])[every[:, f]] < 3
        assert (some[rare, f] == 0).all()
        assert (some[~rare, f] == every[~rare, f]).all()
