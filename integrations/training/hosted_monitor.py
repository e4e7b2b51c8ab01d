"""`CurvatureMonitor` hosted by a training library: probe set, state and creation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hesscurv.hooks import CurvatureMonitor, MonitorOptions
from hesscurv.hooks.monitoring.unchanged import unchanged_random_states
from hesscurv.interface.options import as_options
from hesscurv.interface.ranges import check_generator
from hesscurv.linalg.random_matrices import draw_seed, next_seeds
from hesscurv.objective.data.batches import check_source
from hesscurv.objective.data.curvature_samples import take_samples
from hesscurv.objective.data.samples import describe, num_samples

_BATCHES = 4  # of the training loader, by default


class HostedMonitor:
    """Creates a monitor once there is a model, and passes on a state restored earlier.

    Args:
        task: The task, or None for the library's own loss.
        batches: The probe set, or None for samples of the training loader.
        k: Number of eigenpairs.
        samples: Maximal number of samples; None takes all of given batches, and from a loader the
            size of four batches.
        arguments: Further arguments of `CurvatureMonitor`.

    Raises:
        TypeError: If an argument has the wrong type, or is provided by the library.
        ValueError: If `batches` is a single batch.
    """

    def __init__(
        self,
        task: Callable[..., Tensor] | None,
        batches: Iterable[Any] | None,
        k: int,
        samples: int | None,
        arguments: dict[str, Any],
    ) -> None:
        for name in ("model", "optimizer"):
            if name in arguments:
                raise TypeError(f"expected no {name}: the trainer's own is watched; leave it out")
        if task is not None and not callable(task):
            raise TypeError(
                "expected a task such as hesscurv.supervised(loss), a callable (model, batch) -> "
                f"loss, or None for the trainer's own loss, got a {type(task).__name__}"
            )
        if batches is not None:
            check_source(batches)
        self.task, self.batches, self.k, self.samples = task, batches, k, samples
        self.arguments = dict(arguments)
        as_options(MonitorOptions, arguments.get("options"))
        generator = self.arguments.pop("generator", None)
        check_generator(generator)
        # Each run of the trainer begins from this state, so that all have the same probe set.
        self._random: tuple[torch.device, Tensor] | None = None
        if generator is not None:
            self._random = generator.device, generator.get_state()
            draw_seed(generator)
        self.monitor: CurvatureMonitor | None = None
        self._state: dict[str, Any] | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records, including those before a resumption."""
        if self.monitor is not None:
            return self.monitor.records
        return [] if self._state is None else list(self._state.get("records", ()))

    def description(self) -> dict[str, Any]:
        """Return the settings and the number of measurements, for `repr`."""
        shown = {"task": self.task, "k": self.k}
        shown |= {n: self.arguments[n] for n in ("schedule", "options") if n in self.arguments}
        return shown | {"records": len(self.records)}

    def begin(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        loader: Any,
        optimizer: Any,
        loggers: Iterable[Any],
        convert: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """Create the monitor, or a new one for a different model.

        Args:
            model: The model.
            task: The default task.
            loader: The training loader, used if no batches were given.
            optimizer: An object with param_groups.
            loggers: Receivers of the records.
            convert: Applied to each batch, as in training.

        Raises:
            ValueError: If the loader cannot be read without disturbing training, or arguments are
                invalid.
        """
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                "expected whole parameters, got some that DeepSpeed's ZeRO stage 3 has split; use "
                "DDP, FSDP2 or a lower stage"
            )
        if self.monitor is not None:  # a second run continues the records of the first
            self._state = self.monitor.state_dict()
        generator = None
        if self._random is not None:
            device, state = self._random
            generator = torch.Generator(device)
            generator.set_state(state)
        batches = read_probe_set(
            loader if self.batches is None else self.batches,
            self.samples,
            0 if generator is None else next_seeds(generator, 1)[0],
            convert,
            is_loader=self.batches is None,
        )
        self.monitor = CurvatureMonitor(
            model,
            task if self.task is None else self.task,
            batches,
            self.k,
            optimizer=optimizer,
            loggers=loggers,
            generator=generator,
            **self.arguments,
        )
        if self._state is not None:
            self.monitor.load_state_dict(self._state)
            self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state; empty if there is none."""
        return self._state or {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, now or when the monitor is created."""
        if not state:
            return
        if self.monitor is None:
            self._state = state
        else:
            self.monitor.load_state_dict(state)


class AllGroups:
    """The parameter groups of several optimizers as those of one.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        self._optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All present groups."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def read_probe_set(
    source: Any,
    samples: int | None,
    seed: int,
    convert: Callable[[Any], Any],
    *,
    is_loader: bool,
) -> list[Any]:
    """Read a probe set, the same in every process, without disturbing a running training.

    Args:
        source: The training loader, or batches given by the user.
        samples: Maximal number of samples; None takes all, from a loader the size of four batches.
        seed: Seed of the order of a shuffling loader, and of random augmentation.
        convert: Applied to each batch.
        is_loader: Whether it is the training loader, whose state must not change.

    Raises:
        ValueError: If the loader cannot be read this way.
    """
    if is_loader:
        _check_loader(source)
        samples = _samples_of(source) if samples is None else samples
    devices = list(range(torch.cuda.device_count()))
    with unchanged_random_states(torch.device("cpu")), torch.random.fork_rng(devices):
        _seed(seed)
        read = take_samples(source, [samples], seed)[0]
        with torch.no_grad():
            torch.manual_seed(seed)
            return [convert(batch) for batch in read]


def _check_loader(loader: Any) -> None:
    remedy = "pass a list of batches, or another loader: batches=..."
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"expected a map-style dataset, got the {type(loader.dataset).__name__}, an "
                f"iterable one, whose stream reading a probe set could move on; {remedy}"
            )
        return
    is_list = isinstance(loader, (list, tuple)) and loader
    if not is_list or any(isinstance(part, DataLoader) for part in loader):
        raise ValueError(
            f"expected one training DataLoader to take a probe set from, got {describe(loader)}; "
            f"{remedy}"
        )


def _samples_of(loader: Any) -> int:
    if isinstance(loader, (list, tuple)):
        return sum(map(num_samples, loader[:_BATCHES]))
    sampler = getattr(loader, "batch_sampler", None)
    size = loader.batch_size or getattr(sampler, "batch_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"expected a loader with a batch_size, got one with the {type(sampler).__name__}; say "
            "how many samples to take: samples=..."
        )
    return _BATCHES * size


def _seed(seed: int) -> None:
    """Seed the generators used by augmentation; torch's own is seeded elsewhere."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
