"""The pooled collection: TorchRec's ``EmbeddingBagCollection`` with plain and compositional tables."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_qr.modules import graph_lookup
from torchrec_qr.modules.collection_lookup import PooledLookup
from torchrec_qr.modules.guarded_collection import GuardedCollection
from torchrec_qr.modules.table import PlainEmbeddingBag, build_tables, device_of, init_tables
from torchrec_qr.modules.tables_as_values import PooledValues, pooled_values, served_tables
from torchrec_qr.quant import QuantCompositionalEmbeddingBagCollection
from torchrec_qr.quant.qconfig import Qconfig
from torchrec_qr.quant.torchrec_entries import register_quantised


class CompositionalEmbeddingBagCollection(GuardedCollection, EmbeddingBagCollectionInterface):
    """Pooled embeddings of plain and compositional tables: a drop-in for TorchRec's ``EmbeddingBagCollection``.

    For feature f of table t and bag b of the batch, the output ``KeyedTensor`` has

        out[b, f] = pool over ids x of bag (b, f) of  w_x · compose_j( W_j[p_j(x)] )

    which composes per id, then weights, then pools (arXiv:1909.02107, sections 3 and 4). A plain table is TorchRec's,
    with K = 1. SUM pooling returns the sum. MEAN divides the sum by the number of ids of the bag, weighted or not. An
    empty bag has zeros.

    Shapes: the input is a ``KeyedJaggedTensor`` of F features × B bags with N ids in all. The output is (B, ΣD) fp32,
    with D columns per feature, in the order of ``tables``. A feature of several tables has the names
    ``<feature>@<table>``, as in TorchRec.

    The ``state_dict`` has ``embedding_bags.<table>.partition_<j>.weight`` (|P_j|, D_j) and
    ``embedding_bags.<table>.fingerprint`` for a compositional table, and TorchRec's ``embedding_bags.<table>.weight``
    for a plain one.

    Args:
        tables (list[EmbeddingBagConfig]): ``EmbeddingBagConfig`` and `CompositionalEmbeddingBagConfig`, in any mix.
        is_weighted (bool): whether to use the batch's weights w_x. Otherwise w_x = 1.
        device (torch.device | None): the device of the parameters, which may be ``torch.device("meta")``.

    Raises:
        ValueError: a table name occurs twice, or a weighted batch has not one weight per id.
        KeyError: the batch lacks a feature.
        IndexError: an id is outside [0, S), and the table's ``out_of_range`` is ``"error"``. On CUDA the id adds
            nothing, and a later call raises, at the latest `torchrec_qr.raise_pending`.
        TypeError: ids are not integers.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ebc = CompositionalEmbeddingBagCollection(tables=[
        ...     CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=6,
        ...         embedding_dim=4, partitions=QuotientRemainder(num_collisions=2),
        ...         init_fn=[rows_of(1., 2., 3.), rows_of(1., 10.)]),
        ...     EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=8)])
        >>> #         bag 0   bag 1
        >>> # user    [0, 5]  [4]
        >>> # country [249]   []
        >>> out = ebc(KeyedJaggedTensor(keys=["user", "country"], values=torch.tensor([0, 5, 4, 249]),
        ...                             lengths=torch.tensor([2, 1, 1, 0])))
        >>> out["user"]  # 1 · 1 + 3 · 10 for ids 0 and 5, and 2 · 10 for id 4
        tensor([[31., 31., 31., 31.],
                [20., 20., 20., 20.]], grad_fn=<...>)
        >>> out.keys(), out["country"][1].tolist()
        (['user', 'country'], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """

    qconfig = Qconfig()
    __jit_unused_properties__: ClassVar[list[str]] = ["device"]
    _in_graph: PooledValues

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
        described = served_tables(tables, self.embedding_bags)
        self._lookup = PooledLookup(described, self.embedding_bags, is_weighted)
        self._in_graph = pooled_values(described, is_weighted)
        self._lengths_per_embedding = [t.embedding_dim for t in tables for _ in t.feature_names]
        self._embedding_names = [name for names in get_embedding_names_by_table(tables) for name in names]
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up, composes and pools a batch: see the class.

        Args:
            features (KeyedJaggedTensor): F features × B bags.

        Returns:
            KeyedTensor: (B, ΣD) fp32.
        """
        features = maybe_td_to_kjt(features, None)
        values = self._from_graph(features) if torch.jit.is_scripting() else self._looked_up(features)
        return KeyedTensor(keys=self._embedding_names, length_per_key=self._lengths_per_embedding, values=values)

    @torch.jit.unused
    def _looked_up(self, features: KeyedJaggedTensor) -> Tensor:
        if isinstance(features, torch.fx.Proxy) or graph_lookup.is_exported():
            return self._from_graph(features)
        return self._lookup(self.embedding_bags, features)

    def _from_graph(self, features: KeyedJaggedTensor) -> Tensor:
        weights: list[list[Tensor]] = []
        class_maps: list[list[Tensor]] = []
        for table in self.embedding_bags.values():
            own, own_maps = table.parts()  # type: ignore[operator]
            weights.append(own)
            class_maps.append(own_maps)
        return graph_lookup.pooled_in_graph(features, weights, class_maps, self._in_graph)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CompositionalEmbeddingBagCollection":
        super()._apply(fn, recurse)
        # Rows may have another type now.
        self._in_graph = pooled_values(served_tables(self._tables, self.embedding_bags), self._is_weighted)
        return self

    def reset_parameters(self) -> None:
        """Draws every parameter anew by its config, except on the meta device."""
        init_tables(self.embedding_bags)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the configs, with S rows and D columns per table."""
        return self._tables

    def embedding_configs(self) -> list[EmbeddingBagConfig]:
        """Returns `embedding_bag_configs`. TorchRec's managed collision calls this method."""
        return self.embedding_bag_configs()

    def is_weighted(self) -> bool:
        """Returns whether the collection uses the batch's weights."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return device_of(self)


register_quantised(
    CompositionalEmbeddingBagCollection, QuantCompositionalEmbeddingBagCollection, QuantEmbeddingBagCollection
)
