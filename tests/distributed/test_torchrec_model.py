"""TorchRec's own test model of sharded collections, with compositional collections in the place of its own."""

import pytest
import torch
from placements import BASIC_SHARDINGS, placements, plan_of
from ranks import run_ranks
from sharded_model import NUM_IDS, plain_named, table
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.test_utils.model_input import ModelInput
from torchrec.distributed.test_utils.test_model import TestEBCSparseArch, TestSparseNN
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import CompositionalEmbeddingBagCollection, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder

BATCH, DENSE = 8, 10


def tables(prefix: str) -> list[EmbeddingBagConfig]:
    partitions = QuotientRemainder(num_collisions=7)
    features = {o: [f"{prefix}_{o}_{i}" for i in range(2)] for o in ("mult", "add", "concat")}
    return [
        *(table(f"{prefix}_{o}", partitions, o, feature_names=f) for o, f in features.items()),
        plain_named(f"{prefix}_p"),
    ]


def model_of(device: str) -> TestSparseNN:
    """`TestSparseNN`, its two collections replaced: all else is TorchRec's."""
    torch.manual_seed(0)
    unweighted, weighted = tables("u"), tables("w")
    model = TestSparseNN(
        tables=unweighted, weighted_tables=weighted, num_float_features=DENSE, sparse_device=torch.device("meta")
    )
    assert isinstance(model.sparse, TestEBCSparseArch)
    for name, configs, is_weighted in (("ebc", unweighted, False), ("weighted_ebc", weighted, True)):
        collection = CompositionalEmbeddingBagCollection(
            tables=configs, is_weighted=is_weighted, device=torch.device(device)
        )
        setattr(model.sparse, name, collection)
    return model


def batch_of_rank(rank: int) -> ModelInput:
    generator = torch.Generator().manual_seed(rank)

    def features(configs: list[EmbeddingBagConfig], weighted: bool) -> KeyedJaggedTensor:
        keys = [f for c in configs for f in c.feature_names]
        lengths = torch.randint(0, 4, (len(keys) * BATCH,), generator=generator)
        values = torch.randint(0, NUM_IDS, (int(lengths.sum()),), generator=generator)
        weights = torch.rand(len(values), generator=generator) if weighted else None
        return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, weights=weights)

    return ModelInput(
        float_features=torch.rand(BATCH, DENSE, generator=generator),
        idlist_features=features(tables("u"), False),
        idscore_features=features(tables("w"), True),
        label=torch.randint(0, 2, (BATCH,), generator=generator).float(),
    )


def outputs(rank: int, world_size: int, sharding: str) -> None:
    unsharded = model_of("cpu")
    with torch.no_grad():
        for p in unsharded.sparse.parameters():
            p.uniform_(0.5, 1.5)
    sharder = CompositionalEmbeddingBagCollectionSharder(fused_params={"learning_rate": 0.1})
    meta = model_of("meta")
    plan = ShardingPlan(
        {
            f"sparse.{name}": plan_of(
                getattr(meta.sparse, name),
                placements(configs, sharding),
                sharder,
            )
            for name, configs in (("ebc", tables("u")), ("weighted_ebc", tables("w")))
        }
    )
    sharded = DistributedModelParallel(meta, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    sharded.load_state_dict({name: value.clone() for name, value in unsharded.state_dict().items()})
    batch = batch_of_rank(rank)
    (loss, predictions), (expected_loss, expected) = sharded(batch), unsharded(batch)
    assert expected.std() > 0
    torch.testing.assert_close(predictions, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    changed = sharded(batch)[1]
    assert not torch.equal(changed, predictions)  # the fused optimizer has stepped in backward


@pytest.mark.parametrize("sharding", BASIC_SHARDINGS)
def test_sharded_output_is_the_unsharded_one(sharding: str) -> None:
    run_ranks(outputs, 2, sharding)
