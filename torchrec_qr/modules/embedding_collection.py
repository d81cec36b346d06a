"""The collection without pooling: TorchRec's ``EmbeddingCollection`` with plain and compositional tables."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface, get_embedding_names_by_table
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_qr.configs import common_dim
from torchrec_qr.modules import graph_lookup
from torchrec_qr.modules.collection_lookup import SequenceLookup
from torchrec_qr.modules.guarded_collection import GuardedCollection
from torchrec_qr.modules.table import PlainEmbedding, build_tables, device_of, init_tables
from torchrec_qr.modules.tables_as_values import SequenceValues, sequence_values, served_tables
from torchrec_qr.quant import QuantCompositionalEmbeddingCollection
from torchrec_qr.quant.qconfig import Qconfig
from torchrec_qr.quant.torchrec_entries import register_quantised


class CompositionalEmbeddingCollection(GuardedCollection, EmbeddingCollectionInterface):
    """Sequences of embeddings of plain and compositional tables: a drop-in for TorchRec's ``EmbeddingCollection``.

    For feature f of table t, and x_n the n-th id of f in the batch, the output maps f to a ``JaggedTensor`` with

        values[n] = compose_j( W_j[p_j(x_n)] )

    (arXiv:1909.02107, sections 3 and 4). A plain table is TorchRec's, with K = 1.

    Shapes: the input is a ``KeyedJaggedTensor`` of F features × B bags. The output per feature is (N, D) fp32 with the
    feature's lengths (B,). A feature of several tables has the names ``<feature>@<table>``. Tables may differ in D.

    The ``state_dict`` has ``embeddings.<table>.partition_<j>.weight`` (|P_j|, D_j) and
    ``embeddings.<table>.fingerprint`` for a compositional table, and ``embeddings.<table>.weight`` for a plain one.

    Args:
        tables (list[EmbeddingConfig]): ``EmbeddingConfig`` and `CompositionalEmbeddingConfig`, in any mix.
        device (torch.device | None): the device of the parameters, which may be ``torch.device("meta")``.
        need_indices (bool): whether ``weights()`` of each output has its ids, as in TorchRec.
        use_gather_select (bool): whether the sharded collection gathers the embeddings of ids that ``use_index_dedup``
            looked up once. Otherwise it selects them by index. Values are the same.
        use_gather_select_per_sharding (dict[str, bool] | None): the same for each sharding type (TorchRec 1.8 and 1.9).

    Raises:
        ValueError: a table name occurs twice.
        KeyError: the batch lacks a feature.
        IndexError: an id is outside [0, S), and the table's ``out_of_range`` is ``"error"``. On CUDA the id adds
            nothing, and a later call raises, at the latest `torchrec_qr.raise_pending`.
        TypeError: ids are not integers.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ec = CompositionalEmbeddingCollection(tables=[
        ...     CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=6, embedding_dim=4,
        ...         partitions=QuotientRemainder(num_collisions=2), init_fn=[rows_of(1., 2., 3.), rows_of(1., 10.)])])
        >>> out = ec(KeyedJaggedTensor(keys=["item"], values=torch.tensor([0, 5, 4]), lengths=torch.tensor([2, 1])))
        >>> out["item"].values()  # 1 · 1, 3 · 10 and 2 · 10
        tensor([[ 1.,  1.,  1.,  1.],
                [30., 30., 30., 30.],
                [20., 20., 20., 20.]], grad_fn=<...>)
        >>> out["item"].lengths()
        tensor([2, 1])
    """

    qconfig = Qconfig()
    __jit_unused_properties__: ClassVar[list[str]] = ["device"]
    _in_graph: SequenceValues

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        use_gather_select: bool = False,
        use_gather_select_per_sharding: dict[str, bool] | None = None,
    ) -> None:
        super().__init__()
        self._embedding_configs = tables
        self._need_indices = need_indices
        self._use_gather_select = use_gather_select
        self._use_gather_select_per_sharding = use_gather_select_per_sharding
        self._use_sorted_select = False
        self.embeddings = build_tables(tables, PlainEmbedding, device)
        self._embedding_names_by_table = get_embedding_names_by_table(tables)
        self._outputs = [name for names in self._embedding_names_by_table for name in names]
        described = served_tables(tables, self.embeddings)
        self._lookup = SequenceLookup(described, self.embeddings, self._outputs, need_indices)
        self._in_graph = sequence_values(described, self._outputs, need_indices)
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looks up and composes a batch: see the class.

        Args:
            features (KeyedJaggedTensor): F features × B bags.

        Returns:
            dict[str, JaggedTensor]: (N, D) fp32 for each feature.
        """
        features = maybe_td_to_kjt(features, None)
        if torch.jit.is_scripting():
            return self._from_graph(features)
        else:
            return self._looked_up(features)

    @torch.jit.unused
    def _looked_up(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        if isinstance(features, torch.fx.Proxy) or graph_lookup.is_exported():
            return self._from_graph(features)
        return self._lookup(self.embeddings, features)

    def _from_graph(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        weights: list[list[Tensor]] = []
        class_maps: list[list[Tensor]] = []
        for table in self.embeddings.values():
            own, own_maps = table.parts()  # type: ignore[operator]
            weights.append(own)
            class_maps.append(own_maps)
        return graph_lookup.sequences_in_graph(features, weights, class_maps, self._in_graph)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CompositionalEmbeddingCollection":
        super()._apply(fn, recurse)
        # Rows may have another type now.
        described = served_tables(self._embedding_configs, self.embeddings)
        self._in_graph = sequence_values(described, self._outputs, self._need_indices)
        return self

    def reset_parameters(self) -> None:
        """Draws every parameter anew by its config, except on the meta device."""
        init_tables(self.embeddings)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Returns the configs, with S rows and D columns per table."""
        return self._embedding_configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """Returns the names of the outputs, per table."""
        return self._embedding_names_by_table

    def embedding_dim(self) -> int:
        """Returns D.

        Raises:
            ValueError: the tables differ in D.
        """
        return common_dim(self._embedding_configs)

    def need_indices(self) -> bool:
        """Returns whether each output has its ids."""
        return self._need_indices

    def use_gather_select(self) -> bool:
        """Returns whether the sharded collection gathers embeddings."""
        return self._use_gather_select

    def use_gather_select_per_sharding(self) -> dict[str, bool] | None:
        """Returns the same for each sharding type. An entry has precedence over `use_gather_select`."""
        return self._use_gather_select_per_sharding

    def use_sorted_select(self) -> bool:
        """Returns whether the sharded collection selects embeddings by TorchRec 1.9's sorted select."""
        return self._use_sorted_select

    def set_use_sorted_select(self, use_sorted_select: bool) -> None:
        """Sets `use_sorted_select`, before the collection is sharded.

        Args:
            use_sorted_select (bool): the value.
        """
        self._use_sorted_select = use_sorted_select

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return device_of(self)


register_quantised(CompositionalEmbeddingCollection, QuantCompositionalEmbeddingCollection, QuantEmbeddingCollection)
