"""TensorBoard and Weights & Biases loggers for records of a `CurvatureMonitor`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hesscurv.interface.descriptions import Described, describe_object

Figures = Mapping[str, Callable[[list[dict[str, Any]]], Any]]


@dataclass(repr=False)
class FlatRecord(Described):
    """A record with its values sorted by kind, under full names.

    Args:
        scalars: Numbers.
        histograms: Lists of numbers.
        figures: Matplotlib's figures.
        texts: Errors and events.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def flatten_record(record: Mapping[str, Any], prefix: str = "curvature/") -> FlatRecord:
    """Sort a record's values by kind; nested mappings are named prefix + name/inner name.

    Omitted are the step, None, empty lists, lists of anything but numbers, and the status "ok".

    Args:
        record: A record, or any mapping of names to values.
        prefix: Prefix of every name; default "curvature/".

    Returns:
        The sorted values.
    """
    flat = FlatRecord()
    for key, value in record.items():
        name = _as_unicode(f"{prefix}{key}")
        if key == "step" or value is None or (key == "status" and value == "ok"):
            continue
        if isinstance(value, Mapping):
            inner = flatten_record(value, f"{name}/")
            for mine, more in zip(vars(flat).values(), vars(inner).values(), strict=True):
                mine.update(more)
        elif isinstance(value, str):
            flat.texts[name] = _as_unicode(value)
        elif hasattr(value, "savefig"):
            flat.figures[name] = value
        elif _is_number(value):
            flat.scalars[name] = float(value)
        elif isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
            flat.histograms[name] = [float(v) for v in value]
    return flat


class TensorBoardLogger:
    """Writes records to TensorBoard: scalars, eigenvalues as histograms, figures, errors as text.

    Args:
        log_dir: The folder of the event files; or an existing
            `torch.utils.tensorboard.SummaryWriter`, which the caller closes.
        prefix: Prefix of every name; default "curvature/".
        figures: Functions by name that draw all records so far and return matplotlib's figure or
            axes, such as `hesscurv.plots.sharpness`; called with each record. Default none.

    Raises:
        ImportError: If TensorBoard is not installed.
        TypeError: If `log_dir` is neither a folder's name nor a writer.

    Example:
        >>> logger = hesscurv.integrations.TensorBoardLogger("runs")
        >>> for record in monitor.records:
        ...     logger.log(record, record["step"])
        >>> logger.close()
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | Any,
        *,
        prefix: str = "curvature/",
        figures: Figures | None = None,
    ) -> None:
        self._owned = isinstance(log_dir, (str, os.PathLike))
        if self._owned:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoardLogger needs TensorBoard; install it with "
                    "pip install 'hesscurv[loggers]'"
                ) from error
            self.writer: Any = SummaryWriter(os.fspath(log_dir))
        elif not all(hasattr(log_dir, name) for name in ("add_scalar", "add_histogram")):
            raise TypeError(
                "expected a folder or a torch.utils.tensorboard.SummaryWriter, got a "
                f"{type(log_dir).__name__}"
            )
        else:
            self.writer = log_dir
        self.prefix, self.figures = prefix, dict(figures or {})
        self._records: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        """Return the folder and the prefix."""
        folder = getattr(self.writer, "log_dir", None)
        return describe_object(self, log_dir=folder, prefix=self.prefix, figures=list(self.figures))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Write one record and flush."""
        flat = flatten_record(record, self.prefix)
        for name, number in flat.scalars.items():
            self.writer.add_scalar(name, number, step)
        for name, numbers in flat.histograms.items():
            self.writer.add_histogram(name, _array(numbers), step)
        for name, text in flat.texts.items():
            self.writer.add_text(name, text, step)
        self.writer.flush()
        drawn = _draw(record, self.figures, self._records, self.prefix)
        for name, figure in {**flat.figures, **drawn}.items():
            self.writer.add_figure(name, figure, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file, if it was opened here."""
        if self._owned:
            self.writer.close()


class WandbLogger:
    """Sends records to Weights & Biases: scalars, eigenvalues as histograms, figures as images.

    Values are plotted against a separate metric, the training step, instead of the number of calls
    of ``wandb.log``, so they are independent of other logged values and their order.

    Args:
        run: The run; None takes the one of ``wandb.init`` at the first record.
        prefix: Prefix of every name; default "curvature/".
        step_metric: The metric of the x axis; default `prefix` + "step". Use that of another logger
            to share its axis: "trainer/global_step" is Lightning's, "train/global_step" that of
            Transformers.
        figures: As for `TensorBoardLogger`.

    Raises:
        ImportError: If wandb is not installed.
        RuntimeError: By `log`, if there is no run.

    Example:
        >>> logger = hesscurv.integrations.WandbLogger()  # doctest: +SKIP
        >>> logger.log(monitor.records[-1], step=2)  # doctest: +SKIP
    """

    def __init__(
        self,
        run: Any = None,
        *,
        prefix: str = "curvature/",
        step_metric: str | None = None,
        figures: Figures | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "WandbLogger needs wandb; install it with pip install 'hesscurv[loggers]'"
            ) from error
        self._wandb = wandb
        self.run = run
        self.prefix, self.figures = prefix, dict(figures or {})
        self.step_metric = step_metric or f"{prefix}step"
        self._records: list[dict[str, Any]] = []
        self._defined: Any = None

    def __repr__(self) -> str:
        """Return the run, the prefix and the step metric."""
        return describe_object(
            self,
            run=getattr(self.run, "name", None),
            prefix=self.prefix,
            step_metric=self.step_metric,
            figures=list(self.figures),
        )

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send one record."""
        run = self._wandb.run if self.run is None else self.run
        if run is None:
            raise RuntimeError("expected a run; call wandb.init(...) before the first measurement")
        if self._defined is not run:
            if self.step_metric.startswith(self.prefix):  # otherwise owned by another logger
                run.define_metric(self.step_metric, hidden=True)
            run.define_metric(f"{self.prefix}*", step_metric=self.step_metric)
            self._defined = run
        flat = flatten_record(record, self.prefix)
        values: dict[str, Any] = {self.step_metric: step, **flat.scalars, **flat.texts}
        for name, numbers in flat.histograms.items():
            values[name] = self._wandb.Histogram(numbers)
        run.log(values)
        drawn = {**flat.figures, **_draw(record, self.figures, self._records, self.prefix)}
        images = {name: self._wandb.Image(_rendered(figure)) for name, figure in drawn.items()}
        if images:
            run.log({self.step_metric: step, **images})


def _draw(
    record: Mapping[str, Any], figures: Figures, records: list[dict[str, Any]], prefix: str
) -> dict[str, Any]:
    """Return figures of all records so far, which are kept only if there are figures to draw."""
    if figures:
        records.append(dict(record))
    # `.figure` of axes is their figure, that of a figure is itself.
    return {f"{prefix}{name}": draw(list(records)).figure for name, draw in figures.items()}


def _rendered(figure: Any) -> Any:
    """Render a figure as an image, since wandb's own conversion needs pyplot."""
    from PIL import Image  # a dependency of matplotlib

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    if "matplotlib.pyplot" in sys.modules:  # which keeps the figures that it has made
        sys.modules["matplotlib.pyplot"].close(figure)
    return Image.open(buffer)


def _as_unicode(text: str) -> str:
    # A module's name may have lone surrogates, which protocol buffers refuse.
    return text.encode("utf-8", "backslashreplace").decode()


def _is_number(value: Any) -> bool:
    # Also NumPy scalars, which are neither int nor float.
    return isinstance(value, (int, float)) or (
        getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    )


def _array(numbers: list[float]) -> Any:
    import numpy

    return numpy.array(numbers)
