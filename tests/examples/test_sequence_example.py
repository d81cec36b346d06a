"""The example of sequences learns what the generated ratings have in them, and its data are as documented."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.ratings import batches, generated_ratings, recall_and_ndcg, sequences_of, windows

ROOT = Path(__file__).parents[2]


def test_the_example_finds_the_next_item_of_half_the_users() -> None:
    """Chance is 10 of 2,000 items, and who knows the groups finds 0.59: 0.9 · (1 + … + 1/10) / (1 + … + 1/50).

    The numbers are those of the page, which another test compares with what the example prints.
    """
    page = (ROOT / "examples" / "README.md").read_text()
    found = re.findall(r"^(the .*): recall@10 (\d\.\d+), NDCG@10 (\d\.\d+)$", page, re.MULTILINE)
    (model, recall, ndcg), (frequent, usual_recall, usual_ndcg) = found
    assert (model, frequent) == ("the model", "the most frequent items")
    assert 0.45 < float(recall) < 0.6
    assert 0.28 < float(ndcg) < 0.45
    assert 0.02 < float(usual_recall) < 0.08
    assert float(usual_ndcg) < float(usual_recall)


def test_windows_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window of a user is there once, the last one for the test, and 3 of 4 users find their item."""
    monkeypatch.setattr(sys, "argv", ["sequence.py"])
    train, test, num_items = windows(past=8)
    sequences, _ = sequences_of(None, least=10)
    assert num_items == 1 + max(int(own.max()) for own in sequences)
    assert train.tolist() == [own[i : i + 9].tolist() for own in sequences for i in range(len(own) - 9)]
    assert test.tolist() == [own[-9:].tolist() for own in sequences]
    best = torch.tensor([[5, 1], [1, 5], [1, 5], [1, 2]])
    # NDCG is the mean of 1, 1 / log2(3) twice, and 0.
    assert recall_and_ndcg(best, torch.full((4, 1), 5)) == "recall@2 0.750, NDCG@2 0.565"
    known = set(map(tuple, train.tolist()))
    for past, candidates in batches(train, num_items, batch_size=16, negatives=3, steps=2):
        rows = torch.cat([past, candidates[:, :1]], dim=1).tolist()
        assert candidates.shape == (16, 4)
        assert set(map(tuple, rows)) <= known


def test_a_file_of_ratings_gives_the_sequences_of_its_rows(tmp_path: Path) -> None:
    rows, file = generated_ratings(users=50), tmp_path / "ratings.csv"
    items = [own.astype(int).tolist() for own in rows[:, 1].reshape(50, -1)]
    # A user with two ratings, of which the later one comes first in the file.
    later, earlier = items[0][:2]
    lines = [f"{user:.0f},{item:.0f},{rating:.1f},{time:.0f}" for user, item, rating, time in rows]
    np.random.default_rng(1).shuffle(lines)
    few = [f"50,{later},4.5,1700000001", f"50,{earlier},0.5,1700000000"]
    file.write_text("\n".join(["userId,movieId,rating,timestamp", *lines, *few]) + "\n")
    sequences, num_items = sequences_of(str(file), least=2)
    items.append([earlier, later])
    assert num_items == len({item for own in items for item in own})
    # An item has one number, whoever rated it, and frequent items have small ones.
    pairs = [pair for own, ids in zip(items, sequences, strict=True) for pair in zip(own, ids.tolist(), strict=True)]
    numbers = dict(pairs)
    assert set(numbers.values()) == set(range(num_items))
    assert [numbers[item] for item, _ in pairs] == [number for _, number in pairs]
    counts = np.bincount(np.concatenate(sequences))
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert [len(own) for own in sequences_of(str(file), least=10)[0]] == [24] * 50
    with pytest.raises(SystemExit, match=r"ratings.csv: no user has 25 ratings"):
        sequences_of(str(file), least=25)
