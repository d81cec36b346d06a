"""An existing model with TorchRec's collections, compressed in place."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_qr.compression.compression_report import CompressedTable, CompressionReport, compressed_table
from torchrec_qr.compression.compression_rules import CompressionRules, newly_compositional
from torchrec_qr.compression.fit import Fit, fitted
from torchrec_qr.compression.found_collections import FoundCollection, collections_in
from torchrec_qr.compression.replaceable import References
from torchrec_qr.compression.replacement import check_kept_optimizer, replacement_of
from torchrec_qr.configs import Operation
from torchrec_qr.partitions import PartitionSpec


def compress_(
    model: nn.Module,
    partitions: PartitionSpec | None = None,
    *,
    operation: Operation = "mult",
    min_rows: int = 2_000,
    tables: Mapping[str, PartitionSpec | None] | None = None,
    budget: int | None = None,
    fit: bool = False,
    frequencies: Mapping[str, Tensor] | None = None,
) -> CompressionReport:
    """Replaces the embedding collections of a model by ours, in place, and stores their large tables as partitions.

    Every ``EmbeddingBagCollection`` and ``EmbeddingCollection`` in the model becomes a
    `CompositionalEmbeddingBagCollection` or a `CompositionalEmbeddingCollection` under the same name. A table that
    becomes compositional has K partitions W_j (|P_j|, D_j) in place of S rows of D columns, and the embedding
    compose_j(W_j[p_j(x)]) of id x (arXiv:1909.02107, section 3). A table that stays plain has the same parameter as
    before. Names, order, features, bounds of initial values, data types, pooling, devices, training mode and optimizers
    in backward stay. Collections of ours in the model stay as they are.

    The model may be on the meta device, and must not be sharded. Nothing is changed if an error is raised. Optimizers
    that step the parameters of compressed tables must be built anew.

    Args:
        model (nn.Module): the model, which contains the collections.
        partitions (PartitionSpec | None): of all tables of at least ``min_rows`` rows that ``tables`` does not name.
            Default: these tables stay plain, or ``budget`` chooses.
        operation (str): composes the rows of every compressed table: ``"mult"``, ``"add"``, ``"concat"`` or ``"path"``.
        min_rows (int): tables of fewer rows stay plain, unless ``tables`` names them.
        tables (Mapping[str, PartitionSpec | None] | None): the partitions of single tables by name. None keeps one
            plain.
        budget (int | None): the most bytes that the tables of the model may store, in place of ``partitions``. A table
            of S rows gets min(S, C) of them, by `QuotientRemainder`, and C is the greatest number that fits, to a
            thousandth. ``torchrec-qr plan --fit`` chooses likewise. Optimizer state does not count.
        fit (bool): whether the partitions start near the rows E of the full table: they minimise
            Σ_x w_x ‖E[x] - compose_j(W_j[p_j(x)])‖², exactly under ``add`` and ``concat``, and by alternating least
            squares under ``mult``. Default: they are drawn as those of a new table.
        frequencies (Mapping[str, Tensor] | None): w (S,) of single tables by name, such as how often each id occurs.
            Default: w_x = 1.

    Returns:
        CompressionReport: the rows, stored rows, bytes and error of each table. ``print`` shows it as a table.

    Raises:
        TypeError: ``model`` is itself a collection, or a value has another type than allowed.
        ValueError: a name is unknown, a rule does not shrink a table, the budget is too small, or the model has
            something that would be lost: a sharded, fused, quantised or subclassed collection, hooks, a weight that
            another module shares, or a frozen table that would become random.
        NotImplementedError: a compositional table has no meaning for a field of a config, or ``path`` is to be fitted.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec_qr import QuotientRemainder, compress_
        >>> model = DLRM(EmbeddingBagCollection(tables=[
        ...     EmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=100_000, embedding_dim=16),
        ...     EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=16)]),
        ...     dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
        >>> print(compress_(model, QuotientRemainder(num_collisions=100)))
        table         rows  stored rows    MiB  stored MiB  ratio  partitions
        t_user     100,000        1,100  6.104       0.067  90.91  mult of 1,000 + 100
        t_country      250          250  0.015       0.015   1.00  plain
        total      100,250        1,350  6.119       0.082  74.26
    """
    rules = CompressionRules(partitions, operation, min_rows, tables or {}, budget, fit)
    found = collections_in(model)
    chosen = list(zip(found, rules.chosen(found), strict=True))
    _check(model, chosen, fit, frequencies or {})
    lines: list[CompressedTable] = []
    replaced: list[tuple[FoundCollection, nn.Module]] = []
    for collection, configs in chosen:
        fits = _fits(collection, configs, frequencies or {}) if fit else {}
        for before, after in zip(collection.configs, configs, strict=True):
            lines.append(compressed_table(collection.path, before, after, fits.get(after.name)))
        if not collection.is_ours:
            replaced.append((collection, replacement_of(collection, configs, fits)))
    # Replace at the end, so that an error leaves the model as it was.
    for collection, new in replaced:
        for parent, name in collection.references:
            parent._modules[name] = new
    return CompressionReport(lines, budget)


def _check(
    model: nn.Module,
    chosen: Sequence[tuple[FoundCollection, Sequence[BaseEmbeddingConfig]]],
    fit: bool,
    frequencies: Mapping[str, Tensor],
) -> None:
    """Raises an error if a collection cannot be replaced, or there are frequencies of a table that is not fitted."""
    references, fitted_tables = References(model), set()
    for collection, configs in chosen:
        if collection.is_ours:
            continue
        compressed = [config.name for config in newly_compositional(collection, configs)]
        references.check(collection, compressed)
        for name in compressed:
            check_kept_optimizer(collection, name, fit)
            fitted_tables |= {name} if fit else set()
    if others := sorted(set(frequencies) - fitted_tables):
        raise ValueError(
            f"compress_: frequencies has {others}; allowed: tables that are fitted, which are "
            f"{', '.join(sorted(fitted_tables)) or 'none'}"
        )


def _fits(
    collection: FoundCollection, configs: Sequence[BaseEmbeddingConfig], frequencies: Mapping[str, Tensor]
) -> dict[str, Fit]:
    """Returns the fits of the tables of a collection that become compositional."""
    return {
        config.name: fitted(config, collection.weight(config.name).detach(), frequencies.get(config.name))
        for config in newly_compositional(collection, configs)
    }
