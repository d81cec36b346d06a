"""The pooled collection: TorchRec's ``EmbeddingBagCollection``, whose tables may be compositional."""

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_qr.ids import bags_of
from torchrec_qr.modules.table import PlainEmbeddingBag, build_tables, device_of, id_spaces, init_tables, sum_bags_of


class CompositionalEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """Pooled embeddings of plain and compositional tables: a drop-in for TorchRec's ``EmbeddingBagCollection``.

    For feature f of table t and bag b of the batch, the output ``KeyedTensor`` holds

        out[b, f] = pool over ids x of bag (b, f) of  w_x · compose_j( W_j[p_j(x)] )

    composed per id, then weighted, then pooled (arXiv:1909.02107, sections 3 and 4; TorchRec's
    ``EmbeddingBagCollection`` where t is plain, which is K = 1). SUM pooling adds up; MEAN divides that sum by the
    number of ids of the bag, weighted or not; an empty bag gives zeros.

    Shapes: input ``KeyedJaggedTensor`` of F features × B bags, N ids in all; output (B, ΣD) fp32, one block of D
    columns per feature, in the order of ``tables``. A feature that several tables share is called
    ``<feature>@<table>``, as in TorchRec.

    ``state_dict`` keys: ``embedding_bags.<table>.partition_<j>.weight`` (|P_j|, D_j) and
    ``embedding_bags.<table>.fingerprint`` of a compositional table; TorchRec's ``embedding_bags.<table>.weight`` of
    a plain one.

    Args:
        tables: ``EmbeddingBagConfig`` and `CompositionalEmbeddingBagConfig`, in any mix.
        is_weighted: whether the batch's weights w_x are used; otherwise w_x = 1 and weights are ignored.
        device: of the parameters; ``torch.device("meta")`` for later materialisation.

    Raises:
        ValueError: a table name that occurs twice; a weighted batch without one weight per id.
        KeyError: the batch lacks a feature.
        IndexError: an id outside [0, S), unless the table's ``out_of_range`` says otherwise. On CUDA nothing waits for
            the device: the id adds nothing, and a later call raises, at the latest `torchrec_qr.raise_pending`.
        TypeError: ids that are not integers.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> ebc = CompositionalEmbeddingBagCollection(tables=[
        ...     CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=1_000_000,
        ...         embedding_dim=8, partitions=QuotientRemainder(num_collisions=1000)),
        ...     EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=4)])
        >>> out = ebc(KeyedJaggedTensor(keys=["user", "country"], values=torch.tensor([999_999, 5, 7, 249]),
        ...                             lengths=torch.tensor([2, 0, 1, 1])))
        >>> out.keys(), tuple(out.values().shape)
        (['user', 'country'], (2, 12))
        >>> out["user"][1].tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._is_weighted = is_weighted
        self._tables = tables
        self.embedding_bags = build_tables(tables, PlainEmbeddingBag, device)
        self._id_spaces = id_spaces(tables)
        self._pooling = {t.name: t.pooling for t in tables}
        self._embedding_names = [name for names in get_embedding_names_by_table(tables) for name in names]
        self._lengths_per_embedding = [t.embedding_dim for t in tables for _ in t.feature_names]
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up, composes and pools a batch; see the class."""
        features = maybe_td_to_kjt(features, None)
        inverse_indices = reorder_inverse_indices(
            features.inverse_indices_or_none(), [space.feature for space in self._id_spaces]
        )
        bags = bags_of(features, self._id_spaces, self._is_weighted)
        pooled = []
        for i, space in enumerate(self._id_spaces):
            weights = bags[i].weights if self._is_weighted else None
            out = sum_bags_of(self.embedding_bags[space.table], bags[i].ids, bags[i].offsets, weights)
            if self._pooling[space.table] == PoolingType.MEAN:
                out = out / bags[i].lengths.clamp(min=1).unsqueeze(1)
            pooled.append(out)
        return KeyedTensor(
            keys=self._embedding_names,
            length_per_key=self._lengths_per_embedding,
            values=process_pooled_embeddings(pooled, inverse_indices),
        )

    def reset_parameters(self) -> None:
        """Draws every parameter anew by its config; parameters on the meta device stay as they are."""
        init_tables(self.embedding_bags)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the logical configs: S rows and D columns per table, as the model sees it."""
        return self._tables

    def embedding_configs(self) -> list[EmbeddingBagConfig]:
        """As `embedding_bag_configs`: by this name TorchRec's managed collision asks collections not of its own."""
        return self.embedding_bag_configs()

    def is_weighted(self) -> bool:
        """Returns whether the batch's weights are used."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return device_of(self)


# Recorded as calls by `torch.fx`: the first looks at ids, the others are TorchRec's and wrapped in its own module.
torch.fx.wrap("bags_of")
torch.fx.wrap("process_pooled_embeddings")
torch.fx.wrap("reorder_inverse_indices")
