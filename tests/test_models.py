"""Collections inside TorchRec's models, unchanged, against the same models over lookups of the oracle."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from batches import Bags, batch
from cases import Kind, kind_of, oracle_of
from oracle import OracleTable
from single_tables import bag_table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec_models import DENSE, D, deepfm, dlrm, dlrm_dcn, dlrm_projection

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
)

S, SAMPLES = 100, 64


def kinds() -> dict[str, Kind]:
    return {
        "t_mult": kind_of("strided", 2),
        "t_add": kind_of("chinese_remainder", 3),
        "t_concat": kind_of("explicit", 2),
        "t_path": kind_of("adjacent", 2),
    }


def tables(operations: bool = True) -> list[EmbeddingBagConfig]:
    """A plain table first; then one per operation, t_mult with two features, one of them with several ids a bag."""
    own = kinds()

    def table(name: str, *features: str, **fields: Any) -> CompositionalEmbeddingBagConfig:
        fields = fields if operations else {}
        return bag_table(own[name].partitions, name=name, feature_names=list(features), **fields)

    return [
        EmbeddingBagConfig(name="plain", num_embeddings=10, embedding_dim=D, feature_names=["small"]),
        table("t_mult", "user", "friends", operation="mult"),
        table("t_add", "item", operation="add", pooling=PoolingType.MEAN),
        table("t_concat", "shop", operation="concat"),
        table("t_path", "tag", operation="path", path_hidden=4),
    ]


class Expanded(EmbeddingBagCollectionInterface):
    """The outputs of a collection by tables of the oracle, id by id and bag by bag, in float64."""

    def __init__(self, collection: CompositionalEmbeddingBagCollection, operations: bool) -> None:
        super().__init__()
        self.configs = collection.embedding_bag_configs()
        self.leaves: list[Tensor] = []
        # An output's name, its feature, and what computes it.
        self.outputs: list[tuple[str, str, OracleTable]] = []
        for config in tables(operations):
            module, kind = collection.embedding_bags[config.name], kinds().get(config.name)
            if kind is None:
                table = OracleTable(lambda x: (x,), [module.weight.detach().double().requires_grad_()], "add")
            else:
                table = oracle_of(config, kind, module)
            self.leaves += table.weights
            for feature in config.feature_names:
                if operations or kind is None:
                    self.outputs.append((feature, feature, table))
                    continue
                for j, weight in enumerate(table.weights):
                    rows_of = partial(row_of_partition, kind, j)
                    part = OracleTable(rows_of, [weight], "add", table.pooling)
                    self.outputs.append((f"{feature}.partition_{j}", feature, part))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = []
        for _, feature, table in self.outputs:
            bags = features[feature].values().split(features[feature].lengths().tolist())
            pooled.append(table.pool([ids.tolist() for ids in bags]))
        return KeyedTensor([name for name, _, _ in self.outputs], [D] * len(pooled), torch.cat(pooled, dim=1).float())

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self.configs

    def is_weighted(self) -> bool:
        return False


def row_of_partition(kind: Kind, j: int, x: int) -> tuple[int]:
    return (kind.rows_of(x)[j],)


def toy_batch() -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """The label is whether the user's id is even or the item's is large, which takes the embeddings to learn."""
    generator = torch.Generator().manual_seed(0)

    def ids(num_ids: int, count: int = 1) -> Bags:
        return torch.randint(num_ids, (SAMPLES, count), generator=generator).tolist()

    per_feature = {
        "user": ids(S),
        "small": ids(10),
        "item": ids(S, 2),
        "friends": ids(S, 3),
        "shop": ids(S),
        "tag": ids(S, 2),
    }
    labels = [float(u[0] % 2 == 0 or i[0] > 80) for u, i in zip(per_feature["user"], per_feature["item"], strict=True)]
    return torch.rand(SAMPLES, DENSE, generator=generator), batch(per_feature), torch.tensor(labels)


def loss_of(model: nn.Module, data: tuple[Tensor, KeyedJaggedTensor, Tensor]) -> Tensor:
    dense, sparse, labels = data
    out = model(dense, sparse).squeeze(1)
    # DeepFM ends in a sigmoid, the DLRMs in logits.
    return (binary_cross_entropy if isinstance(model, SimpleDeepFMNN) else binary_cross_entropy_with_logits)(
        out, labels
    )


@pytest.mark.parametrize("build", [dlrm, dlrm_dcn, dlrm_projection, deepfm])
@pytest.mark.parametrize(
    ("collection", "operations"),
    [(CompositionalEmbeddingBagCollection, True), (FeatureGenerationEmbeddingBagCollection, False)],
)
def test_models_train_as_over_the_oracles_lookups(
    collection: type[CompositionalEmbeddingBagCollection], operations: bool, build: Callable[[Any], nn.Module]
) -> None:
    torch.manual_seed(0)
    sparse, data = collection(tables=tables(operations)), toy_batch()
    model = build(sparse)
    expanded_sparse = Expanded(sparse, operations)
    expanded = build(expanded_sparse)
    expanded.load_state_dict({k: v for k, v in model.state_dict().items() if "embedding_bag" not in k}, strict=False)

    first, expected = loss_of(model, data), loss_of(expanded, data)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)

    first.backward()
    expected.backward()
    own = [p for name, p in model.named_parameters() if "embedding_bags." in name]
    assert len(own) == len(expanded_sparse.leaves) == 10
    for p, q in zip(own, expanded_sparse.leaves, strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-4, atol=1e-6 * float(q.grad.abs().max()))

    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert bool(p.grad.any()), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(first.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_training_wrapper_of_dlrm_takes_the_model() -> None:
    torch.manual_seed(0)
    dense, sparse, labels = toy_batch()
    model = dlrm(CompositionalEmbeddingBagCollection(tables=tables()))
    loss, (_, logits, _) = DLRMTrain(model)(
        type("Batch", (), {"dense_features": dense, "sparse_features": sparse, "labels": labels})()
    )
    assert torch.equal(logits, model(dense, sparse).squeeze(1).detach())
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits, labels))
