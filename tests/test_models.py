"""Collections inside TorchRec's models, unchanged, against the same models over ``nn.Embedding`` lookups by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import Bags, batch
from cases import Kind, kind_of
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
)

S, D, DENSE, SAMPLES = 100, 8, 3, 64


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
        return CompositionalEmbeddingBagConfig(
            name=name,
            feature_names=list(features),
            num_embeddings=S,
            embedding_dim=D,
            partitions=own[name].partitions,
            **fields,
        )

    return [
        EmbeddingBagConfig(name="plain", num_embeddings=10, embedding_dim=D, feature_names=["small"]),
        table("t_mult", "user", "friends", operation="mult"),
        table("t_add", "item", operation="add", pooling=PoolingType.MEAN),
        table("t_concat", "shop", operation="concat"),
        table("t_path", "tag", operation="path", path_hidden=4),
    ]


class HandExpanded(EmbeddingBagCollectionInterface):
    """The same lookups with one ``nn.Embedding`` per partition, id by id and bag by bag."""

    def __init__(self, collection: CompositionalEmbeddingBagCollection) -> None:
        super().__init__()
        self.configs = collection.embedding_bag_configs()
        self.logical = tables(operations=not isinstance(collection, FeatureGenerationEmbeddingBagCollection))
        self.generated = isinstance(collection, FeatureGenerationEmbeddingBagCollection)
        self.embeddings = nn.ModuleDict()
        for name, module in collection.embedding_bags.items():
            self.embeddings[name] = nn.ModuleList(
                nn.Embedding.from_pretrained(p.detach().clone(), freeze=False) for p in module.parameters()
            )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        outputs: dict[str, Tensor] = {}
        for table in self.logical:
            for feature in table.feature_names:
                lengths = features[feature].lengths().tolist()
                bags = [ids.tolist() for ids in features[feature].values().split(lengths)]
                parts = [[self.parts(table, x) for x in bag] for bag in bags]
                if self.generated and table.name != "plain":
                    for j in range(len(self.embeddings[table.name])):
                        outputs[f"{feature}.partition_{j}"] = pool(table, [[p[j] for p in bag] for bag in parts])
                else:
                    outputs[feature] = pool(table, [[compose(table, p) for p in bag] for bag in parts])
        return KeyedTensor(list(outputs), [D] * len(outputs), torch.cat(list(outputs.values()), dim=1))

    def parts(self, table: EmbeddingBagConfig, x: int) -> list[Tensor]:
        rows = kinds()[table.name].rows_of(x) if table.name != "plain" else (x,)
        return [e(torch.tensor(r)) for e, r in zip(self.embeddings[table.name], rows, strict=True)]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self.configs

    def is_weighted(self) -> bool:
        return False


def compose(table: EmbeddingBagConfig, parts: list[Tensor]) -> Tensor:
    operation = getattr(table, "operation", "add")
    if operation == "concat":
        return torch.cat(parts)
    if operation == "mult":
        return torch.stack(parts).prod(0)
    if operation == "add":
        return torch.stack(parts).sum(0)
    x, mlp = parts
    w1, b1, w2, b2 = mlp.split([4 * D, 4, D * 4, D])
    return w2.view(D, 4) @ (w1.view(4, D) @ x + b1).relu() + b2


def pool(table: EmbeddingBagConfig, bags: list[list[Tensor]]) -> Tensor:
    sums = [torch.stack(bag).sum(0) / (len(bag) if table.pooling == PoolingType.MEAN else 1) for bag in bags]
    return torch.stack(sums)


def dlrm(collection: Any) -> nn.Module:
    return DLRM(collection, DENSE, [16, D], [16, 1])


def dlrm_dcn(collection: Any) -> nn.Module:
    return DLRM_DCN(collection, DENSE, [16, D], [16, 1], dcn_num_layers=2, dcn_low_rank_dim=4)


def dlrm_projection(collection: Any) -> nn.Module:
    return DLRM_Projection(
        embedding_bag_collection=collection,
        dense_in_features=DENSE,
        dense_arch_layer_sizes=[16, D],
        over_arch_layer_sizes=[16, 1],
        interaction_branch1_layer_sizes=[16, 2 * D],
        interaction_branch2_layer_sizes=[16, 2 * D],
    )


def deepfm(collection: Any) -> nn.Module:
    return SimpleDeepFMNN(DENSE, collection, hidden_layer_size=16, deep_fm_dimension=4)


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
def test_models_train_as_over_hand_expanded_lookups(
    collection: type[CompositionalEmbeddingBagCollection], operations: bool, build: Callable[[Any], nn.Module]
) -> None:
    torch.manual_seed(0)
    sparse, data = collection(tables=tables(operations)), toy_batch()
    model = build(sparse)
    expanded = build(HandExpanded(sparse))
    expanded.load_state_dict({k: v for k, v in model.state_dict().items() if "embedding_bag" not in k}, strict=False)

    first, expected = loss_of(model, data), loss_of(expanded, data)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)

    first.backward()
    expected.backward()
    others = [p for name, p in expanded.named_parameters() if "embeddings." in name]
    own = [p for name, p in model.named_parameters() if "embedding_bags." in name]
    assert len(own) == len(others) == 10
    for p, q in zip(own, others, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6 * float(q.grad.abs().max()))

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
