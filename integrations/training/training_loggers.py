"""Records of a `CurvatureMonitor` in TensorBoard and in Weights & Biases."""

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
    """A record, sorted by what its values are drawn as, under full names.

    Args:
        scalars: Numbers.
        histograms: Lists of numbers.
        figures: Matplotlib's figures.
        texts: What went wrong, and events.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def flatten_record(record: Mapping[str, Any], prefix: str = "curvature/") -> FlatRecord:
    """Sort a record's values by kind, and name each: nested mappings as "prefix" + name/inner name.

    The step, None, empty lists and lists of other things than numbers are left out, and so is the
    status "ok".

    Args:
        record: A record, or any mapping of names to values.
        prefix: What every name begins with; default "curvature/".

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
        log_dir: The folder of the event files; or a `torch.utils.tensorboard.SummaryWriter` that
            there is already, which stays the caller's to close.
        prefix: What every name begins with; default "curvature/".
        figures: Functions by name that draw all records so far and return matplotlib's figure or
            axes, such as `hesscurv.plots.sharpness`; called with each record. Default none.

    Raises:
        ImportError: If TensorBoard is not installed.
        TypeError: If `log_dir` is neither a folder's name nor a writer.
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
        """Name the folder and the prefix."""
        folder = getattr(self.writer, "log_dir", None)
        return describe_object(self, log_dir=folder, prefix=self.prefix, figures=list(self.figures))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Write one record; what is written can be seen at once."""
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

    Values are drawn over a metric of their own, the training step, and not over the number of calls
    of ``wandb.log``, so that they neither have to come in the order of others nor move these.

    Args:
        run: The run; None takes the one that ``wandb.init`` has begun, when the first record comes.
        prefix: What every name begins with; default "curvature/".
        step_metric: The metric that values are drawn over; default `prefix` + "step". Name another
            logger's to share an axis with it: "trainer/global_step" is Lightning's,
            "train/global_step" that of Transformers.
        figures: As for `TensorBoardLogger`.

    Raises:
        ImportError: If wandb is not installed.
        RuntimeError: By `log`, if no run has begun.
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
        """Name the run, the prefix and the metric that values are drawn over."""
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
            if self.step_metric.startswith(self.prefix):  # else it is another logger's
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
    """Return figures of this record and all before, which are kept where there are any to draw."""
    if figures:
        records.append(dict(record))
    # Axes have the figure that they lie in; a figure has itself.
    return {f"{prefix}{name}": draw(list(records)).figure for name, draw in figures.items()}


def _rendered(figure: Any) -> Any:
    """Return a figure as an image: wandb's own way takes pyplot to be loaded."""
    from PIL import Image  # which matplotlib, whose figure it is, stands on

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    if "matplotlib.pyplot" in sys.modules:  # which keeps the figures that it has made
        sys.modules["matplotlib.pyplot"].close(figure)
    return Image.open(buffer)


def _as_unicode(text: str) -> str:
    # A module's name may have code points that no encoding has, which protocol buffers refuse.
    return text.encode("utf-8", "backslashreplace").decode()


def _is_number(value: Any) -> bool:
    # Also NumPy's, which are no int or float.
    return isinstance(value, (int, float)) or (
        getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    )


def _array(numbers: list[float]) -> Any:
    import numpy

    return numpy.array(numbers)
