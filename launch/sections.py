"""The application's own sections of a job's YAML: ``data``, ``model``, ``optimizer``, ``schedule``, ``train``."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from launch.run_name import is_run_name
from torchrec_qr.cli.schema import ConfigError, Range
from torchrec_qr.distributed.fused_params import OptimizerName

Positive = Annotated[int, Range(1)]
NotNegative = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]

CRITEO_DENSE = 13
CRITEO_FEATURES = tuple(f"cat_{i}" for i in range(26))


@dataclass(frozen=True)
class GeneratorSection:
    """``data.generator``: rows with a planted signal, whose true probabilities are computed.

    Args:
        rows (int): number of rows, of all splits together.
        seed (int): of rows and signal.
        zipf (float): exponent a of the ids' law, P(id k) ~ (k + 1)^-a.
        dense_strength (float): standard deviation of the dense part of the true logit.
        ids_strength (float): of the part of the category ids.
        bias (float): of the true logit.
    """

    rows: Positive = 200_000
    seed: NotNegative = 0
    zipf: Annotated[float, Range(above=0, high=5)] = 1.4
    dense_strength: Annotated[float, Range(0)] = 0.6
    ids_strength: Annotated[float, Range(0)] = 1.8
    bias: float = -1.5


@dataclass(frozen=True)
class ParquetSection:
    """``data.parquet``: the columns of the label, of dense features and of ids.

    Args:
        label (str): 0 or 1, or any number under ``data.label_above``.
        dense (tuple[str, ...]): numbers; default ``int_0`` … ``int_12``.
        ids (tuple[str, ...]): one column per feature, in the order of ``data.features``: integers, strings, or lists of
            these; default: columns called as the features. See `launch.data.id_values`.
        hexadecimal (tuple[str, ...]): those of ``ids`` whose strings are numbers in base 16.
    """

    label: str = "label"
    dense: tuple[str, ...] = tuple(f"int_{i}" for i in range(CRITEO_DENSE))
    ids: tuple[str, ...] = ()
    hexadecimal: tuple[str, ...] = ()


@dataclass(frozen=True)
class CsvSection(ParquetSection):
    """``data.csv``: the columns, and the way in which lines are cut into them.

    Args:
        delimiter (str): between columns, ``"\\t"`` for TSV.
        quoted (bool): a value may stand in double quotes, which are doubled within it. A line never ends within them.
        nulls (tuple[str, ...]): texts that stand for a missing value.
        names (tuple[str, ...] | None): of the columns, if files have no header; default: the first line of each file.
            A file without labels may lack that of the label; see `launch.data.delimited.DelimitedFile`.
    """

    delimiter: str = ","
    quoted: bool = True
    nulls: tuple[str, ...] = ("",)
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.delimiter.encode()) != 1 or self.delimiter in '"\r\n\0':
            allowed = "one ASCII character that is no quote, ends no line, and is not NUL"
            raise ConfigError("delimiter", self.delimiter, allowed)
        if self.names is not None and len(set(self.names)) < len(self.names):
            raise ConfigError("names", list(self.names), "each column once")


@dataclass(frozen=True)
class DataSection:
    """``data``: the rows, their split, and the way in which they become a model's input.

    Paths are relative to the working directory. They may be patterns (``day_*.gz``), sorted by their numbers, and but
    for ``npy`` folders, as Spark writes them. A column may stand in the name of a folder, ``day=2026-11-28``.

    Args:
        format (str): ``generator``; ``criteo_tsv``: Kaggle's or
            the 1TB set's text, plain or gzip; ``npy``: MLPerf's binary files, each entry a prefix (``day_0`` for
            ``day_0_dense.npy``, ``day_0_sparse.npy`` or ``day_0_sparse_multi_hot.npz``, ``day_0_labels.npy``);
            ``parquet``; ``csv``: lines of text, plain or gzip.
        files (tuple[str, ...]): rows in the order of time; ``split`` cuts them.
        split (tuple[float, float, float]): shares of train, validation and test, first to last.
        train_files (tuple[str, ...]): with ``validation_files``, a split by file, in place of ``files``.
        validation_files (tuple[str, ...]): as above; without ``test_files`` its first half is for validation, the
            second for test.
        test_files (tuple[str, ...]): as above.
        features (tuple[str, ...]): the categorical features, in the order in which the rows have them.
        dense_features (int): number of dense features in the rows; 0 for ``model.interaction`` ``dcn`` and ``deepfm``
            alone.
        label_above (float | None): makes the label 1 if the file's is a greater number, else 0; default: the file's is
            0 or 1.
        multi_hot (tuple[int, ...] | None): ids per row and feature, for the generator, and to check npz files against;
            default: all 1.
        ids (str): ``modulo``: id % rows of the feature's table, as dlrm does, a missing one being 0; ``vocabulary``:
            values in the order of their frequency, the most frequent one first, after 0 for all that are unknown or
            beyond the table, features of one table together; ``encoded``: as they are, checked against the table, a
            missing one being 0. A table with an ``id_hash`` takes the 64-bit ids of its features as they are under all
            of these, a missing one being an id like others.
        vocabulary (str | None): the file that `launch.data.preprocess` wrote; default: it is built from the train split
            at start.
        min_count (int): least number of occurrences in the train split to be in that vocabulary.
        dense_transform (str): ``log1p``: log(1 + max(x, 0)); ``none``.
        missing_flags (bool): adds, per dense feature, one that is 1 if the value is missing, else 0.
        on_bad_row (str): a malformed row ends the job, or is left out and counted: on the console,
            in ``metrics.jsonl`` and in the summary.
        shuffle (bool): the train split, by ``train.seed`` and epoch.
        shuffle_rows (int): how many rows are read and shuffled at once.
        prefetch (int): batches that are made ahead of the training step.
        parquet (ParquetSection): columns of Parquet files.
        csv (CsvSection): columns of text files.
        generator (GeneratorSection): rows of the generator.
    """

    format: Literal["generator", "criteo_tsv", "npy", "parquet", "csv"] = "generator"
    files: tuple[str, ...] = ()
    split: tuple[Share, Share, Share] = (6 / 7, 1 / 14, 1 / 14)
    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    features: tuple[str, ...] = CRITEO_FEATURES
    dense_features: NotNegative = CRITEO_DENSE
    label_above: float | None = None
    multi_hot: tuple[Positive, ...] | None = None
    ids: Literal["modulo", "vocabulary", "encoded"] = "modulo"
    vocabulary: str | None = None
    min_count: Positive = 1
    dense_transform: Literal["log1p", "none"] = "log1p"
    missing_flags: bool = False
    on_bad_row: Literal["error", "skip"] = "error"
    shuffle: bool = True
    shuffle_rows: Positive = 131_072
    prefetch: Positive = 16
    parquet: ParquetSection = field(default_factory=ParquetSection)
    csv: CsvSection = field(default_factory=CsvSection)
    generator: GeneratorSection = field(default_factory=GeneratorSection)

    def __post_init__(self) -> None:
        self._check_files()
        if len(set(self.features)) < len(self.features) or not self.features:
            raise ConfigError("features", list(self.features), "each feature once, and at least one")
        if self.multi_hot is not None and len(self.multi_hot) != len(self.features):
            raise ConfigError("multi_hot", list(self.multi_hot), f"one for each of the {len(self.features)} features")
        if not math.isclose(sum(self.split), 1, abs_tol=1e-3):
            raise ConfigError("split", list(self.split), "three shares with the sum 1")
        if self.format == "criteo_tsv" and len(self.features) != len(CRITEO_FEATURES):
            raise ConfigError("features", list(self.features), f"{len(CRITEO_FEATURES)}, the columns of Criteo's TSV")
        if self.format == "criteo_tsv" and self.dense_features != CRITEO_DENSE:
            raise ConfigError("dense_features", self.dense_features, f"{CRITEO_DENSE}, the columns of Criteo's TSV")
        if self.columns is not None:
            self._check_columns(self.columns)
        if self.label_above is not None and self.format in ("generator", "criteo_tsv"):
            raise ConfigError("label_above", self.label_above, f"none, under format: {self.format}")
        if self.vocabulary is not None and self.ids != "vocabulary":
            raise ConfigError("vocabulary", self.vocabulary, f"none, under ids: {self.ids}")

    @property
    def columns(self) -> ParquetSection | None:
        """Columns by their names; None in a format that has them by their places."""
        return {"parquet": self.parquet, "csv": self.csv}.get(self.format)

    def id_columns(self) -> tuple[str, ...]:
        """Returns the column of each feature."""
        if self.columns is None:
            return tuple(f"cat_{i}" for i in range(len(self.features)))
        return self.columns.ids or self.features

    @property
    def dense_inputs(self) -> int:
        """Dense features as the model sees them."""
        return self.dense_features * (2 if self.missing_flags else 1)

    def _check_columns(self, columns: ParquetSection) -> None:
        if len(columns.dense) != self.dense_features:
            raise ConfigError(f"{self.format}.dense", list(columns.dense), f"{self.dense_features} columns")
        if columns.ids and len(columns.ids) != len(self.features):
            raise ConfigError(f"{self.format}.ids", list(columns.ids), f"{len(self.features)}, one per feature")
        for name in columns.hexadecimal:
            if name not in self.id_columns():
                raise ConfigError(f"{self.format}.hexadecimal", name, f"columns of ids: {', '.join(self.id_columns())}")

    def _check_files(self) -> None:
        by_file = self.train_files or self.validation_files or self.test_files
        if self.format == "generator":
            if self.files or by_file:
                raise ConfigError("files", list(self.files or self.train_files), "none, under format: generator")
        elif self.files and by_file:
            raise ConfigError("files", list(self.files), "either files, or train_files and validation_files")
        elif not self.files and not (self.train_files and self.validation_files):
            raise ConfigError("files", [], f"files, or train_files and validation_files, under format: {self.format}")


@dataclass(frozen=True)
class ModelConfig:
    """``model``: an interaction of dense features and embeddings.

    Args:
        interaction (str): ``dot``, ``dcn_v2``, ``projection``:
            TorchRec's DLRM, DLRM_DCN, DLRM_Projection; ``dcn``: the paper's deep & cross network; ``deepfm``:
            TorchRec's.
        embedding_dim (int): D, of every table.
        dense_in_features (int): dense features, as the model sees them (those of ``data``, and its missing flags); 0
            for ``dcn`` and ``deepfm`` alone.
        bottom_mlp (tuple[int, ...]): widths of the dense features' layers, the last one D; empty for ``dcn`` and
            ``deepfm``.
        top_mlp (tuple[int, ...]): widths of the layers after the interaction, without the last one of width 1; of the
            deep tower under ``dcn``; hidden width and output of the deep part under ``deepfm``.
        cross_layers (int): of ``dcn`` and ``dcn_v2``.
        cross_rank (int): of the low-rank matrices of ``dcn_v2``.
        projection_mlp (tuple[int, ...]): widths of both branches of ``projection``, the last one a multiple of D.
    """

    interaction: Literal["dot", "dcn_v2", "projection", "dcn", "deepfm"] = "dot"
    embedding_dim: Annotated[int, Range(4, multiple_of=4)] = 16
    dense_in_features: NotNegative = CRITEO_DENSE
    bottom_mlp: tuple[Positive, ...] = ()
    top_mlp: tuple[Positive, ...] = (512, 256)
    cross_layers: Positive = 3
    cross_rank: Positive = 512
    projection_mlp: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        dlrm = self.interaction in ("dot", "dcn_v2", "projection")
        if dlrm and self.dense_in_features == 0:
            allowed = f"at least 1, under interaction: {self.interaction}; 'dcn' and 'deepfm' need none"
            raise ConfigError("dense_in_features", 0, allowed)
        if dlrm and (not self.bottom_mlp or self.bottom_mlp[-1] != self.embedding_dim):
            allowed = f"widths that end in embedding_dim={self.embedding_dim}, under interaction: {self.interaction}"
            raise ConfigError("bottom_mlp", list(self.bottom_mlp), allowed)
        if not dlrm and self.bottom_mlp:
            raise ConfigError("bottom_mlp", list(self.bottom_mlp), f"none, under interaction: {self.interaction}")
        if not self.top_mlp:
            raise ConfigError("top_mlp", [], "at least one width")
        if self.interaction == "deepfm" and len(self.top_mlp) != 2:
            raise ConfigError("top_mlp", list(self.top_mlp), "two widths, under interaction: deepfm")
        if self.interaction == "projection" and (
            not self.projection_mlp or self.projection_mlp[-1] % self.embedding_dim
        ):
            allowed = f"widths that end in a multiple of embedding_dim={self.embedding_dim}"
            raise ConfigError("projection_mlp", list(self.projection_mlp), allowed)


@dataclass(frozen=True)
class OptimizerSection:
    """One of ``optimizer.sparse`` and ``optimizer.dense``.

    Args:
        name (OptimizerName): the rule.
        lr (float): learning rate, which the schedule multiplies.
        eps (float): added to denominators.
        weight_decay (float): λ; of tables, the rows that a batch looks up decay, and no others.
        weight_decay_mode (str): ``l2``: adds λ · w to the gradient; ``decoupled``: adds lr · λ · w to the step. Under
            ``none`` the decay must be 0.
    """

    name: OptimizerName = "adagrad"
    lr: Annotated[float, Range(above=0, below=math.inf)] = 0.01
    eps: Annotated[float, Range(0, below=math.inf)] = 1e-8
    weight_decay: Annotated[float, Range(0, below=math.inf)] = 0.0
    weight_decay_mode: Literal["none", "l2", "decoupled"] = "none"


# The modes of weight decay of each rule; of all others in ``sparse``: decoupled alone, as in FBGEMM.
_SPARSE_MODES = dict.fromkeys(("sgd", "adagrad", "rowwise_adagrad"), ("l2", "decoupled"))
_DENSE_MODES = {"sgd": ("l2",), "adagrad": ("l2",), "adam": ("l2", "decoupled"), "amsgrad": ("l2", "decoupled")}


@dataclass(frozen=True)
class OptimizersSection:
    """``optimizer``: of the embedding tables (``sparse``), and of all else (``dense``)."""

    sparse: OptimizerSection = field(default_factory=OptimizerSection)
    dense: OptimizerSection = field(default_factory=OptimizerSection)

    def __post_init__(self) -> None:
        if self.dense.name not in _DENSE_MODES:
            raise ConfigError("dense.name", self.dense.name, ", ".join(map(repr, _DENSE_MODES)))
        for part, section, modes in (("sparse", self.sparse, _SPARSE_MODES), ("dense", self.dense, _DENSE_MODES)):
            of_name = modes.get(section.name, ("decoupled",))
            mode = section.weight_decay_mode
            if mode not in of_name and (section.weight_decay > 0 or mode != "none"):
                allowed = f"{' or '.join(map(repr, of_name))}, under weight_decay: {section.weight_decay:g} of "
                raise ConfigError(f"{part}.weight_decay_mode", mode, f"{allowed}{section.name}")


@dataclass(frozen=True)
class ScheduleSection:
    """``schedule``: of both learning rates, by step; see `launch.schedule`.

    Args:
        kind (str): after warm-up.
        warmup_steps (int): over which they rise to the full rate.
        decay_start (int): step at which they begin to fall.
        decay_steps (int): over which they fall to 0.
    """

    kind: Literal["constant", "poly", "cosine"] = "constant"
    warmup_steps: NotNegative = 0
    decay_start: NotNegative = 0
    decay_steps: NotNegative = 0

    def __post_init__(self) -> None:
        if self.kind == "constant" and (self.decay_start or self.decay_steps):
            raise ConfigError("decay_steps", self.decay_steps or self.decay_start, "0, under kind: constant")
        if self.kind != "constant" and self.decay_steps == 0:
            raise ConfigError("decay_steps", 0, f"at least 1, under kind: {self.kind}")


@dataclass(frozen=True)
class TrainSection:
    """``train``: the length of training, the steps from one event to the next, and the run's name.

    Args:
        name (str): of the run's folder.
        epochs (int): passes over the train split.
        batch_size (int): rows of one rank; a step trains W times as many.
        eval_batch_size (int | None): likewise, of evaluation; default: ``batch_size``.
        max_steps (int | None): after which training ends; default: no limit.
        eval_every (int): steps from one validation to the next; 0: at the end of each epoch alone.
        log_every (int): steps from one line of training metrics to the next.
        checkpoint_every (int): steps from one checkpoint to the next; 0: none.
        seed (int): of weights and of the order of rows.
        stop_at_auc (float | None): validation AUC at which training ends.
        patience (int | None): validations in a row without a lower log loss after which training ends; default: no
            limit.
        grad_clip (float | None): greatest norm of the dense gradient.
        bf16 (bool): runs the dense layers in bfloat16, if the device can.
        tf32 (bool): allows TensorFloat-32 in matrix products.
        timeout_minutes (float | None): how long a rank waits for the others in a step; default: 2 on CPUs (gloo), 10 on
            GPUs (NCCL).
        slow_timeout_minutes (float): likewise, where ranks take very different times: opening data, building
            vocabularies, planning, the first step of a pass over a split, writing and loading checkpoints.
        frozen (tuple[str, ...]): names of tables that keep the values that they start with, or that a checkpoint has.
        init_from (str | None): the folder of a run that came to its end, ``runs/x``, of the same model: this one starts
            from its weights and keeps its map from values to rows; optimizer state and step are new. Relative to the
            working directory; without meaning once this run has a checkpoint.
        triton_cache (str | None): a folder in which each node keeps its compiled kernels in a folder of its own; ``~``
            and variables such as ``$SLURM_TMPDIR`` are replaced on the node. Default: Triton's own,
            ``~/.triton/cache``.
    """

    name: str = "run"
    epochs: Positive = 1
    batch_size: Positive = 1024
    eval_batch_size: Positive | None = None
    max_steps: Positive | None = None
    eval_every: NotNegative = 0
    log_every: Positive = 100
    checkpoint_every: NotNegative = 0
    seed: NotNegative = 0
    stop_at_auc: Share | None = None
    patience: Positive | None = None
    grad_clip: Annotated[float, Range(above=0)] | None = None
    bf16: bool = False
    tf32: bool = False
    timeout_minutes: Annotated[float, Range(above=0)] | None = None
    slow_timeout_minutes: Annotated[float, Range(above=0)] = 60.0
    frozen: tuple[str, ...] = ()
    init_from: str | None = None
    triton_cache: str | None = None

    def __post_init__(self) -> None:
        if not is_run_name(self.name):
            raise ConfigError("name", self.name, "the name of a folder")
