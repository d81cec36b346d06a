"""Fingerprints differ where two tables of equal shapes differ in meaning."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from single_tables import bag_table, sequence_table
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import (
    ChineseRemainder,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.fingerprint import check_row_types, differences, fingerprint

EXPLICIT = [[x % 4 for x in range(12)], [x // 4 for x in range(12)]]


config = partial(bag_table, num_embeddings=12)


def map_hash(classes: list[list[int]]) -> int:
    return int(ExplicitPartitions(classes).bind(12).sha256[:16], 16) >> 1


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # format, kind, grouping, operation, path_hidden, path_activation, map_hash, S, sizes, columns
        (config(QuotientRemainder(num_collisions=4), num_embeddings=100), [1, 0, 1, 0, 0, 0, 0, 100, 25, 4, 8, 8]),
        (
            config(QuotientRemainder(num_collisions=4, grouping="adjacent"), num_embeddings=100, operation="add"),
            [1, 0, 2, 1, 0, 0, 0, 100, 25, 4, 8, 8],
        ),
        (
            config(
                MixedRadix(sizes=[25, 4]),
                num_embeddings=100,
                operation="concat",
                embedding_dim=12,
                partition_dims=[8, 4],
            ),
            [1, 1, 0, 2, 0, 0, 0, 100, 25, 4, 8, 4],
        ),
        (
            config(ChineseRemainder(sizes=[25, 4]), num_embeddings=100, operation="path", embedding_dim=4),
            [1, 2, 0, 3, 0, 0, 0, 100, 25, 4, 4, 20],
        ),
        (
            config(
                QuotientRemainder(num_collisions=4),
                num_embeddings=100,
                operation="path",
                embedding_dim=4,
                path_hidden=2,
                path_activation="tanh",
            ),
            [1, 0, 1, 3, 2, 2, 0, 100, 25, 4, 4, 22],
        ),
        (config(HashPartition(rows=7), num_embeddings=100), [1, 4, 0, 0, 0, 0, 0, 100, 7, 8]),
        # … and hash of ids, seed of the hash
        (
            config(QuotientRemainder(num_collisions=4), num_embeddings=100, id_hash="splitmix64", hash_seed=9),
            [2, 0, 1, 0, 0, 0, 0, 100, 1, 9, 25, 4, 8, 8],
        ),
    ],
)
def test_values_are_those_of_the_checkpoint_format(table: Any, expected: list[int]) -> None:
    """Frozen: a change makes every checkpoint before it unreadable."""
    tensor = fingerprint(table)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == expected


def test_an_explicit_map_counts_by_content_whatever_its_dtype() -> None:
    as_int64 = ExplicitPartitions(torch.tensor(EXPLICIT))
    as_uint8 = ExplicitPartitions(torch.tensor(EXPLICIT, dtype=torch.uint8))
    values = fingerprint(config(as_int64)).tolist()
    assert values == fingerprint(config(as_uint8)).tolist()
    assert values == [1, 3, 0, 0, 0, 0, map_hash(EXPLICIT), 12, 4, 3, 8, 8]
    assert 0 < map_hash(EXPLICIT) < 2**63


def test_what_does_not_change_the_meaning_of_rows_does_not_count() -> None:
    own = fingerprint(config(QuotientRemainder(num_collisions=4), num_embeddings=100))
    for fields in (
        {"name": "other", "feature_names": ["g"]},
        {"data_type": DataType.BF16},
        {"init": "balanced"},
        {"out_of_range": "clamp"},
        {"pooling": PoolingType.MEAN},
        {"path_activation": "tanh"},
    ):
        assert torch.equal(
            fingerprint(config(QuotientRemainder(num_collisions=4), num_embeddings=100, **fields)), own
        ), fields
    linear = [
        fingerprint(
            config(QuotientRemainder(num_collisions=4), num_embeddings=100, operation="path", path_activation=a)
        )
        for a in ("relu", "tanh")
    ]
    assert torch.equal(*linear)  # no hidden layer, no activation
    sequence = sequence_table(QuotientRemainder(num_collisions=4))
    assert torch.equal(fingerprint(sequence), own)


SWAPPED = [EXPLICIT[0], [2 - c for c in EXPLICIT[1]]]


@pytest.mark.parametrize(
    ("saved", "own", "expected"),
    [
        (
            config(ChineseRemainder(sizes=[4, 3])),
            config(MixedRadix(sizes=[4, 3])),
            ["kind: saved chinese_remainder, here mixed_radix"],
        ),
        (
            config(QuotientRemainder(num_collisions=3)),
            config(QuotientRemainder(num_collisions=3, grouping="adjacent")),
            ["grouping: saved strided, here adjacent"],
        ),
        (
            config(QuotientRemainder(num_collisions=3)),
            config(QuotientRemainder(num_collisions=3), operation="add"),
            ["operation: saved mult, here add"],
        ),
        (
            config(QuotientRemainder(num_collisions=3), operation="path", path_hidden=4),
            config(QuotientRemainder(num_collisions=3), operation="path", path_hidden=4, path_activation="tanh"),
            ["path_activation: saved relu, here tanh"],
        ),
        (
            config(ExplicitPartitions(EXPLICIT)),
            config(ExplicitPartitions(SWAPPED)),
            [f"map_hash: saved {map_hash(EXPLICIT)}, here {map_hash(SWAPPED)}"],
        ),
        (
            config(MixedRadix(sizes=[4, 3])),
            config(MixedRadix(sizes=[4, 3, 1]), num_embeddings=11),
            [
                "num_embeddings: saved 12, here 11",
                "sizes: saved [4, 3], here [4, 3, 1]",
                "columns: saved [8, 8], here [8, 8, 8]",
            ],
        ),
        (
            config(MixedRadix(sizes=[4, 3]), operation="concat", embedding_dim=12, partition_dims=[8, 4]),
            config(MixedRadix(sizes=[4, 3]), operation="concat", embedding_dim=12, partition_dims=[4, 8]),
            ["columns: saved [8, 4], here [4, 8]"],
        ),
        (
            config(MixedRadix(sizes=[4, 3]), id_hash="splitmix64", hash_seed=3),
            config(MixedRadix(sizes=[4, 3]), id_hash="splitmix64", hash_seed=4),
            ["hash_seed: saved 3, here 4"],
        ),
        (
            config(MixedRadix(sizes=[4, 3])),
            config(MixedRadix(sizes=[4, 3]), id_hash="splitmix64"),
            ["id_hash: saved none, here splitmix64"],
        ),
        (
            config(ChineseRemainder(sizes=[4, 3]), id_hash="splitmix64", hash_seed=3),
            config(MixedRadix(sizes=[4, 3])),
            [
                "kind: saved chinese_remainder, here mixed_radix",
                "id_hash: saved splitmix64, here none",
                "hash_seed: saved 3, here 0",
            ],
        ),
    ],
)
def test_differences_name_the_field_and_both_values(saved: Any, own: Any, expected: list[str]) -> None:
    assert differences(fingerprint(saved), fingerprint(own)) == expected
    assert differences(fingerprint(own), fingerprint(own)) == []


def test_a_fingerprint_of_a_later_version_is_reported_rather_than_misread() -> None:
    own = fingerprint(config(QuotientRemainder(num_collisions=3)))
    later = own.clone()
    later[0], later[1] = 3, 9
    assert differences(later, own) == ["format: saved 3, here 1", "kind: saved unknown (9), here quotient_remainder"]


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_the_type_of_sharded_rows_is_read_without_a_warning_of_pytorch(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rows = sharded_tensor.zeros(ChunkShardingSpec(0, ["rank:0/cpu"]), 4, 8)
        state = {"embedding_bags.t.weight": rows}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_row_types(state, "embedding_bags.t", quantised=False)
            with pytest.raises(ValueError, match=r"table 't': .* has rows of torch.float32 in the checkpoint"):
                check_row_types(state, "embedding_bags.t", quantised=True)
    finally:
        dist.destroy_process_group()
