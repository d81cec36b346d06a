"""Configs of compositional tables: TorchRec's configs with partitions and the operation that composes their rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from torchrec_qr.id_hash import MAX_HASH_SEED, IdHash
from torchrec_qr.ids import OUT_OF_RANGE_POLICIES, OutOfRange
from torchrec_qr.no_full_table import NoFullTable
from torchrec_qr.partitions import BoundPartitions, PartitionSpec

Operation = Literal["mult", "add", "concat", "path"]
PathActivation = Literal["relu", "tanh"]
Init = Literal["unit", "identity", "balanced"]
InitFn = Callable[[Tensor], Tensor | None]

# FBGEMM's vector width, and its widest row with right results. It returns zeros for wider ones (torchrec#3673).
DIM_MULTIPLE = 4
MAX_DIM = 1024

DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16}

POOLINGS = (PoolingType.SUM, PoolingType.MEAN)

# TorchRec's fields that have no meaning for K partitions.
_UNSUPPORTED_FIELDS = (
    "num_embeddings_post_pruning",
    "need_pos",
    "input_dim",
    "total_num_buckets",
    "use_virtual_table",
    "virtual_table_eviction_policy",
    "enable_embedding_update",
    "stash_weights",
)


class PartitionShape(NamedTuple):
    """The shape and the type of one partition as a tensor."""

    rows: int
    columns: int
    dtype: torch.dtype


@dataclass
class _Compositional(BaseEmbeddingConfig):
    """The fields that both configs add. `CompositionalEmbeddingBagConfig` documents them."""

    # Give a default, because TorchRec's fields before it have one. `_check_partitions` refuses None.
    partitions: PartitionSpec = None  # type: ignore[assignment]
    operation: Operation = "mult"
    partition_dims: Sequence[int] | None = None
    path_hidden: int | None = None
    path_activation: PathActivation = "relu"
    init: Init = "unit"
    out_of_range: OutOfRange = "error"
    id_hash: IdHash | None = None
    hash_seed: int = 0
    # Widen TorchRec's type, one function, because partitions may have one each.
    init_fn: InitFn | Sequence[InitFn] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # Do not call TorchRec's __post_init__, because it sets an init_fn of full rows. None means `init` here.
        if self.given_init_fn is None:
            self.init_fn = NoFullTable(self.name)
        self._check_choices()
        self._check_id_hash()
        self._check_partitions()
        self._check_dims()
        self._check_init()

    @property
    def bound_partitions(self) -> BoundPartitions:
        """The ``partitions`` of this table's S ids, which compute the rows of ids.

        Raises:
            TypeError, ValueError: see ``PartitionSpec.bind``. The message has the table's name.
        """
        spec, bound = self.__dict__.get("_bound", (None, None))
        # Bind again if a field has changed, because a config is not frozen.
        if bound is None or spec is not self.partitions or bound.num_embeddings != self.num_embeddings:
            try:
                bound = self.partitions.bind(self.num_embeddings)
            except (TypeError, ValueError) as error:
                raise type(error)(f"table {self.name!r}: {error}") from None
            self.__dict__["_bound"] = self.partitions, bound
        return bound

    @property
    def given_init_fn(self) -> InitFn | Sequence[InitFn] | None:
        """``init_fn``, or None if partitions start by ``init``."""
        return None if isinstance(self.init_fn, NoFullTable) else self.init_fn

    @property
    def num_partitions(self) -> int:
        """K."""
        return self.bound_partitions.num_partitions

    @property
    def base_partition(self) -> int:
        """The number of the base partition: the main one, or 0 under ``path``."""
        return 0 if self.operation == "path" else self.bound_partitions.main

    @property
    def id_policy(self) -> OutOfRange:
        """The policy for given ids: ``out_of_range``, or ``"unchecked"`` if ids are hashed, because any id is valid."""
        return self.out_of_range if self.id_hash is None else "unchecked"

    @property
    def seed_of_hash(self) -> int | None:
        """``hash_seed``, or None if ids are not hashed."""
        return None if self.id_hash is None else self.hash_seed

    @property
    def partition_columns(self) -> tuple[int, ...]:
        """The stored columns D_j of each partition. A row of a path's later partitions is a flattened MLP."""
        if self.operation == "concat":
            return tuple(self.partition_dims or _even_dims(self.embedding_dim, self.num_partitions))
        if self.operation == "path":
            return (self.embedding_dim, *[self._mlp_columns] * (self.num_partitions - 1))
        return (self.embedding_dim,) * self.num_partitions

    @property
    def partition_data_types(self) -> tuple[DataType, ...]:
        """The storage type of each partition.

        It is ``data_type``. Under ``mult`` (rows near 1) and ``path`` (MLPs) all partitions except the base are fp32,
        because an update in low precision may round to nothing.
        """
        return tuple(
            DataType.FP32 if self.operation in ("mult", "path") and j != self.base_partition else self.data_type
            for j in range(self.num_partitions)
        )

    @property
    def partition_shapes(self) -> list[PartitionShape]:
        """The shape and the type of each partition."""
        dtypes = [DTYPES[data_type] for data_type in self.partition_data_types]
        sizes = zip(self.bound_partitions.sizes, self.partition_columns, dtypes, strict=True)
        return [PartitionShape(*size) for size in sizes]

    @property
    def physical_rows(self) -> int:
        """R."""
        return self.bound_partitions.num_rows

    @property
    def num_parameters(self) -> int:
        """The number of stored scalars, Σ_j |P_j| · D_j."""
        return sum(rows * columns for rows, columns, _ in self.partition_shapes)

    @property
    def _mlp_columns(self) -> int:
        d, h = self.embedding_dim, self.path_hidden
        return d * d + d if h is None else h * d + h + d * h + d

    def _fail(self, field: str, given: object, allowed: str) -> None:
        raise ValueError(f"table {self.name!r}: {field}={given!r}; allowed: {allowed}")

    def _check_choices(self) -> None:
        for field, allowed in (
            ("operation", get_args(Operation)),
            ("path_activation", get_args(PathActivation)),
            ("init", get_args(Init)),
            ("out_of_range", OUT_OF_RANGE_POLICIES),
            ("id_hash", (None, *get_args(IdHash))),
            ("data_type", tuple(DTYPES)),
        ):
            check_allowed(self, field, allowed)
        if isinstance(self, EmbeddingBagConfig):
            check_allowed(self, "pooling", POOLINGS)
        if len(set(self.feature_names)) < len(self.feature_names):
            self._fail("feature_names", self.feature_names, "each feature once")
        for field in _UNSUPPORTED_FIELDS:
            if getattr(self, field):
                raise NotImplementedError(
                    f"table {self.name!r}: {field}={getattr(self, field)!r} is not supported by a compositional table"
                )

    def _check_id_hash(self) -> None:
        seed = self.hash_seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_HASH_SEED:
            self._fail("hash_seed", seed, f"an int between 0 and {MAX_HASH_SEED} (2^31 - 1)")
        if self.id_hash is None and seed != 0:
            self._fail("hash_seed", seed, "0, except beside id_hash")
        if self.id_hash is not None and self.out_of_range != "error":
            self._fail(
                "out_of_range",
                self.out_of_range,
                f"the default, 'error', beside id_hash={self.id_hash!r}, under which no id is out of range",
            )

    def _check_partitions(self) -> None:
        if not isinstance(self.partitions, PartitionSpec):
            raise TypeError(
                f"table {self.name!r}: partitions={self.partitions!r}; allowed: a spec, such as "
                "QuotientRemainder(num_collisions=4)"
            )
        _ = self.bound_partitions

    def _check_dims(self) -> None:
        k, d, dims = self.num_partitions, self.embedding_dim, self.partition_dims
        # Allow K times the columns under concat, because the limit holds for a stored row.
        largest = MAX_DIM * k if dims is None and self.operation == "concat" else MAX_DIM
        allowed = f"positive multiples of {DIM_MULTIPLE} up to {largest} (FBGEMM's limits)"
        if dims is None:
            if not _is_dim(d, largest):
                self._fail("embedding_dim", d, allowed)
            if self.operation == "concat" and d < DIM_MULTIPLE * k:
                self._fail(
                    "embedding_dim", d, f"at least {DIM_MULTIPLE * k}, {DIM_MULTIPLE} for each of {k} partitions"
                )
        else:
            if self.operation != "concat":
                self._fail("partition_dims", dims, "None, except under operation='concat'")
            if not isinstance(dims, Sequence) or len(dims) != k:
                self._fail("partition_dims", dims, f"one for each of the {k} partitions")
            if not all(_is_dim(dim) for dim in dims):
                self._fail("partition_dims", dims, allowed)
            if sum(dims) != d:
                self._fail("partition_dims", dims, f"a sum equal to embedding_dim={d}")
        if self.path_hidden is not None:
            if self.operation != "path":
                self._fail("path_hidden", self.path_hidden, "None, except under operation='path'")
            if not isinstance(self.path_hidden, int) or self.path_hidden < 1:
                self._fail("path_hidden", self.path_hidden, "None (a linear map) or a width of at least 1")

    def _check_init(self) -> None:
        if self.get_weight_init_max() <= self.get_weight_init_min():
            self._fail("weight_init_max", self.weight_init_max, f"above weight_init_min={self.get_weight_init_min()}")
        if self.init == "balanced" and self.get_weight_init_max() != -self.get_weight_init_min():
            self._fail("weight_init_max", self.weight_init_max, "-weight_init_min, under init='balanced'")
        if isinstance(self.init_fn, Sequence) and len(self.init_fn) != self.num_partitions:
            self._fail(
                "init_fn", self.init_fn, f"one function, or one for each of the {self.num_partitions} partitions"
            )


@dataclass
class CompositionalEmbeddingBagConfig(_Compositional, EmbeddingBagConfig):
    """A pooled table of S logical rows, stored as K partitions. It extends TorchRec's ``EmbeddingBagConfig``.

    The embedding of id x is compose_j(W_j[p_j(x)]): see `CompositionalEmbeddingBagCollection`. ``num_embeddings`` is S
    and ``embedding_dim`` is D, both logical (arXiv:1909.02107, sections 3 and 4).

    Args:
        partitions (PartitionSpec): the row of each partition that an id selects, such as ``QuotientRemainder``. The
            config binds the spec to ``num_embeddings`` ids.
        operation (str): ``"mult"`` and ``"add"`` act elementwise on rows of D columns. ``"concat"`` joins rows of D_j
            columns, ΣD_j = D. ``"path"`` (section 4.1) passes the row of partition 0 through one MLP per further
            partition, where each class has its own MLP.
        partition_dims (Sequence[int] | None): D_j under ``"concat"``, each a multiple of 4. Default: nearly equal ones.
        path_hidden (int | None): the width of the MLPs' hidden layer. None makes each MLP one affine map.
        path_activation (str): the activation of the hidden layer, ``"relu"`` or ``"tanh"``.
        init (str): ``"unit"``: the main partition starts as the full table, U(-1/√S, 1/√S), and the others of
            ``"mult"`` with variance 1, so that ids that share a row start apart. ``"identity"``: the others start at
            the operation's identity plus little noise. ``"balanced"``: all partitions have one distribution. In all
            modes the composed embedding has the full table's variance, 1/(3S). ``torchrec_qr.init`` has the formulas.
        init_fn (InitFn | Sequence[InitFn] | None): fills a partition in place, instead of ``init``: one function, or
            one for each partition.
        out_of_range (str): the policy for ids outside [0, S): ``"error"`` (IndexError), ``"clamp"``, ``"wrap"`` or
            ``"unchecked"``.
        id_hash (str | None): ``"splitmix64"`` makes every int32 and int64 a valid id, negative ones too. The lookup
            hashes each id into [0, S), and the partitions get the hashed id: see ``torchrec_qr.id_hash``. About n²/2S
            pairs of n live ids then share an embedding. None: ids lie in [0, S).
        hash_seed (int): the seed of the hash, between 0 and 2^31 - 1.

    All other fields are TorchRec's. ``data_type`` is FP32, FP16 or BF16. Under ``mult`` and ``path`` it is the type of
    the base partition, and the others are FP32. ``weight_init_min`` and ``weight_init_max`` replace ∓1/√S.

    Raises:
        ValueError: a field has a wrong value. The message has the table, the field, the value and what is allowed.
        TypeError: ``partitions`` is no spec, or a value of the spec has another type than its field.
        NotImplementedError: a field of TorchRec's has no meaning for a compositional table.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingBagConfig(
        ...     name="t_user", feature_names=["user"], num_embeddings=1_000_000, embedding_dim=64,
        ...     partitions=QuotientRemainder(num_collisions=4))
        >>> config.physical_rows, config.num_parameters
        (250004, 16000256)

        Any 64-bit id, hashed into 2^40 (docs/open_vocabularies.md):

        >>> from torchrec_qr import MixedRadix
        >>> config = CompositionalEmbeddingBagConfig(
        ...     name="t_query", feature_names=["query"], num_embeddings=2**40, embedding_dim=64,
        ...     partitions=MixedRadix(num_partitions=3, rows=100_000), id_hash="splitmix64")
        >>> config.bound_partitions.sizes
        (93127, 3437, 3436)
    """


@dataclass
class CompositionalEmbeddingConfig(_Compositional, EmbeddingConfig):
    """A table of S logical rows, stored as K partitions, without pooling. It extends TorchRec's ``EmbeddingConfig``.

    The embedding of id x is compose_j(W_j[p_j(x)]). Fields and errors are those of `CompositionalEmbeddingBagConfig`,
    without ``pooling``.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingConfig, MixedRadix
        >>> config = CompositionalEmbeddingConfig(
        ...     name="t_item", feature_names=["item"], num_embeddings=1000, embedding_dim=16,
        ...     partitions=MixedRadix(sizes=[10, 10, 10]), operation="concat", partition_dims=[8, 4, 4])
        >>> config.physical_rows, config.partition_columns
        (30, (8, 4, 4))
    """


CompositionalConfig = CompositionalEmbeddingBagConfig | CompositionalEmbeddingConfig


def is_compositional(config: BaseEmbeddingConfig | None) -> TypeGuard[CompositionalConfig]:
    """Returns whether a config is that of a compositional table, pooled or not."""
    return isinstance(config, CompositionalEmbeddingBagConfig | CompositionalEmbeddingConfig)


def stored_shapes(config: BaseEmbeddingConfig) -> list[PartitionShape]:
    """Returns what a table stores: the shape and the type of each partition, or of the one tensor of a plain table.

    Args:
        config (BaseEmbeddingConfig): of a plain or compositional table.

    Example:
        >>> [tuple(shape) for shape in stored_shapes(EmbeddingBagConfig(num_embeddings=100, embedding_dim=8))]
        [(100, 8, torch.float32)]
    """
    if is_compositional(config):
        return config.partition_shapes
    return [PartitionShape(config.num_embeddings, config.embedding_dim, DTYPES[config.data_type])]


def stored_bytes(config: BaseEmbeddingConfig) -> int:
    """Returns the bytes of what a table stores: see `stored_shapes`.

    Args:
        config (BaseEmbeddingConfig): of a plain or compositional table.

    Example:
        >>> stored_bytes(EmbeddingBagConfig(num_embeddings=100, embedding_dim=8))
        3200
    """
    return sum(rows * columns * dtype.itemsize for rows, columns, dtype in stored_shapes(config))


def check_allowed(config: BaseEmbeddingConfig, field: str, allowed: Sequence[object]) -> None:
    """Checks a field of a plain or compositional table.

    Raises:
        ValueError: the field has none of the allowed values.
    """
    if getattr(config, field) not in allowed:
        names = ", ".join(str(a) for a in allowed)
        raise ValueError(f"table {config.name!r}: {field}={getattr(config, field)!r}; allowed: {names}")


def common_dim(tables: Sequence[BaseEmbeddingConfig]) -> int:
    """Returns D of all tables.

    Raises:
        ValueError: the tables differ in D.

    Example:
        >>> common_dim([EmbeddingBagConfig(num_embeddings=100, embedding_dim=8)])
        8
    """
    dims = {t.name: t.embedding_dim for t in tables}
    if len(set(dims.values())) != 1:
        raise ValueError(f"embedding_dim: the tables have dimensions {dims}; allowed: one dimension for all")
    return next(iter(dims.values()))


def _is_dim(dim: object, largest: int = MAX_DIM) -> bool:
    return isinstance(dim, int) and 0 < dim <= largest and dim % DIM_MULTIPLE == 0


def _even_dims(dim: int, num_partitions: int) -> list[int]:
    """Returns D_j as equal as multiples of 4 allow, wider ones first. The first has the rest of a D that is none."""
    units, rest = divmod(dim, DIM_MULTIPLE)
    each, extra = divmod(units, num_partitions)
    dims = [DIM_MULTIPLE * (each + (j < extra)) for j in range(num_partitions)]
    dims[0] += rest
    return dims
