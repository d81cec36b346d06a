"""A compositional collection as TorchRec's own, with full tables."""

from typing import Any, overload

from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr.inference.full_rows import Collection, materialized_blocks, tables_of
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection


@overload
def to_plain(collection: CompositionalEmbeddingBagCollection) -> EmbeddingBagCollection: ...
@overload
def to_plain(collection: CompositionalEmbeddingCollection) -> EmbeddingCollection: ...
def to_plain(collection: Collection) -> EmbeddingBagCollection | EmbeddingCollection:
    """Returns TorchRec's own collection with the full rows of all tables, whose outputs are the same for ids in [0, S).

    All tables of the result are fp32, because a product or a sum of fp16 rows is no fp16 number. It has the names, the
    features, the poolings, the flags ``is_weighted`` and ``need_indices``, and the device of ``collection``. It raises
    on an id outside [0, S), whatever the table's ``out_of_range``. Sums of bags of several ids may round otherwise.
    Beside ``collection``, the memory needs Σ S · D floats.

    Args:
        collection (Collection): an unsharded `CompositionalEmbeddingBagCollection` or
            `CompositionalEmbeddingCollection`.

    Returns:
        EmbeddingBagCollection | EmbeddingCollection: a copy, which trains unless the table is frozen.

    Raises:
        TypeError: the collection is none of ours, or is sharded.
        ValueError: the collection is on the meta device, or its tables differ in D, which TorchRec's collection of
            sequences cannot have.
        NotImplementedError: a table of a weighted collection has MEAN pooling, which TorchRec's unsharded one lacks, or
            a table has ``id_hash``.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> from torchrec_qr.inference import to_plain
        >>> ebc = CompositionalEmbeddingBagCollection(tables=[
        ...     CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=6,
        ...         embedding_dim=4, partitions=QuotientRemainder(num_collisions=2))])
        >>> plain = to_plain(ebc)
        >>> {name: tuple(weight.shape) for name, weight in plain.state_dict().items()}
        {'embedding_bags.t_user.weight': (6, 4)}
        >>> batch = KeyedJaggedTensor(keys=["user"], values=torch.tensor([0, 5, 4]), lengths=torch.tensor([2, 1]))
        >>> torch.allclose(plain(batch)["user"], ebc(batch)["user"])
        True
    """
    own = tables_of(collection)
    for config in collection.embedding_configs():
        if getattr(config, "id_hash", None) is not None:
            raise NotImplementedError(
                f"table {config.name!r}: a full table is not supported with id_hash, whose ids have no end; "
                "allowed: full rows of given ids, materialize(collection, table, ids)"
            )
    plain: EmbeddingBagCollection | EmbeddingCollection
    if isinstance(collection, CompositionalEmbeddingBagCollection):
        bags = [_plain_bag(config, collection.is_weighted()) for config in collection.embedding_bag_configs()]
        plain = EmbeddingBagCollection(bags, collection.is_weighted(), collection.device)
        tables = plain.embedding_bags
    else:
        collection.embedding_dim()
        sequences = [EmbeddingConfig(**_fields(config)) for config in collection.embedding_configs()]
        plain = EmbeddingCollection(sequences, collection.device, collection.need_indices())
        tables = plain.embeddings
    for name, table in tables.items():
        weight, first = table.get_parameter("weight"), 0
        for block in materialized_blocks(collection, name):
            weight.data[first : first + len(block)] = block
            first += len(block)
        weight.requires_grad_(any(p.requires_grad for p in own[name].parameters()))
    return plain.train(collection.training)


def _plain_bag(config: EmbeddingBagConfig, is_weighted: bool) -> EmbeddingBagConfig:
    if is_weighted and config.pooling == PoolingType.MEAN:
        raise NotImplementedError(
            f"table {config.name!r}: pooling={config.pooling} of a weighted collection is not supported by TorchRec's "
            f"unsharded EmbeddingBagCollection; allowed: {PoolingType.SUM}"
        )
    return EmbeddingBagConfig(**_fields(config), pooling=config.pooling)


def _fields(config: EmbeddingBagConfig | EmbeddingConfig) -> dict[str, Any]:
    return {
        "name": config.name,
        "feature_names": list(config.feature_names),
        "num_embeddings": config.num_embeddings,
        "embedding_dim": config.embedding_dim,
        "data_type": DataType.FP32,
        "weight_init_min": config.weight_init_min,
        "weight_init_max": config.weight_init_max,
    }
