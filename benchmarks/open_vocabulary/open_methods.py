"""The methods of the study, each sized such that table, optimizer state and kept ids fill one budget of bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchrec import EmbeddingBagConfig
from torchrec.modules.hash_mc_evictions import HashZchEvictionConfig, HashZchEvictionPolicyName
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)

from benchmarks.open_vocabulary.daily_rows import Day, Days
from benchmarks.open_vocabulary.id_fronts import (
    BYTES_OF_VOCABULARY_ID,
    IdFront,
    KnownIds,
    ManagedIds,
    as_they_are,
    modulo,
)
from torchrec_qr import MixedRadix
from torchrec_qr.id_hash import hashed_ids

DIM = 16
BYTES_OF_ROW = 2 * 4 * DIM  # the row and Adagrad's state of it
TABLE = "open"
TITLES = {
    "full": "full table over a vocabulary that grows",
    "hashing": "hashing (id mod rows)",
    "zch_lfu": "ZCH (LFU)",
    "zch_lru": "ZCH (LRU)",
    "zch_distance_lfu": "ZCH (distance LFU)",
    "zch_distance_lfu_inherited": "ZCH (distance LFU, rows inherited)",
    "mpzch_lru": "MPZCH (LRU)",
    "mpzch_ttl": "MPZCH (one TTL)",
    "qr_kept": "QR over the first day's vocabulary",
    "qr_grown": "QR over a vocabulary that grows",
    "id_hash_2": "`id_hash` with K=2",
    "id_hash_3": "`id_hash` with K=3",
}
STATELESS = ("hashing", "id_hash_2", "id_hash_3")
EVICTION_INTERVAL = 10
_ZCH_IDS = 16  # bytes of a slot: its id, and its place in the table
_METADATA = 8
_ZCH_NUMBERS = 24  # bytes of a module's single numbers
_MPZCH_SLOT = 12
_POLICIES: dict[str, tuple[Callable[[], MCHEvictionPolicy], int]] = {
    "lfu": (LFU_EvictionPolicy, 1),
    "lru": (LRU_EvictionPolicy, 1),
    "distance_lfu": (DistanceLFU_EvictionPolicy, 2),
}
_MPZCH = {
    "lru": HashZchEvictionPolicyName.LRU_EVICTION,
    "ttl": HashZchEvictionPolicyName.SINGLE_TTL_EVICTION,
}


class ImpossibleMethodError(ValueError):
    """A method that does not run in this budget, or not on this machine; says why."""


@dataclass(frozen=True)
class Method:
    """An entry of ``tables:`` for the open features, and what stands in front of it."""

    table: dict[str, Any]
    front: IdFront


def method(name: str, budget: int, days: Days, seed: int) -> Method:
    """Returns a method of `TITLES` that takes at most ``budget`` bytes, but for ``full``.

    Args:
        name: of the method.
        budget: bytes of rows, of Adagrad's state of them, and of ids that are kept.
        days: to know how many ids a vocabulary will have, which no other method needs.
        seed: of ``id_hash``.

    Raises:
        ImpossibleMethodError: the method is not possible in so many bytes, or not on this machine.
    """
    match name.split("_"):
        case ["full"]:
            ids = _number_of_ids(days.days[:-1]) + 1
            return Method({"num_embeddings": ids}, KnownIds(ids, grows=True))
        case ["hashing"]:
            rows = budget // BYTES_OF_ROW
            return Method({"num_embeddings": rows}, modulo(rows))
        case ["zch", *policy]:
            return _zch("_".join(policy), budget, _features(days))
        case ["mpzch", policy]:
            return _mpzch(policy, budget, _features(days))
        case ["qr", vocabulary]:
            return _quotient_remainder(vocabulary == "grown", budget, days)
    rows = budget // BYTES_OF_ROW
    if name == "id_hash_2":
        return _hashed(2, min(2 * (rows // 2).bit_length() - 2, 40), rows, seed)
    return _hashed(3, 40, rows, seed)


def sharing_ids(name: str, budget: int, days: Days) -> int | None:
    """Returns how many ids of all days have all rows of a table in common with another id, with seed 0.

    None stands for a method whose ids share rows as its state has it.
    """
    if name not in STATELESS:
        return None
    made = method(name, budget, days, seed=0)
    ids = torch.unique(torch.cat([day.raw.reshape(-1) for day in days.days]))
    places = made.front(ids, training=False)
    if "id_hash" in made.table:
        places = hashed_ids(places, made.table["hash_seed"], made.table["num_embeddings"])
    _, counts = torch.unique(places, return_counts=True)
    return int(counts[counts > 1].sum())


def _features(days: Days) -> list[str]:
    return [f"{TABLE}_{f}" for f in range(days.days[0].raw.shape[1])]


def _number_of_ids(days: list[Day]) -> int:
    return len(torch.unique(torch.cat([day.raw.reshape(-1) for day in days])))


def _zch(variant: str, budget: int, features: list[str]) -> Method:
    policy, metadata = _POLICIES[variant.removesuffix("_inherited")]
    slots = (budget - _ZCH_NUMBERS) // (BYTES_OF_ROW + _ZCH_IDS + metadata * _METADATA)
    config = _slots(slots, features)
    module = MCHManagedCollisionModule(slots, torch.device("cpu"), policy(), EVICTION_INTERVAL)
    return Method({"num_embeddings": slots}, ManagedIds(module, config, not variant.endswith("_inherited")))


def _mpzch(variant: str, budget: int, features: list[str]) -> Method:
    slots = budget // (BYTES_OF_ROW + _MPZCH_SLOT)
    module = HashZchManagedCollisionModule(
        slots,
        torch.device("cpu"),
        total_num_buckets=1,
        eviction_policy_name=_MPZCH[variant],
        eviction_config=HashZchEvictionConfig(features=features, single_ttl=24),
    )
    front = ManagedIds(module, _slots(slots, features), resets=True)
    try:
        front(torch.zeros((len(features), 1), dtype=torch.int64), training=True)
    except RuntimeError as error:
        raise ImpossibleMethodError(f"FBGEMM's operator on a CPU: {str(error).splitlines()[0]}") from error
    return Method({"num_embeddings": slots}, front)


def _slots(slots: int, features: list[str]) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=TABLE, num_embeddings=slots, embedding_dim=DIM, feature_names=features)


def _quotient_remainder(grows: bool, budget: int, days: Days) -> Method:
    ids = _number_of_ids(days.days[:-1] if grows else days.days[:1]) + 1
    rows = (budget - ids * BYTES_OF_VOCABULARY_ID) // BYTES_OF_ROW
    table: dict[str, Any] = {"num_embeddings": ids}
    if rows < ids:
        table["partitions"] = {"kind": "quotient_remainder", "rows": rows}
    return Method(table, KnownIds(ids, grows))


def _hashed(count: int, bits: int, rows: int, seed: int) -> Method:
    try:
        MixedRadix(num_partitions=count, rows=rows).bind(2**bits)
    except ValueError as error:
        raise ImpossibleMethodError(str(error)) from error
    return Method(
        {
            "num_embeddings": 2**bits,
            "id_hash": "splitmix64",
            "hash_seed": seed,
            "partitions": {"kind": "mixed_radix", "num_partitions": count, "rows": rows},
        },
        as_they_are(),
    )
