"""Output for a person: a table of the model and its plan, a live line, a summary. A log gets plain lines."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torchrec import EmbeddingBagConfig
from torchrec.distributed.types import ParameterSharding

from torchrec_qr.configs import stored_shapes

_MIB = 2**20
_COLUMNS = 100  # of a log
_BAR = 20


class Output:
    """Prints on rank 0. On a terminal it shows a live line; elsewhere, or when quiet, a plain line per report.

    Args:
        rank (int): of this process.
        quiet (bool): leaves out all but the lines of `say` and the summary.
    """

    def __init__(self, rank: int, quiet: bool) -> None:
        self._console = Console(quiet=rank != 0, highlight=False)
        if not self._console.is_terminal:
            self._console.width = _COLUMNS
        self._live = self._console.is_terminal and not quiet
        self._quiet = quiet
        self._progress: Progress | None = None
        self._total = 0

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints a line unless quiet."""
        if not self._quiet:
            self.say(text)

    def tables(self, tables: Sequence[EmbeddingBagConfig], shardings: Mapping[str, ParameterSharding]) -> str:
        """Shows tables, rows logical → stored, MiB, compression and placement; returns the same as plain text."""
        table = _model_table(tables, shardings)
        if not self._quiet:
            self._console.print(table)
        plain = Console(width=_COLUMNS, no_color=True, highlight=False)
        with plain.capture() as capture:
            plain.print(table)
        return capture.get()

    def start(self, total: int, done: int) -> None:
        """Begins ``total`` steps, of which ``done`` are done."""
        self._total = total
        if self._live:
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(_BAR),
                MofNCompleteColumn(),
                TextColumn("{task.fields[report]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.add_task("train", total=total, completed=done, report="")
            self._progress.start()

    def step(self, step: int) -> None:
        """Moves the live line."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def report(self, step: int, text: str) -> None:
        """Puts training metrics on the live line, or on one of their own."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], report=text)
        elif not self._quiet:
            filled = _BAR * step // max(self._total, 1)
            width = len(str(self._total))
            self.say(f"|{'#' * filled}{' ' * (_BAR - filled)}| {step:>{width}}/{self._total}  {text}")

    def stop(self) -> None:
        """Ends the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """Prints names and values."""
        grid = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows:
            grid.add_row(name, value)
        self._console.print(grid, soft_wrap=True)


def _model_table(tables: Sequence[EmbeddingBagConfig], shardings: Mapping[str, ParameterSharding]) -> Table:
    out = Table(title="Embedding tables")
    out.add_column("table")
    for name in ("rows", "stored", "MiB", "smaller"):
        out.add_column(name, justify="right")
    out.add_column("placement")
    out.add_column("ranks")
    sizes = [_sizes(table) for table in tables]
    for table, of_table in zip(tables, sizes, strict=True):
        out.add_row(table.name, *_cells(*of_table), *_placement(shardings.get(table.name)))
    out.add_section()
    out.add_row(f"{len(tables)} tables", *_cells(*(sum(column) for column in zip(*sizes, strict=True))), "", "")
    return out


def _sizes(table: EmbeddingBagConfig) -> tuple[int, int, int, int]:
    """Returns logical and physical rows, and logical and stored values."""
    shapes, rows = stored_shapes(table), table.num_embeddings
    stored = sum(shape.rows * shape.columns for shape in shapes)
    return rows, sum(shape.rows for shape in shapes), rows * table.embedding_dim, stored


def _cells(rows: int, stored_rows: int, values: int, stored_values: int) -> tuple[str, ...]:
    return f"{rows:,}", f"{stored_rows:,}", f"{4 * stored_values / _MIB:,.2f}", f"{values / stored_values:.1f}×"


def _placement(sharding: ParameterSharding | None) -> tuple[str, str]:
    """Returns the sharding type and the ranks of a table. A table without a sharding is replicated."""
    if sharding is None or sharding.sharding_type == "data_parallel":
        return "data_parallel", "all"
    ranks = sorted(set(sharding.ranks or ()))
    contiguous = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
    return sharding.sharding_type, f"{ranks[0]}-{ranks[-1]}" if contiguous else ",".join(map(str, ranks))
