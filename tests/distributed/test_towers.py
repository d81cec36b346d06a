"""TorchRec's embedding towers: one tower works, sharded too; collections of towers and their sharders are closed."""

from typing import Any

import pytest
import torch
from assert_all_close import assert_all_close
from global_batches import batch_of
from ranks import own_device, run_ranks
from sharded_model import LR, loss_of, plain_named, tables, two_tables, weights_of
from single_tables import collection_of
from torch import Tensor, nn
from torchrec import KeyedTensor
from torchrec.distributed.embedding_tower_sharding import EmbeddingTowerCollectionSharder, EmbeddingTowerSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr.distributed import get_default_sharders


class Interaction(nn.Module):
    def __init__(self, features: list[str]) -> None:
        super().__init__()
        self.features = features

    def forward(self, pooled: KeyedTensor) -> Tensor:
        return KeyedTensor.regroup([pooled], [self.features])[0] * 2


def tower(configs: list[Any], device: str) -> EmbeddingTower:
    features = [feature for config in configs for feature in config.feature_names]
    return EmbeddingTower(collection_of(configs, device), Interaction(features))


def sharded(rank: int, world_size: int, configs: list[Any]) -> None:
    """A tower under our default sharders, which shard the collection within, beside one that is not sharded."""
    alone = tower(configs, "cpu")
    model = tower(configs, "meta")
    for of in (alone, model):
        apply_optimizer_in_backward(torch.optim.SGD, of.embedding.parameters(), {"lr": LR})
    model = DistributedModelParallel(model, device=own_device(), sharders=get_default_sharders())
    assert any(isinstance(module, ShardedModule) for module in model.modules())
    model.load_state_dict({name: value.clone() for name, value in alone.state_dict().items()})
    batch = batch_of(configs, 0, rank, world_size)
    for _ in range(2):
        out, expected = model(batch), alone(batch)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        for of in (out, expected):
            loss_of(of, world_size).backward()
    assert_all_close(weights_of(model), alone.state_dict(), "tower", 1e-5, 1e-6)


@pytest.mark.parametrize("configs", [two_tables(), [plain_named("plain")]], ids=["compositional", "plain"])
def test_a_tower_trains_as_unsharded(configs: list[Any]) -> None:
    run_ranks(sharded, 1, configs)


def test_sharders_of_towers_are_closed() -> None:
    own = tower(two_tables(), "meta")
    match = "Unsupported embedding type: .*EmbeddingTower"
    with pytest.raises(RuntimeError, match=match):
        EmbeddingTowerSharder().shardable_parameters(own)
    with pytest.raises(RuntimeError, match=match):
        EmbeddingTowerCollectionSharder().shardable_parameters(EmbeddingTowerCollection([own]))


def test_a_collection_of_towers_is_closed() -> None:
    """It takes an unknown class for one that needs both batches: of its features, and of its weighted ones."""
    configs = tables()[:2]
    towers = EmbeddingTowerCollection([tower(configs, "cpu")])
    batch = batch_of(configs, 0, 0, 1)
    with pytest.raises(AssertionError):
        towers(batch)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        towers(batch, batch)
