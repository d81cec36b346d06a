"""The study of open vocabularies: drifting rows, what stands in front of tables, equal memory, and the page."""

import json
from pathlib import Path

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from benchmarks.open_vocabulary.daily_rows import Day, drifting_days
from benchmarks.open_vocabulary.day_verdicts import Compared, Runs, compared
from benchmarks.open_vocabulary.id_fronts import KnownIds, ManagedIds, modulo
from benchmarks.open_vocabulary.open_methods import BYTES_OF_ROW, TITLES, ImpossibleMethodError, method
from benchmarks.open_vocabulary.open_page import page_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_tenth_of_the_live_ids_is_new_every_day() -> None:
    found = drifting_days(num_days=3, rows=20_000, live=500, renewed=0.1)
    ids = [set(day.raw.reshape(-1).tolist()) for day in found.days]
    assert [len(of) for of in ids] == [500, 500, 500]  # each live id occurs in so many rows
    assert [len(ids[1] - ids[0]), len(ids[2] - ids[1])] == [50, 50]
    assert not (ids[2] - ids[1]) & ids[0]  # a replaced id does not come back
    assert found.about["ids_of_all_days"] == len(ids[0] | ids[1] | ids[2]) == 600
    again = drifting_days(num_days=3, rows=20_000, live=500, renewed=0.1)
    assert torch.equal(again.days[2].raw, found.days[2].raw)


def day_of(*ids: int) -> Day:
    raw = torch.tensor(ids).view(-1, 1, 1)
    return Day(torch.zeros(len(raw), 1), torch.zeros(len(raw), 0, dtype=torch.int64), raw, torch.zeros(len(raw)))


def test_a_vocabulary_is_in_the_order_of_frequency_and_grows_if_it_may() -> None:
    kept, grown = KnownIds(capacity=10, grows=False), KnownIds(capacity=4, grows=True)
    for front in (kept, grown):
        front.start(day_of(7, -8, -8))
        front.start(day_of(2, 2, 7, 5))
    asked = torch.tensor([-8, 7, 2, 5])
    assert kept(asked, training=True).tolist() == [1, 2, 0, 0]
    assert grown(asked, training=True).tolist() == [1, 2, 3, 0]  # 5 is beyond its capacity
    assert (kept.kept_bytes, grown.kept_bytes) == (16, 24)


def test_hashing_takes_any_number() -> None:
    assert modulo(10)(torch.tensor([-(2**63), 13, 2**63 - 1]), training=True).tolist() == [0, 3, 7]


def managed(slots: int) -> MCHManagedCollisionModule:
    return MCHManagedCollisionModule(slots, torch.device("cpu"), DistanceLFU_EvictionPolicy(), eviction_interval=2)


def test_managed_ids_are_those_of_torchrecs_own_collection() -> None:
    config = EmbeddingBagConfig(name="open", num_embeddings=12, embedding_dim=4, feature_names=["a", "b"])
    tables = EmbeddingBagCollection(tables=[config])
    whole = ManagedCollisionEmbeddingBagCollection(
        tables, ManagedCollisionCollection({"open": managed(12)}, [config]), return_remapped_features=True
    )
    front = ManagedIds(managed(12), config, resets=True)
    random = torch.Generator().manual_seed(0)
    evicted = 0
    for step in range(12):
        raw = torch.randint(0, 15, (8, 2), generator=random) * 10**15 + step // 4
        lengths = torch.full((8,), 2, dtype=torch.int32)
        pooled, remapped = whole(KeyedJaggedTensor(["a", "b"], raw.reshape(-1), lengths=lengths))
        ids = front(raw, training=True)
        assert remapped is not None
        assert torch.equal(ids.reshape(-1), remapped.values())
        expected = tables.embedding_bags["open"].weight[ids].sum(1).view(2, 4, 4)
        torch.testing.assert_close(pooled.values(), torch.cat([expected[0], expected[1]], dim=1))
        renewed = front.renewed()
        evicted += 0 if renewed is None else len(renewed)
    assert evicted > 0
    assert front.kept_bytes == 12 * 32 + 24


def test_methods_fill_one_budget() -> None:
    days, budget = drifting_days(num_days=3, rows=5_000, live=50_000), 40_000 * BYTES_OF_ROW
    for name in TITLES:
        if name.startswith("mpzch"):
            with pytest.raises(ImpossibleMethodError, match="FBGEMM's operator on a CPU: Expected readonly"):
                method(name, budget, days, seed=0)
            continue
        made = method(name, budget, days, seed=0)
        made.front.start(days.days[0])
        rows = made.table.get("partitions", {}).get("rows", made.table["num_embeddings"])
        used = rows * BYTES_OF_ROW + made.front.kept_bytes
        assert name == "full" or name.startswith("qr") or budget - 200 <= used <= budget, name
    assert method("id_hash_2", budget, days, seed=0).table["num_embeddings"] == 2**28
    with pytest.raises(ImpossibleMethodError, match="rows"):
        method("id_hash_3", 30_000 * BYTES_OF_ROW, days, seed=0)


def runs_of(losses: list[list[float]]) -> Runs:
    return Runs([{"seed": seed, "rate": 0.1, "logloss": [9.0, 9.0, *of]} for seed, of in enumerate(losses)])


def test_outcomes_follow_the_interval_about_the_difference() -> None:
    base = runs_of([[0.50, 0.52], [0.51, 0.53], [0.49, 0.51]])
    for change, outcome in ((-0.01, "wins"), (0.01, "loses")):
        found = compared(runs_of([[0.51 + change], [0.52 + change], [0.50 + change + 0.001]]), base)
        assert found is not None
        assert found.outcome == outcome
        assert found.mean == pytest.approx(change + 0.001 / 3)
        assert found.bound == pytest.approx(2.920 * (0.001 / 3**0.5) / 3**0.5)
    assert Compared(-0.001, 0.002).outcome == "undecided"
    assert compared(base, runs_of([[0.5]])) is None


def test_the_rate_is_chosen_on_the_first_days_of_seed_0() -> None:
    runs = [
        {"seed": 0, "rate": 0.1, "logloss": [0.5, 0.5, 0.9]},
        {"seed": 0, "rate": 0.2, "logloss": [0.6, 0.5, 0.1]},
        {"seed": 1, "rate": 0.1, "logloss": [0.7, 0.7, 0.8]},
    ]
    assert Runs(runs).mean("logloss")[0] == pytest.approx(0.85)


def test_the_page_is_what_its_numbers_say() -> None:
    found = {
        of["data"]: of for file in RESULTS.glob("*_open_vocabulary_*.json") if (of := json.loads(file.read_text()))
    }
    page = page_of([found["drifting"], found["criteo"]])
    assert page == (RESULTS / "open_vocabulary.md").read_text()
    assert "**wins**" in page
