"""A config binds its partitions to the ids that it has now."""

import copy

import pytest
from single_tables import bag_table

from torchrec_qr import CompositionalEmbeddingBagConfig, MixedRadix, QuotientRemainder


def config() -> CompositionalEmbeddingBagConfig:
    return bag_table(QuotientRemainder(num_collisions=4))


def test_partitions_follow_a_change_of_a_built_config() -> None:
    changed = config()
    assert changed.bound_partitions.sizes == (25, 4)
    assert changed.bound_partitions is changed.bound_partitions
    changed.num_embeddings = 1000
    assert changed.bound_partitions.sizes == (250, 4)
    assert (changed.physical_rows, changed.num_parameters) == (254, 254 * 8)
    changed.partitions = MixedRadix(sizes=[10, 10, 10])
    assert changed.bound_partitions.sizes == (10, 10, 10)
    assert changed == bag_table(MixedRadix(sizes=[10, 10, 10]), num_embeddings=1000)


def test_a_change_that_the_spec_refuses_names_the_table() -> None:
    changed = config()
    changed.num_embeddings = 3
    with pytest.raises(ValueError, match=r"table 't': .* num_collisions must be between 1 and 3 .*got 4"):
        _ = changed.bound_partitions


def test_copies_are_bound_to_their_own_ids() -> None:
    original = config()
    other = copy.deepcopy(original)
    other.num_embeddings = 1000
    assert (original.physical_rows, other.physical_rows) == (29, 254)
