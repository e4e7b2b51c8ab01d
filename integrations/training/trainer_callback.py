"""Watch curvature in Hugging Face's Trainer: a callback that measures after its steps."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hesscurv.hooks import MonitorWarning
from hesscurv.integrations.training.hosted_monitor import HostedMonitor
from hesscurv.integrations.training.trainer_loss import check_own_loss, own_loss
from hesscurv.integrations.training.training_loggers import TensorBoardLogger, WandbLogger
from hesscurv.interface.descriptions import describe_object
from hesscurv.storage.checked_files import read_checked, write_checked
from hesscurv.storage.destinations import as_file_name


class CurvatureTrainerCallback(TrainerCallback):
    """Measures a model's curvature while `transformers.Trainer` trains it.

    The steps of the schedule are the trainer's ``global_step``: updates, however many batches are
    accumulated for each. The training has the same bits with the callback as without. Curvature is
    computed in full precision, whatever the trainer's.

    The state is kept in each checkpoint's folder, in a file of its own, written atomically and read
    without pickle: trainer_state.json takes no tensors. A resumed run goes on with the records and
    starts its next solve from the last eigenspace.

    Args:
        task: What is measured, called with the model and a batch: `CausalLMTask`, `ModelLossTask`,
            or any callable ``(model, batch) -> scalar mean loss``. None takes the model's own loss:
            for causal language models by `CausalLMTask`, in little memory, for others by
            `ModelLossTask`. Batches count by their valid labels, as the Trainer's
            ``num_items_in_batch`` does. A Trainer that computes another loss (`compute_loss_func`,
            a `compute_loss` of its own, smoothed labels) needs a task.
        batches: The probe set, dict batches. None takes samples of the training loader, read once,
            in an order of its own seed, without disturbing it.
        k: Number of eigenpairs; default 10.
        samples: At most so many samples; default all of `batches`, and of the training loader as
            many as four batches have.
        loggers: Objects with ``log(record, step)``; None takes TensorBoard and Weights & Biases
            where the trainer's ``report_to`` names them.
        name: What logged names begin with, before a slash, and the name of the file in checkpoints;
            default "curvature".
        resume_from: The checkpoint's folder, for a run that is resumed from one outside of its
            ``output_dir``; default the one there.
        **options: Further arguments of `CurvatureMonitor`: quantities, schedule, max_fraction,
            params, curvature, ...

    Attributes:
        monitor: The `CurvatureMonitor`, from the beginning of the training on; None before.
        records: All records.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: When training starts, if the training loader cannot be read beside it, there is
            no task and the Trainer's loss is not the model's own, or the file in the checkpoint is
            damaged.

    Example:
        >>> Trainer(..., callbacks=[CurvatureTrainerCallback(schedule=every(100))])
    """

    def __init__(
        self,
        task: Callable[..., Tensor] | None = None,
        batches: Iterable[Any] | None = None,
        k: int = 10,
        *,
        samples: int | None = None,
        loggers: Iterable[Any] | None = None,
        name: str = "curvature",
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self._hosted = HostedMonitor(task, batches, k, samples, options)
        self._loggers = None if loggers is None else list(loggers)
        self._own_loggers: list[Any] = []
        self._resume_from = None if resume_from is None else Path(resume_from)
        self.name = name

    def __repr__(self) -> str:
        """Name it, and say what it measures and how often it has."""
        return describe_object(self, name=self.name, **self._hosted.description())

    @property
    def monitor(self) -> Any:
        """The monitor, once training has begun."""
        return self._hosted.monitor

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records so far."""
        return self._hosted.records

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read probe set and checkpoint, and measure before the first step if it is time to."""
        model: nn.Module = kwargs["model"]
        if self._hosted.task is None:
            check_own_loss(self, args)
        if state.global_step > 0:
            self._hosted.load_state_dict(self._read(args, state))
        loggers = self._loggers
        if loggers is None:
            loggers = self._own_loggers = self._reporters(args) if args.process_index == 0 else []
        self._hosted.begin(
            model, own_loss(model), kwargs["train_dataloader"], kwargs["optimizer"], loggers
        )
        self.monitor.step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if the schedule says so."""
        self.monitor.step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state beside the checkpoint that was saved."""
        folder = _checkpoint(args, state)
        if not args.should_save or not folder.is_dir():
            return
        try:
            write_checked(folder / self.file_name, self._hosted.state_dict())
        except OSError as error:
            warnings.warn(
                f"the monitor's state could not be saved to {folder}: {error}; training goes on",
                MonitorWarning,
                stacklevel=2,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close what was opened."""
        for logger in self._own_loggers:
            if hasattr(logger, "close"):
                logger.close()

    @property
    def file_name(self) -> str:
        """The name of the file in a checkpoint's folder."""
        return f"{as_file_name(self.name)}_monitor.pt"

    def _read(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Return the state of the checkpoint that the run was resumed from; empty without one."""
        given = self._resume_from
        if given is None and isinstance(args.resume_from_checkpoint, str):
            given = Path(args.resume_from_checkpoint)
        folder = _checkpoint(args, state) if given is None else given
        path = folder / self.file_name
        if not path.is_file() or not (given or _is_of(folder, state)):
            warnings.warn(
                f"the run was resumed at step {state.global_step}, and {folder} has no state of "
                "the monitor that fits; records begin anew. Name the checkpoint's folder: "
                "CurvatureTrainerCallback(resume_from=...)",
                MonitorWarning,
                stacklevel=2,
            )
            return {}
        try:
            return read_checked(path)
        except ValueError as error:
            raise ValueError(f"{error}; remove the file to begin the records anew") from error

    def _reporters(self, args: TrainingArguments) -> list[Any]:
        """Return loggers for what the trainer reports to."""
        found: list[Any] = []
        prefix = f"{self.name}/"
        if "tensorboard" in args.report_to:
            runs = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(
                str(args.output_dir), "runs"
            )
            folder = os.path.join(runs, as_file_name(self.name))
            found.append(TensorBoardLogger(folder, prefix=prefix))
        if "wandb" in args.report_to:
            found.append(WandbLogger(prefix=prefix, step_metric="train/global_step"))
        return found


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Whether a checkpoint is the one whose state the trainer has taken up: of its history."""
    try:
        saved = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    history = json.loads(json.dumps(state.log_history))
    return bool(saved.get("log_history") == history)
