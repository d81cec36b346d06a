"""Unique ids of each feature, as the CPU finds them and, without a wait, a GPU; both run on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_qr.distributed import unique_ids

# Ids of each feature, bag by bag.
BATCHES: dict[str, list[list[list[int]]]] = {
    "bags": [[[7, 3, 7], [], [3]], [[7], [7], [2**40, -1]], [[], [], []]],
    "one bag each": [[[5, 5]], [[4, 5, 4]]],
    "no ids": [[[], []], [[], []]],
    "no bags": [[], []],
    "one feature": [[[9, 1], [1, 9, 9]]],
    "ends with none": [[[1], [0]], [[], []], [[1], [1]], [[], []]],
}


def batch_of(features: list[list[list[int]]], dtype: torch.dtype) -> KeyedJaggedTensor:
    ids = [x for bags in features for bag in bags for x in bag]
    lengths = [len(bag) for bags in features for bag in bags]
    keys = [f"f_{i}" for i in range(len(features))]
    return KeyedJaggedTensor(
        keys, torch.tensor(ids, dtype=dtype), lengths=torch.tensor(lengths, dtype=dtype), stride=len(features[0])
    )


@pytest.mark.parametrize("way", [unique_ids._on_host, unique_ids._on_device])
@pytest.mark.parametrize("features", BATCHES.values(), ids=BATCHES)
def test_each_id_is_there_once_a_feature(way: Callable[..., Any], features: list[list[list[int]]]) -> None:
    ids, counts, numbers = way(batch_of(features, torch.int64))
    expected = [sorted({x for bag in bags for x in bag}) for bags in features]
    flat = [(f, x) for f, bags in enumerate(features) for bag in bags for x in bag]
    unique = [(f, x) for f, of in enumerate(expected) for x in of]
    assert counts.tolist() == list(map(len, expected))
    assert ids.tolist()[: len(unique)] == [x for _, x in unique]
    assert [unique[n] for n in numbers.tolist()] == flat


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_they_are_in_the_first_bag_of_each_feature(dtype: torch.dtype) -> None:
    unique, numbers = unique_ids.unique_ids(batch_of([[[7, 3, 7], [], [3]], [[7], [7], [9, 1]], [[], [], []]], dtype))
    assert unique.keys() == ["f_0", "f_1", "f_2"]
    assert unique.values().tolist() == [3, 7, 1, 7, 9]
    assert unique.lengths().tolist() == [2, 0, 0, 3, 0, 0, 0, 0, 0]
    assert unique.length_per_key() == [2, 3, 0]
    assert unique.values().dtype == unique.lengths().dtype == dtype
    assert numbers.tolist() == [1, 0, 1, 0, 3, 3, 4, 2]
