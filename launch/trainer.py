"""Trains a model over all ranks: the loop, evaluation, checkpoints, and what stops it."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from launch.config import Job
from launch.console import Output
from launch.data.loader import Batches, Data
from launch.data.split import Split
from launch.epoch import Epoch
from launch.memory_errors import tables_named
from launch.metrics import Predictions, Quality, quality
from launch.parallel import Parallel
from launch.run_checkpoints import Checkpoints
from launch.run_folder import RunFolder
from launch.saved_model import SavedModel
from launch.schedule import Schedule
from launch.skipped_rows import SkippedRows, TrainedRows
from launch.speed import Speed
from launch.task import NonFiniteLossError, Predicted, TrainTask
from launch.termination import Terminated, Termination
from launch.waits import Waits
from launch.weights import write_weights
from torchrec_qr import raise_pending


class Trainer:
    """Trains ``parallel`` on ``data`` by ``job``, and writes to ``folder``.

    All ranks run the same steps. The position that a checkpoint keeps counts batches *trained*: the pipeline has read
    ahead of it.

    Args:
        job (Job): the config.
        task (TrainTask): the module within ``parallel``.
        parallel (Parallel): model, plan and optimizers.
        data (Data): of this rank.
        folder (RunFolder): of the run.
        output (Output): what a person sees.
        waits (Waits): of the job.
        profiler (torch.profiler.profile | None): steps along; default: none.

    Attributes:
        step (int): of the model, as trained or loaded.
        speed (Speed): of training.
        skipped (SkippedRows): malformed rows that passes over the splits left out.
        saved_model (SavedModel): the model in checkpoints.
    """

    def __init__(
        self,
        job: Job,
        task: TrainTask,
        parallel: Parallel,
        data: Data,
        folder: RunFolder,
        output: Output,
        waits: Waits,
        profiler: torch.profiler.profile | None = None,
    ) -> None:
        self._job, self._task, self._parallel, self._data = job, task, parallel, data
        self._folder, self._output, self._waits, self._profiler = folder, output, waits, profiler
        self._device = parallel.model.device
        self._checkpoints = Checkpoints(folder.checkpoints, kept=2, waits=waits)
        self._best_checkpoint = Checkpoints(folder.best, kept=1, waits=waits)
        meaning_file = folder.root / "meaning.json"
        self.saved_model = SavedModel(job, parallel, data.meaning.hash, meaning_file, waits)
        self._schedule = Schedule(job.schedule, [parallel.sparse, parallel.dense])
        self._termination = Termination(waits.group, lambda: folder.lost)
        self.step, self.speed = 0, Speed()
        self._epoch = Epoch(data, job.train.batch_size, waits.group)
        self._window = Predictions()  # since the last line of training metrics
        self.skipped = SkippedRows(output.say, waits.group)
        self._trained = TrainedRows(data.splits.train, self.skipped, job.data.on_bad_row)
        self._best: float | None = None  # least validation log loss so far
        self._validated = self._saved = -1  # the steps at which that was last done
        self._worse = 0  # validations since the best one
        self._reached = False  # the AUC at which to stop

    def train(self) -> Quality:
        """Runs to the end and returns the quality on the test split, of the step that validated best.

        Raises:
            DataError: no row of a split that was read is good.
            EpochError: an epoch has not trained each of its rows once.
            IndexError: an id outside of its table; on a GPU some steps late, but before anything is saved or reported.
            NonFiniteLossError: names the step, the learning rate, and the likely cause.
            Terminated: after SIGTERM or SIGINT, when a checkpoint has been written.
            RunInUseError: another job has taken the folder; before anything is saved.
        """
        self._output.start(self._total_steps(), self.step)
        try:
            self._train_epochs()
            raise_pending()
        finally:
            self._output.stop()
        if self._validated != self.step:
            self._validate()
        if self._job.train.checkpoint_every and self._saved != self.step:
            self._save()
        best = self._best_checkpoint.latest()
        if best is not None and (step := Checkpoints.about(best)["step"]) != self.step:
            self.saved_model.load(best)
            self.step = step
        tested, _ = self._evaluate(self._data.splits.test, self._data.test())
        if best is not None:
            self._write_weights(best)
        return tested

    def _write_weights(self, best: Path) -> None:
        """Writes the tested weights as plain tensors, which `launch.predict` reads without ranks and without pickle."""
        self._folder.require(self._waits.group)
        with self._waits.patient():
            if dist.get_rank() == 0:
                about = {"step": str(self.step), "meaning": self._data.meaning.hash}
                write_weights(best / "state", self._folder.weights, about)

    def resume(self) -> Path | None:
        """Continues from the run's last checkpoint, of any plan and world size; returns it, or None: there is none.

        Rows that are left of an epoch are dealt to the ranks anew if there are more or fewer than before.

        Raises:
            ValueError: the checkpoint is of another model; names what changed.
            MeaningError: it is of rows with another meaning than those of the run's folder.
        """
        checkpoint = self._checkpoints.latest()
        if checkpoint is None:
            self._folder.drop_after(0, 0)
            self._best_checkpoint.forget_after(-1)
            return None
        about = self.saved_model.checked(checkpoint)
        self.saved_model.load(checkpoint)
        self.step = self._saved = about["step"]
        self._best, self._validated, self._worse = about["best"], about["validated"], about["worse"]
        self._epoch.load(about)
        self._trained.load(about)
        if about["world_size"] == dist.get_world_size():
            self._set_rank_state(Checkpoints.load_by_rank(checkpoint))
        if self._epoch.changed:
            self._output.say(
                f"epoch {self._epoch.number} was begun with its rows in another order "
                f"({'; '.join(self._epoch.changed)}): some may be trained twice, and others not at all"
            )
        self._folder.drop_after(self.step, self._validated)
        self._best_checkpoint.forget_after(self._validated)
        return checkpoint

    def _train_epochs(self) -> None:
        while self._epoch.number < self._job.train.epochs and not self._done():
            pipeline: Any = TrainPipelineSparseDist(
                self._parallel.model, self._parallel.optimizer, self._device, execute_all_batches=True
            )
            self._parallel.model.train()
            with self._epoch.start() as batches:
                self._trained.start(self._epoch.batch, batches)
                for predicted in self._steps(pipeline, batches):
                    self._window.add(*predicted)
                    self._after_step(pipeline)
                    if self._done():
                        break
                self.speed.waited += batches.wait_seconds
            pipeline.detach()
            self._after_pass()
            if not self._done():
                if ended := self._epoch.end():
                    self._output.say(ended)
                if self._validated != self.step:
                    self._validate()

    def _steps(self, pipeline: Any, batches: Batches) -> Iterator[Predicted]:
        train, first = self._job.train, True
        while True:
            self._schedule.set(self.step)
            # Check at each step on a CPU, where it is free, and elsewhere only if the host waits for the device anyway.
            self._task.checks_loss = self._device.type == "cpu" or (self.step + 1) % train.log_every == 0
            started = self.speed.now()
            try:
                with self._patient_at(first), self._memory(f"step {self.step + 1}"):
                    predicted = pipeline.progress(batches)
            except StopIteration:
                return
            except NonFiniteLossError as error:
                kept = self._checkpoints.latest()
                kept_text = f"the last checkpoint is {kept}" if kept else "there is no checkpoint"
                text = f"step {self.step + 1}: {error}; the learning rate is {self._schedule.lr:g}; {kept_text}"
                raise NonFiniteLossError(text) from None
            first = False
            self.speed.add(started, train.batch_size)
            self.step, self._epoch.batch = self.step + 1, self._epoch.batch + 1
            if self._profiler is not None:
                self._profiler.step()
            yield predicted
            if signal := self._termination.agreed():
                self._save()  # unless the folder is lost
                raise Terminated(signal)

    def _after_pass(self) -> None:
        self._trained.count(self._epoch.batch)
        self._trained.look_for_good(self._window, self._device, self._waits.group)
        self._trained.require_good()

    def _after_step(self, pipeline: Any) -> None:
        self._output.step(self.step)
        train = self._job.train
        if self.step % train.log_every == 0:
            self._log_train()
        if train.eval_every and self.step % train.eval_every == 0:
            pipeline.detach()
            self._validate()
            pipeline.attach()
        if train.checkpoint_every and self.step % train.checkpoint_every == 0:
            self._save()

    def _log_train(self) -> None:
        q = quality(*self._window.gather(self._device, self._waits.group))
        skipped = self._trained.count(self._epoch.batch)
        self._trained.has_good |= q.samples > 0
        self._window = Predictions()
        speed = self.speed.samples_per_s
        self._folder.log(self.step, "train", **_numbers(q), **skipped, lr=self._schedule.lr, samples_per_s=speed)
        rows = f"  {skipped['skipped_rows']:,} rows skipped" if skipped else ""
        self._output.report(
            self.step, f"logloss {q.logloss:.4f}  NE {q.ne:.4f}  AUC {q.auc:.4f}  {speed:,.0f} samples/s{rows}"
        )

    def _validate(self) -> None:
        """Evaluates on the validation split, and keeps this step if none was better."""
        q, skipped = self._evaluate(self._data.splits.validation, self._data.validation())
        self._validated = self.step
        self._folder.log(self.step, "validation", **_numbers(q), **skipped)
        self._output.say(
            f"step {self.step}: validation logloss {q.logloss:.4f}  NE {q.ne:.4f}  AUC {q.auc:.4f}"
            f"  calibration {q.calibration:.3f}"
        )
        if q.is_guessing:
            self._output.say(
                f"step {self.step}: a validation AUC of {q.auc:.4f} is that of guessing. Either the learning rates "
                f"(sparse {self._job.optimizer.sparse.lr:g}, dense {self._job.optimizer.dense.lr:g}) are too high or "
                f"too low, or labels and features do not belong together; {self._task.suspect()}"
            )
        self._reached = self._job.train.stop_at_auc is not None and q.auc >= self._job.train.stop_at_auc
        if self._best is None or q.logloss < self._best:
            self._best, self._worse = q.logloss, 0
            self._save(self._best_checkpoint)
        else:
            self._worse += 1

    def _evaluate(self, split: Split, batches: Batches) -> tuple[Quality, dict[str, int]]:
        model = self._parallel.model
        model.eval()
        predictions = Predictions()
        with self._memory(f"evaluating at step {self.step}"), torch.no_grad(), batches:
            for i, batch in enumerate(batches):
                with self._patient_at(i == 0):
                    _, predicted = model(batch.to(self._device, non_blocking=True))
                predictions.add(*predicted)
        model.train()
        raise_pending()
        q = quality(*predictions.gather(self._device, self._waits.group))
        skipped = self.skipped.count(split, batches.bad_rows, batches.bad_rows.count)
        batches.bad_rows.require_good(q.samples, f"the {split.name} split")
        return q, skipped

    def _patient_at(self, first: bool) -> AbstractContextManager[None]:
        """Waits long in the first step of a pass, because ranks compile kernels and find their rows there."""
        return self._waits.patient() if first else nullcontext()

    def _memory(self, doing: str) -> AbstractContextManager[None]:
        return tables_named(doing, self._parallel.held, self._device)

    def _done(self) -> bool:
        most, patience = self._job.train.max_steps, self._job.train.patience
        ended = most is not None and self.step >= most
        return self._reached or ended or (patience is not None and self._worse >= patience)

    def _total_steps(self) -> int:
        epochs = self._job.train.epochs - self._epoch.number
        left = self._epoch.batches_left + (epochs - 1) * self._data.batches_per_epoch if epochs > 0 else 0
        total = self.step + left
        return min(total, self._job.train.max_steps or total)

    def _save(self, to: Checkpoints | None = None) -> None:
        """Writes a checkpoint of this step; all ranks must call it."""
        raise_pending()  # an error of a GPU must not become a checkpoint
        self._folder.require(self._waits.group)
        self._trained.look_for_good(self._window, self._device, self._waits.group)
        about = {
            "best": self._best,
            "worse": self._worse,
            "validated": self._validated,
            **self._epoch.state(),
            **self._trained.state(self._epoch.batch),
        }
        self.saved_model.save(to or self._checkpoints, self.step, about, self._rank_state())
        if to is None:
            self._saved = self.step

    def _rank_state(self) -> dict[str, Any]:
        cuda = {"cuda": torch.cuda.get_rng_state()} if self._device.type == "cuda" else {}
        logits, labels = self._window.state()
        window = {"logits": logits, "labels": labels}
        return {"python": random.getstate(), "torch": torch.get_rng_state(), "window": window, **cuda}

    def _set_rank_state(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])
        self._window = Predictions(**state["window"])


def _numbers(q: Quality) -> dict[str, float | int | None]:
    return {"loss": q.logloss, "logloss": q.logloss, "ne": q.ne, "auc": q.auc, "calibration": q.calibration}
