"""The pooled collection of quantised rows, for serving."""

from typing import Any, cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.types import ModuleCopyMixin

from torchrec_qr.quant.conversion import checked_output_dtype, qconfig_of, quantised_configs, store_all
from torchrec_qr.quant.quantised_table import QuantisedTable, quantised_tables
from torchrec_qr.quant.table_groups import pooled_groups


class QuantCompositionalEmbeddingBagCollection(EmbeddingBagCollectionInterface, ModuleCopyMixin):
    """The quantised twin of `CompositionalEmbeddingBagCollection`, as TorchRec's quantised ``EmbeddingBagCollection``.

    Rows are dequantised, composed, weighted and pooled in fp32:

        out[b, f] = pool over ids x of bag (b, f) of  w_x · compose_j( scale_j · q_j[p_j(x)] + bias_j )

    Shapes, names and the order of outputs are those of the float collection. One call of an operator looks all tables
    up, plain ones too, except ``path`` and more than four partitions, which are PyTorch's. There are no gradients.

    The ``state_dict`` has the keys of the float collection; ``weight`` is stored rows, see
    ``torchrec_qr.quant.row_storage``.

    Args:
        tables (list[EmbeddingBagConfig]): the tables. ``data_type`` is INT8 or INT4, or a type of floats.
        is_weighted (bool): whether to use the batch's weights w_x. Otherwise w_x = 1.
        device (torch.device | None): the device of the rows, which are zeros until a state dict is loaded.
        output_dtype (torch.dtype): fp32, fp16 or bf16, to which the output is rounded.

    Raises:
        ValueError: a table name occurs twice, or a weighted batch has not one weight per id.
        NotImplementedError: a table has another ``data_type``, or the output another type; features of a batch differ
            in their numbers of bags.
        KeyError: the batch lacks a feature.
        IndexError: an id is outside [0, S), and the table's ``out_of_range`` is ``"error"``.
        TypeError: ids are not integers.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> from torchrec_qr.inference import quantize_embeddings
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ebc = CompositionalEmbeddingBagCollection(tables=[
        ...     CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=6,
        ...         embedding_dim=4, partitions=QuotientRemainder(num_collisions=2),
        ...         init_fn=[rows_of(1., 2., 3.), rows_of(1., 10.)])])
        >>> quantised = quantize_embeddings(ebc, torch.qint8)
        >>> quantised(KeyedJaggedTensor(keys=["user"], values=torch.tensor([0, 5, 4]),
        ...                             lengths=torch.tensor([2, 1])))["user"]
        tensor([[31., 31., 31., 31.],
                [20., 20., 20., 20.]])
        >>> {name: tuple(rows.shape) for name, rows in quantised.state_dict().items() if "weight" in name}
        {'embedding_bags.t_user.partition_0.weight': (3, 8), 'embedding_bags.t_user.partition_1.weight': (2, 8)}
    """

    # Whether a batch may be on another device, as that of a copy on one of several devices.
    batches_move: bool = False

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._tables, self._is_weighted = tables, is_weighted
        self._output_dtype = checked_output_dtype(output_dtype, tables)
        self.embedding_bags = quantised_tables(tables, device)
        self._groups = pooled_groups([cast(QuantisedTable, table) for table in self.embedding_bags.values()])
        self._embedding_names = [name for names in get_embedding_names_by_table(tables) for name in names]
        self._dims = [t.embedding_dim for t in tables for _ in t.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up, composes and pools a batch: see the class.

        Args:
            features (KeyedJaggedTensor): F features × B bags, in any order, and any others.

        Returns:
            KeyedTensor: (B, ΣD) of ``output_dtype``.
        """
        if self.batches_move:
            return self._looked_up(features.to(self.device)).to(features.device())
        return self._looked_up(features)

    def _looked_up(self, features: KeyedJaggedTensor) -> KeyedTensor:
        outputs = [group(features, self.embedding_bags, self._is_weighted) for group in self._groups]
        values = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if self._output_dtype != torch.float32:
            values = values.to(self._output_dtype)
        return KeyedTensor(keys=self._embedding_names, length_per_key=self._dims, values=values)

    @classmethod
    def from_float(
        cls, module: nn.Module, use_precomputed_fake_quant: bool = False
    ) -> "QuantCompositionalEmbeddingBagCollection":
        """Returns the quantised twin of a `CompositionalEmbeddingBagCollection`, on its device.

        Args:
            module (nn.Module): the float collection, whose ``qconfig`` has the types of rows and of the output.
            use_precomputed_fake_quant (bool): of torch's interface, not used.

        Raises:
            ValueError: it has no ``qconfig``, or a value that rows cannot have.
            TypeError: its tables are not those of a `CompositionalEmbeddingBagCollection`.
            NotImplementedError: rows or outputs cannot have the types.
        """
        collection, qconfig = cast(Any, module), qconfig_of(module)
        configs = quantised_configs(collection.embedding_bag_configs(), qconfig)
        quantised = cls(configs, collection.is_weighted(), collection.device, qconfig.activation().dtype)
        store_all(quantised.embedding_bags, collection.embedding_bags)
        return quantised

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the configs, with S rows and D columns per table, and the ``data_type`` of stored rows."""
        return self._tables

    def is_weighted(self) -> bool:
        """Returns whether the collection uses the batch's weights."""
        return self._is_weighted

    def output_dtype(self) -> torch.dtype:
        """Returns the type of the output."""
        return self._output_dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return next(cast(QuantisedTable, table).device for table in self.embedding_bags.values())
