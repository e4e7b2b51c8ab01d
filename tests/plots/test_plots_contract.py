"""What holds for every figure: nothing global changes, bad input is refused, eyes differ."""

import io
import itertools
import sys
import warnings

import numpy as np
import pytest
import torch
from plots import recorded

from hesscurv import plots
from hesscurv.plots import canvas

matplotlib = pytest.importorskip("matplotlib")

OF_RECORDS = {
    "eigenvalues": (plots.eigenvalues, "eigenvalues"),
    "overlap_by_k": (plots.overlap_by_k, "overlap_by_k"),
    "overlap_by_step": (plots.overlap_by_step, "overlap"),
    "leverage": (plots.leverage, "leverage_by_parameter"),
    "sparsity": (plots.sparsity, "sparsity_by_parameter"),
    "by_parameter": (
        lambda r, ax=None: plots.by_parameter(r, "mask_by_parameter", ax),
        "mask_by_parameter",
    ),
    "by_step": (lambda r, ax=None: plots.by_step(r, "loss", ax), "loss"),
    "sharpness": (plots.sharpness, "sharpness"),
    "space_overlaps": (plots.space_overlaps, "space_overlaps"),
    "mask_ious": (plots.mask_ious, "mask_ious"),
}
every_figure = pytest.mark.parametrize("name", OF_RECORDS)


def test_every_figure_is_tested():
    assert {*OF_RECORDS, "spectrum"} == set(plots.__all__)


@pytest.fixture
def unchanged():
    """Fail if a setting, the backend or the open figures of pyplot change."""
    from matplotlib import pyplot as plt

    before = dict(matplotlib.rcParams), plt.get_fignums(), matplotlib.get_backend()
    yield
    assert (dict(matplotlib.rcParams), plt.get_fignums(), matplotlib.get_backend()) == before


@every_figure
def test_a_figure_is_written_without_warning_and_nothing_global_changes(name, unchanged):
    ax = OF_RECORDS[name][0](recorded.run())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.savefig(file := io.BytesIO(), dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_spectrum_is_written_and_nothing_global_changes(unchanged):
    plots.spectrum(recorded.pairs()).figure.savefig(io.BytesIO(), dpi=40)


@every_figure
def test_the_axes_that_are_given_are_those_drawn_into(name):
    figure = matplotlib.figure.Figure()
    left, _ = figure.subplots(1, 2)
    assert OF_RECORDS[name][0](recorded.run(), ax=left) is left
    assert left.has_data()


@every_figure
@pytest.mark.parametrize("ax", ["axes", [None, None]])
def test_what_is_no_axes_is_refused(name, ax):
    with pytest.raises(TypeError, match="expected ax to be one matplotlib Axes"):
        OF_RECORDS[name][0](recorded.run(), ax=ax)


@every_figure
def test_a_monitor_stands_for_its_records(name):
    class Monitor:
        records = recorded.run()

    assert OF_RECORDS[name][0](Monitor()).has_data()


@every_figure
def test_one_record_is_enough(name):
    one = [recorded.record(30)]
    OF_RECORDS[name][0](one).figure.savefig(io.BytesIO(), dpi=40)


@every_figure
@pytest.mark.parametrize("fail", [True, False], ids=["failed", "without"])
def test_records_without_the_quantity_are_refused_by_its_name(name, fail):
    draw, quantity = OF_RECORDS[name]
    records = [recorded.failure(0)] if fail else [{"step": 0, "status": "ok", "seconds": 1.0}]
    with pytest.raises(ValueError, match=f"expected records that hold '{quantity}'") as caught:
        draw(records)
    assert ("1 failed" in str(caught.value)) == fail
    assert "they hold" in str(caught.value)


@every_figure
def test_no_record_is_refused(name):
    with pytest.raises(ValueError, match="at least one record"):
        OF_RECORDS[name][0]([])


@every_figure
@pytest.mark.parametrize("records", [3, "run.json", [1, 2], [{"loss": 1.0}]])
def test_what_is_no_record_is_refused(name, records):
    with pytest.raises(TypeError, match="expected"):
        OF_RECORDS[name][0](records)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plots.spectrum([1.0]), TypeError, "expected Eigenpairs, a record"),
        (lambda: plots.spectrum(torch.eye(2)), TypeError, r"got \(2, 2\)"),
        (lambda: plots.spectrum(torch.zeros(3)), ValueError, "finite and not zero"),
        (lambda: plots.spectrum(torch.empty(0)), ValueError, "got 0 without one"),
        (lambda: plots.overlap_by_k(torch.rand(40)), TypeError, "expected `pairs` beside scores"),
        (
            lambda: plots.overlap_by_k(recorded.run(), recorded.pairs()),
            TypeError,
            "expected scores",
        ),
        (
            lambda: plots.overlap_by_k(recorded.run(), num_parameters=3),
            ValueError,
            "expected num_parameters >= 4",
        ),
        (lambda: plots.leverage({}), ValueError, "at least one parameter"),
        (lambda: plots.sparsity({"a": "half"}), TypeError, "number, got str for 'a'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@every_figure
def test_without_matplotlib_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hesscurv\[plots\]'"):
        OF_RECORDS[name][0](recorded.run())


# Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009), table 1, severity 1: linear RGB as it is
# seen without the cones for long, middle and short waves.
SEEN = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(rgb, seen):
    """CIELAB of a colour, as an eye of that kind sees it."""
    rgb = np.asarray(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(seen) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", SEEN)
def test_colours_that_meet_in_one_figure_differ_for_every_eye(eye):
    # A CIE 1976 distance of 2.3 is just seen; 20 is plain at a glance.
    together = [
        (canvas.BLUE, canvas.RED, canvas.GREY),
        (canvas.BLUE, canvas.SKY, canvas.RED, canvas.GREY),
        (canvas.RED, canvas.PURPLE, canvas.BLUE),
        (canvas.BLUE, canvas.ORANGE),
    ]
    for colors in together:
        for one, other in itertools.combinations(colors, 2):
            a, b = (lab(matplotlib.colors.to_rgb(c), SEEN[eye]) for c in (one, other))
            assert np.linalg.norm(a - b) > 20, (one, other)


@pytest.mark.parametrize("eye", SEEN)
def test_the_heat_maps_get_lighter_all_along_for_every_eye(eye):
    scale = matplotlib.colormaps[canvas.SEQUENTIAL]
    lightness = [lab(scale(x)[:3], SEEN[eye])[0] for x in np.linspace(0, 1, 30)]
    assert (np.diff(lightness) > 0).all()
