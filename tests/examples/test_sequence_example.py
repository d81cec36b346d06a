"""The example of sequences learns on two ranks what the generated ratings have in them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.ratings import generated_ratings, sequences_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_finds_the_next_item_of_half_the_users() -> None:
    """Chance is 10 of 2,000 items, and who knows the groups finds 0.59: 0.9 · (1 + … + 1/10) / (1 + … + 1/50)."""
    command = [sys.executable, str(ROOT / "examples" / "sequence.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.*): recall@10 (\d\.\d+), NDCG@10 (\d\.\d+)$", done.stdout, re.MULTILINE)
    (model, recall, ndcg), (frequent, usual_recall, usual_ndcg) = found
    assert (model, frequent) == ("the model", "the most frequent items")
    assert 0.45 < float(recall) < 0.6
    assert 0.28 < float(ndcg) < 0.45
    assert 0.02 < float(usual_recall) < 0.08
    assert float(usual_ndcg) < float(usual_recall)


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
