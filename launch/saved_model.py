"""The model, its optimizers and the meaning of its rows, as checkpoints of runs have them."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from launch.config import Job
from launch.data.meaning import MeaningError
from launch.differences import differences
from launch.memory_errors import tables_named
from launch.parallel import Parallel
from launch.run_checkpoints import Checkpoints
from launch.waits import Waits
from torchrec_qr.cli.schema import dump


class SavedModel:
    """Saves and loads a model, and refuses checkpoints of another model or of rows with another meaning.

    All ranks must make the same calls.

    Args:
        job (Job): the config.
        parallel (Parallel): model and optimizers.
        meaning (str): the hash of the `launch.data.meaning.Meaning` of the run's rows.
        meaning_file (Path): its file, for messages.
        waits (Waits): of the job.
    """

    def __init__(self, job: Job, parallel: Parallel, meaning: str, meaning_file: Path, waits: Waits) -> None:
        self._parallel, self._waits = parallel, waits
        self._model: Any = parallel.model
        self._meaning, self._meaning_file = meaning, meaning_file
        rules = {"sparse": job.optimizer.sparse.name, "dense": job.optimizer.dense.name}
        # A checkpoint is of the same model if all of this is the same.
        tables = {table.name: dump(table) for table in job.tables}
        self._description = {"tables": tables, "model": dump(job.model), "optimizer": rules}

    def save(self, to: Checkpoints, step: int, about: dict[str, Any], by_rank: dict[str, Any]) -> None:
        """Writes a checkpoint; see `Checkpoints.save`."""
        to.save(step, self._state(), {**about, "model": self._description, "meaning": self._meaning}, by_rank)

    def checked(self, checkpoint: Path) -> dict[str, Any]:
        """Returns what `save` wrote ``about`` a checkpoint of this run.

        Raises:
            ValueError: the checkpoint is of another model; names what changed.
            MeaningError: it is of rows with another meaning than those of the run's folder.
        """
        about = Checkpoints.about(checkpoint)
        if changed := differences(about["model"], self._description):
            raise ValueError(
                f"{checkpoint} is of another model: {'; '.join(changed)}; allowed: the same model, or a run of another "
                "name (--name)"
            )
        self._check_meaning(checkpoint, about)
        return about

    def load(self, checkpoint: Path) -> None:
        """Loads model and optimizers from a checkpoint of any plan and world size."""
        parallel = self._parallel
        # Make the states first, because an optimizer may make its own at its first step alone.
        with self._memory(checkpoint):
            parallel.dense.init_state()
            parallel.dense.zero_grad()
            state = self._state()
            Checkpoints.load(checkpoint, state, self._waits)
        self._model.load_state_dict(state["model"])
        parallel.sparse.load_state_dict(state["sparse"])
        parallel.dense.load_state_dict(state["dense"])

    def start_from(self, run: Path) -> Path:
        """Takes the weights of another run's end, those of the step that validated best; returns their checkpoint.

        Optimizer state and step are this run's own.

        Args:
            run (Path): the folder of a run that came to its end.

        Raises:
            ValueError: it has not ended, or is of another model; names what differs.
            MeaningError: its rows have another meaning.
        """
        best = Checkpoints(run / "best", 1, self._waits).latest()
        if best is None or not (run / "weights").is_dir():
            raise ValueError(
                f"train.init_from: {run} has no weights; allowed: the folder of a run that came to its end"
            )
        about = Checkpoints.about(best)
        if changed := differences(about["model"], {**self._description, "optimizer": about["model"]["optimizer"]}):
            raise ValueError(
                f"train.init_from: {best} is of another model: {'; '.join(changed)}; allowed: the same model"
            )
        self._check_meaning(best, about)
        with self._memory(best):
            state: dict[str, Any] = {"model": self._model.state_dict()}
            Checkpoints.load(best, state, self._waits)
        self._model.load_state_dict(state["model"])
        return best

    def _check_meaning(self, checkpoint: Path, about: dict[str, Any]) -> None:
        if (saved := about.get("meaning")) != self._meaning:
            raise MeaningError(
                f"{checkpoint}: its rows have the meaning {saved} (SHA-256), and {self._meaning_file} is "
                f"{self._meaning}; allowed: the meaning.json and vocabulary.npz with which it was trained"
            )

    def _state(self) -> dict[str, Any]:
        parallel = self._parallel
        optimizers = {"sparse": parallel.sparse.state_dict(), "dense": parallel.dense.state_dict()}
        return {"model": self._model.state_dict(), **optimizers}

    def _memory(self, checkpoint: Path) -> AbstractContextManager[None]:
        return tables_named(f"loading {checkpoint}", self._parallel.held, self._model.device)
