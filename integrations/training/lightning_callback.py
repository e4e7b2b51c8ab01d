"""Lightning callback that measures curvature after optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, loggers
from torch import Tensor

from hesscurv.hooks import CurvatureMonitor, MonitorOptions
from hesscurv.hooks.monitoring.monitor_options import OPERATOR_OPTIONS
from hesscurv.integrations.training.hosted_monitor import AllGroups, HostedMonitor
from hesscurv.integrations.training.training_loggers import (
    TensorBoardLogger,
    WandbLogger,
    flatten_record,
)
from hesscurv.integrations.training.training_step_task import TrainingStepTask, check_training_step
from hesscurv.interface.descriptions import describe_object
from hesscurv.interface.moved_arguments import forwarded, moved_to_options, seed_moved


class CurvatureCallback(Callback):
    """Measures a LightningModule's curvature while `Trainer.fit` trains it.

    The steps of the schedule are the trainer's ``global_step``: optimizer steps, regardless of
    gradient accumulation. Training stays bit-identical. The state is stored in Lightning's
    checkpoints, so that a resumed run continues the records and has the last eigenspace as warm
    start. In DDP every rank measures its share, and rank 0 logs. Curvature is computed in full
    precision, whatever the precision plugin.

    Args:
        task: A task such as `supervised(loss)`, called with the module and a batch, or any callable
            ``(module, batch) -> scalar mean loss``. None takes the module's own training step, see
            `TrainingStepTask`, which needs automatic optimization.
        batches: The probe set: batches as the training loader yields them, passed through the
            module's batch transfer hooks as in training. None takes samples of the training loader,
            read once, in an order with its own seed, without disturbing it.
        k: Number of eigenpairs; default 10.
        samples: Maximal number of samples; default all of `batches`, or from the training loader
            the size of four batches.
        loggers: Objects with ``log(record, step)``; None takes the trainer's loggers: scalars go to
            all, histograms to those of TensorBoard and Weights & Biases.
        name: Prefix of logged names, before a slash, and key of the callback in a checkpoint;
            default "curvature".
        **arguments: Further arguments of `CurvatureMonitor`: quantities, schedule, max_fraction,
            params, curvature, ``options=MonitorOptions(...)``, ...

    Attributes:
        monitor: The `CurvatureMonitor`, from the start of training; None before.
        records: All records.

    Raises:
        TypeError: If an argument has the wrong type; when training starts, if the training step is
            the task but not a function of a batch.
        ValueError: When training starts, if the training loader cannot be read without disturbing
            it.

    Example:
        >>> watch = hesscurv.integrations.CurvatureCallback(k=5)
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[watch])  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
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
        **arguments: Any,
    ) -> None:
        self._hosted = HostedMonitor(task, batches, k, samples, arguments)
        self._loggers = None if loggers is None else list(loggers)
        self.name = name
        self._step = 0

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

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints."""
        return self._generate_state_key(name=self.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the probe set, and measure before the first step if due."""
        if self._hosted.task is None:
            check_training_step(pl_module)

        def convert(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        given = self._loggers
        self._hosted.begin(
            # In DDP the wrapper, which determines whose buffers are used.
            pl_module if trainer.model is None else trainer.model,
            TrainingStepTask(),
            trainer.train_dataloader,
            AllGroups(trainer.optimizers),
            [_TrainerLoggers(trainer, self.name)] if given is None else given,
            convert,
        )
        self._step = trainer.global_step
        self.monitor.step(self._step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if an optimizer has taken a step and a measurement is due."""
        if trainer.global_step != self._step:  # otherwise gradients were accumulated
            self._step = trainer.global_step
            self.monitor.step(self._step)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, for a checkpoint."""
        return self._hosted.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the state in a checkpoint."""
        self._hosted.load_state_dict(state_dict)


class _TrainerLoggers:
    """The trainer's own loggers.

    Args:
        trainer: The trainer.
        name: Prefix of names.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer, self._prefix = trainer, f"{name}/"
        self._by_id: dict[int, Any] = {}

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log a record to each logger."""
        for logger in self._trainer.loggers:
            if id(logger) not in self._by_id:
                self._by_id[id(logger)] = self._adapted(logger)
            own = self._by_id[id(logger)]
            if own is None:
                logger.log_metrics(flatten_record(record, self._prefix).scalars, step=step)
            else:
                own.log(record, step)

    def _adapted(self, logger: Any) -> Any:
        """Return an adapter that also logs histograms, if the logger supports them."""
        if isinstance(logger, loggers.TensorBoardLogger):
            return TensorBoardLogger(logger.experiment, prefix=self._prefix)
        if isinstance(logger, loggers.WandbLogger):
            return WandbLogger(
                logger.experiment, prefix=self._prefix, step_metric="trainer/global_step"
            )
        return None
