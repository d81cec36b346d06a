"""The collection without pooling of quantised rows, for serving."""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.types import ModuleCopyMixin

from torchrec_qr.configs import common_dim
from torchrec_qr.modules.served_batch import served_sequences
from torchrec_qr.quant.conversion import checked_output_dtype, qconfig_of, quantised_configs, store_all
from torchrec_qr.quant.quantised_table import Held, QuantisedTable, quantised_tables
from torchrec_qr.quant.table_groups import ServedNumbers, ids_of


class _Output(NamedTuple):
    table: str
    feature: str
    name: str


class QuantCompositionalEmbeddingCollection(EmbeddingCollectionInterface, ModuleCopyMixin):
    """The quantised twin of `CompositionalEmbeddingCollection`, as TorchRec's quantised ``EmbeddingCollection``.

    For feature f of table t, and x_n the n-th id of f in the batch, the output maps f to a ``JaggedTensor`` with

        values[n] = compose_j( scale_j · q_j[p_j(x_n)] + bias_j )

    in fp32, rounded to ``output_dtype``. Shapes and names are those of the float collection. See
    `QuantCompositionalEmbeddingBagCollection` for the ``state_dict`` and for what looks tables up.

    Args:
        tables (list[EmbeddingConfig]): the tables. ``data_type`` is INT8 or INT4, or a type of floats.
        device (torch.device | None): the device of the rows, which are zeros until a state dict is loaded.
        need_indices (bool): whether ``weights()`` of each output has its ids, as in TorchRec.
        output_dtype (torch.dtype): fp32, fp16 or bf16, to which the output is rounded.

    Raises:
        ValueError, NotImplementedError, KeyError, IndexError, TypeError: see the pooled collection.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
        >>> from torchrec_qr.inference import quantize_embeddings
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ec = CompositionalEmbeddingCollection(tables=[
        ...     CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=6, embedding_dim=4,
        ...         partitions=QuotientRemainder(num_collisions=2), init_fn=[rows_of(1., 2., 3.), rows_of(1., 10.)])])
        >>> quantised = quantize_embeddings(ec, torch.quint4x2)
        >>> quantised(KeyedJaggedTensor(keys=["item"], values=torch.tensor([5, 4]),
        ...                             lengths=torch.tensor([1, 1])))["item"].values()
        tensor([[30., 30., 30., 30.],
                [20., 20., 20., 20.]])
    """

    # Whether a batch may be on another device, as that of a copy on one of several devices.
    batches_move: bool = False

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._embedding_configs, self._need_indices = tables, need_indices
        self._output_dtype = checked_output_dtype(output_dtype, tables)
        self.embeddings = quantised_tables(tables, device)
        self._embedding_names_by_table = get_embedding_names_by_table(tables)
        self._outputs = [
            _Output(config.name, feature, output)
            for config, outputs in zip(tables, self._embedding_names_by_table, strict=True)
            for feature, output in zip(config.feature_names, outputs, strict=True)
        ]
        # The operator composes one feature a call.
        self._served = [of for of in self._outputs if self._table(of).is_served]
        of_served = [self._table(of) for of in self._served]
        self._rows = [Held(table.rows()) for table in of_served]
        self._maps = [Held(table.maps()) for table in of_served]
        self._indices = [(table.out_of_range, table.config.num_embeddings) for table in of_served if need_indices]
        self._numbers = nn.ModuleList(
            ServedNumbers([table.served([of.feature])]) for of, table in zip(self._served, of_served, strict=True)
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looks up and composes a batch: see the class.

        Args:
            features (KeyedJaggedTensor): F features × B bags, in any order, and any others.

        Returns:
            dict[str, JaggedTensor]: (N, D) of ``output_dtype`` for each feature.
        """
        if self.batches_move:
            found = self._looked_up(features.to(self.device))
            return {of.name: found[of.name].to(features.device()) for of in self._outputs}
        return self._looked_up(features)

    def _looked_up(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        found = self._by_operators(features) if self._served else {}
        if len(self._served) == len(self._outputs) and self._output_dtype == torch.float32:
            return found
        served = {of.name for of in self._served}
        return {
            of.name: self._rounded(found[of.name] if of.name in served else self._by_pytorch(of, features))
            for of in self._outputs
        }

    def _by_operators(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        numbers = [cast(ServedNumbers, own) for own in self._numbers]
        return served_sequences(
            features,
            [held.tensors() for held in self._rows],
            [held.tensors() for held in self._maps],
            [own.numbers for own in numbers],
            [own.names for own in numbers],
            [of.name for of in self._served],
            [own.columns for own in numbers],
            self._indices,
        )

    def _by_pytorch(self, of: _Output, features: KeyedJaggedTensor) -> JaggedTensor:
        table = self._table(of)
        given = ids_of(table, features, of.feature)
        ids = table.bounded(given.values(), of.feature)
        weights = ids if self._need_indices else None
        return JaggedTensor(table.composed(ids), lengths=given.lengths(), weights=weights)

    def _rounded(self, output: JaggedTensor) -> JaggedTensor:
        weights = output.weights() if self._need_indices else None
        return JaggedTensor(output.values().to(self._output_dtype), lengths=output.lengths(), weights=weights)

    def _table(self, of: _Output) -> QuantisedTable:
        return cast(QuantisedTable, self.embeddings[of.table])

    @classmethod
    def from_float(
        cls, module: nn.Module, use_precomputed_fake_quant: bool = False
    ) -> "QuantCompositionalEmbeddingCollection":
        """Returns the quantised twin of a `CompositionalEmbeddingCollection`, on its device.

        Args:
            module (nn.Module): the float collection, whose ``qconfig`` has the types of rows and of the output.
            use_precomputed_fake_quant (bool): of torch's interface, not used.

        Raises:
            ValueError: it has no ``qconfig``, or a value that rows cannot have.
            NotImplementedError: rows or outputs cannot have the types.
            TypeError: its tables are not those of a `CompositionalEmbeddingCollection`.
        """
        collection, qconfig = cast(Any, module), qconfig_of(module)
        configs = quantised_configs(collection.embedding_configs(), qconfig)
        quantised = cls(configs, collection.device, collection.need_indices(), qconfig.activation().dtype)
        store_all(quantised.embeddings, collection.embeddings)
        return quantised

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Returns the configs, with S rows and D columns per table, and the ``data_type`` of stored rows."""
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

    def output_dtype(self) -> torch.dtype:
        """Returns the type of the output."""
        return self._output_dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return next(cast(QuantisedTable, table).device for table in self.embeddings.values())


torch.fx.wrap("served_sequences")
