"""The unpooled collection: TorchRec's ``EmbeddingCollection``, whose tables may be compositional."""

import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_qr.ids import bags_of
from torchrec_qr.modules.table import PlainEmbedding, build_tables, device_of, embed, id_spaces, init_tables


class CompositionalEmbeddingCollection(EmbeddingCollectionInterface):
    """Sequences of embeddings of plain and compositional tables: a drop-in for TorchRec's ``EmbeddingCollection``.

    For feature f of table t, and x_n the n-th id of f in the batch, the output maps f to a ``JaggedTensor`` with

        values[n] = compose_j( W_j[p_j(x_n)] )

    (arXiv:1909.02107, sections 3 and 4; TorchRec's ``EmbeddingCollection`` where t is plain).

    Shapes: input ``KeyedJaggedTensor`` of F features × B bags; output per feature (N, D) fp32 with the feature's own
    lengths (B,). A feature that several tables share is called ``<feature>@<table>``. Tables may differ in D.

    ``state_dict`` keys: ``embeddings.<table>.partition_<j>.weight`` (|P_j|, D_j) and
    ``embeddings.<table>.fingerprint`` of a compositional table; ``embeddings.<table>.weight`` of a plain one.

    Args:
        tables: ``EmbeddingConfig`` and `CompositionalEmbeddingConfig`, in any mix.
        device: of the parameters; ``torch.device("meta")`` for later materialisation.
        need_indices: whether each output also carries its ids, as TorchRec does, in ``weights()``.

    Raises:
        ValueError: a table name that occurs twice.
        KeyError: the batch lacks a feature.
        IndexError: an id outside [0, S), unless the table's ``out_of_range`` says otherwise. On CUDA nothing waits for
            the device: the id adds nothing, and a later call raises, at the latest `torchrec_qr.raise_pending`.
        TypeError: ids that are not integers.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
        >>> ec = CompositionalEmbeddingCollection(tables=[
        ...     CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=1000,
        ...         embedding_dim=8, partitions=QuotientRemainder(num_collisions=10))])
        >>> out = ec(KeyedJaggedTensor(keys=["item"], values=torch.tensor([7, 7, 999]), lengths=torch.tensor([2, 1])))
        >>> tuple(out["item"].values().shape), out["item"].lengths().tolist()
        ((3, 8), [2, 1])
        >>> bool((out["item"].values()[0] == out["item"].values()[1]).all())
        True
    """

    def __init__(
        self, tables: list[EmbeddingConfig], device: torch.device | None = None, need_indices: bool = False
    ) -> None:
        super().__init__()
        self._embedding_configs = tables
        self._need_indices = need_indices
        self.embeddings = build_tables(tables, PlainEmbedding, device)
        self._id_spaces = id_spaces(tables)
        self._embedding_names_by_table = get_embedding_names_by_table(tables)
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looks up and composes a batch; see the class."""
        bags = bags_of(maybe_td_to_kjt(features, None), self._id_spaces, False)
        names = [name for names in self._embedding_names_by_table for name in names]
        return {
            name: JaggedTensor(
                values=embed(self.embeddings[space.table], bags[i].ids),
                lengths=bags[i].lengths,
                weights=bags[i].ids if self._need_indices else None,
            )
            for i, (name, space) in enumerate(zip(names, self._id_spaces, strict=True))
        }

    def reset_parameters(self) -> None:
        """Draws every parameter anew by its config; parameters on the meta device stay as they are."""
        init_tables(self.embeddings)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Returns the logical configs: S rows and D columns per table, as the model sees it."""
        return self._embedding_configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """Returns the names of the outputs, per table."""
        return self._embedding_names_by_table

    def embedding_dim(self) -> int:
        """Returns D.

        Raises:
            ValueError: the tables differ in D.
        """
        dims = {t.name: t.embedding_dim for t in self._embedding_configs}
        if len(set(dims.values())) != 1:
            raise ValueError(f"embedding_dim: the tables have dimensions {dims}; allowed: one dimension for all")
        return next(iter(dims.values()))

    def need_indices(self) -> bool:
        """Returns whether each output also carries its ids."""
        return self._need_indices

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return device_of(self)


# Recorded as a call by `torch.fx`: it looks at the values of ids.
torch.fx.wrap("bags_of")
