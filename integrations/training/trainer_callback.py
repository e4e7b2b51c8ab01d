"""Callback for Hugging Face's Trainer that measures curvature after its steps."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hesscurv.hooks import CurvatureMonitor, MonitorOptions, MonitorWarning
from hesscurv.hooks.monitoring.monitor_options import OPERATOR_OPTIONS
from hesscurv.integrations.training.hosted_monitor import HostedMonitor
from hesscurv.integrations.training.trainer_loss import check_own_loss, own_loss
from hesscurv.integrations.training.training_loggers import TensorBoardLogger, WandbLogger
from hesscurv.interface.descriptions import describe_object
from hesscurv.interface.moved_arguments import forwarded, moved_to_options, seed_moved
from hesscurv.storage.checked_files import read_checked, write_checked
from hesscurv.storage.destinations import as_file_name


class CurvatureTrainerCallback(TrainerCallback):
    """Measures a model's curvature while `transformers.Trainer` trains it.

    The steps of the schedule are the trainer's ``global_step``: updates, regardless of gradient
    accumulation. Training stays bit-identical. Curvature is computed in full precision, whatever
    the trainer's.

    The state is stored in each checkpoint's folder, in a separate file, written atomically and read
    without pickle, since trainer_state.json cannot hold tensors. A resumed run continues the
    records and has the last eigenspace as warm start.

    Args:
        task: Called with the model and a batch: `CausalLMTask`, `ModelLossTask`, or any callable
            ``(model, batch) -> scalar mean loss``. None takes the model's own loss: for causal
            language models by the memory-efficient `CausalLMTask`, for others by `ModelLossTask`.
            Batches are weighted by their valid labels, as by the Trainer's ``num_items_in_batch``.
            A Trainer with a different loss (`compute_loss_func`, a custom `compute_loss`, smoothed
            labels) needs a task.
        batches: The probe set, dict batches. None takes samples of the training loader, read once,
            in an order with its own seed, without disturbing it.
        k: Number of eigenpairs; default 10.
        samples: Maximal number of samples; default all of `batches`, or from the training loader
            the size of four batches.
        loggers: Objects with ``log(record, step)``; None takes TensorBoard and Weights & Biases if
            the trainer's ``report_to`` names them.
        name: Prefix of logged names, before a slash, and name of the file in checkpoints; default
            "curvature".
        resume_from: The checkpoint's folder, for a run resumed from outside of its ``output_dir``;
            by default found there.
        **arguments: Further arguments of `CurvatureMonitor`: quantities, schedule, max_fraction,
            params, curvature, ``options=MonitorOptions(...)``, ...

    Attributes:
        monitor: The `CurvatureMonitor`, from the start of training; None before.
        records: All records.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: When training starts, if the training loader cannot be read without disturbing
            it, there is no task and the Trainer's loss is not the model's own, or the file in the
            checkpoint is damaged.

    Example:
        >>> watch = hesscurv.integrations.CurvatureTrainerCallback(k=5)
        >>> trainer = transformers.Trainer(net, args, callbacks=[watch])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> watch.records  # until then
        []
    """

    @seed_moved
    @moved_to_options(MonitorOptions, {"operator_options": OPERATOR_OPTIONS})
    @forwarded(CurvatureMonitor)
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
        **arguments: Any,
    ) -> None:
        self._hosted = HostedMonitor(task, batches, k, samples, arguments)
        self._loggers = None if loggers is None else list(loggers)
        self._own_loggers: list[Any] = []
        self._resume_from = None if resume_from is None else Path(resume_from)
        self.name = name

    def __repr__(self) -> str:
        """Return the name, the settings, and the number of measurements."""
        return describe_object(self, name=self.name, **self._hosted.description())

    @property
    def monitor(self) -> Any:
        """The monitor, once training has started."""
        return self._hosted.monitor

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records so far."""
        return self._hosted.records

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read probe set and checkpoint, and measure before the first step if due."""
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
        """Measure if due."""
        self.monitor.step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state in the folder of the saved checkpoint."""
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
        """Close the loggers opened here."""
        for logger in self._own_loggers:
            if hasattr(logger, "close"):
                logger.close()

    @property
    def file_name(self) -> str:
        """Name of the file in a checkpoint's folder."""
        return f"{as_file_name(self.name)}_monitor.pt"

    def _read(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Return the state in the checkpoint that the run was resumed from; empty without one."""
        given = self._resume_from
        if given is None and isinstance(args.resume_from_checkpoint, str):
            given = Path(args.resume_from_checkpoint)
        folder = _checkpoint(args, state) if given is None else given
        path = folder / self.file_name
        if not path.is_file() or not (given or _is_of(folder, state)):
            warnings.warn(
                f"the run was resumed at step {state.global_step}, and {folder} has no state of "
                "the monitor that fits; records start over. Name the checkpoint's folder: "
                "CurvatureTrainerCallback(resume_from=...)",
                MonitorWarning,
                stacklevel=2,
            )
            return {}
        try:
            return read_checked(path)
        except ValueError as error:
            raise ValueError(f"{error}; remove the file to start the records over") from error

    def _reporters(self, args: TrainingArguments) -> list[Any]:
        """Return loggers for the trainer's ``report_to``."""
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
    """Whether a checkpoint has the log history of the trainer's present state."""
    try:
        saved = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    history = json.loads(json.dumps(state.log_history))
    return bool(saved.get("log_history") == history)
