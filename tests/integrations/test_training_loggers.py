"""Records in TensorBoard and in Weights & Biases, read back from what was written."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import hesscurv
from hesscurv import plots
from hesscurv.hooks import CurvatureMonitor, every
from hesscurv.integrations import TensorBoardLogger, WandbLogger
from hesscurv.integrations.training.training_loggers import flatten_record

RECORD = {
    "step": 7,
    "status": "ok",
    "eigenvalues": [3.0, -2.0, 0.5],
    "sharpness": 3.0,
    "converged": 3,
    "gradient_share": None,
    "overlap_by_parameter": {"0.weight": 0.25, "0.bias": 0.0},
    "space_overlaps": [[0, 0.5], [5, 0.9]],
    "event": "pruned",
}


def test_a_record_is_sorted_by_kind_under_flat_names():
    flat = flatten_record(RECORD)
    assert flat.scalars == {
        "curvature/sharpness": 3.0,
        "curvature/converged": 3.0,
        "curvature/overlap_by_parameter/0.weight": 0.25,
        "curvature/overlap_by_parameter/0.bias": 0.0,
    }
    assert flat.histograms == {"curvature/eigenvalues": [3.0, -2.0, 0.5]}
    assert flat.texts == {"curvature/event": "pruned"}
    assert flatten_record({"status": "failed"}, "a/").texts == {"a/status": "failed"}


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    return EventAccumulator(str(folder), sizes).Reload()


def test_tensorboard_has_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    logger = TensorBoardLogger(tmp_path, prefix="run/", figures={"history": plots.sharpness})
    logger.log(RECORD, 7)
    logger.log({**RECORD, "step": 9, "sharpness": 4.0}, 9)
    events = read(tmp_path)  # before it is closed: a kill loses nothing
    logger.close()
    assert [(e.step, e.value) for e in events.Scalars("run/sharpness")] == [(7, 3.0), (9, 4.0)]
    assert events.Scalars("run/overlap_by_parameter/0.weight")[0].value == 0.25
    histogram = events.Histograms("run/eigenvalues")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (3, -2.0, 3.0)
    assert [e.step for e in events.Images("run/history")] == [7, 9]
    assert events.Tensors("run/event/text_summary")[0].tensor_proto.string_val == [b"pruned"]


def test_tensorboard_takes_any_name(tmp_path):
    pytest.importorskip("tensorboard")
    names = ["a$_b^$", "a_", "层", "x/y", "new\nline", "\ud800", "z" * 500, "<b>", ""]
    logger = TensorBoardLogger(tmp_path)
    logger.log({"step": 1, "by": {name: float(i) for i, name in enumerate(names)}}, 1)
    logger.log({"step": 2, "event": "\ud800"}, 2)
    logger.close()
    events = read(tmp_path)
    values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    shown = [name.replace("\ud800", "\\ud800") for name in names]
    assert values == {f"curvature/by/{name}": float(i) for i, name in enumerate(shown)}


def test_loggers_tell_where_they_write(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, figures={"history": plots.sharpness})
    logger.close()
    text = repr(logger)
    assert str(tmp_path) in text
    assert "0x" not in text


def test_a_writer_that_is_given_stays_open(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        logger = TensorBoardLogger(writer)
        logger.log(RECORD, 7)
        logger.close()
        writer.add_scalar("mine", 1.0, 8)
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) > {"curvature/sharpness", "mine"}
    with pytest.raises(TypeError, match="a folder or a"):
        TensorBoardLogger(3)


def wandb_records(path):
    """The messages of an offline run: a log of LevelDB's format, in blocks of 32 kB."""
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield message
            message = b""


def wandb_history(folder):
    """The rows of an offline run and the metrics that others are drawn over."""
    from wandb.proto.wandb_internal_pb2 import Record

    path = next(folder.rglob("offline-run*/*.wandb"))
    rows, metrics = [], {}
    for message in wandb_records(path):
        record = Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            for key, value in [*row.items()]:  # older versions nest what newer ones write flat
                if isinstance(value, dict):
                    row |= {f"{key}.{name}": inner for name, inner in value.items()}
            rows.append(row)
        if record.WhichOneof("record_type") == "metric":
            metrics[record.metric.glob_name] = record.metric.step_metric
    return rows, metrics


def test_weights_and_biases_has_what_was_logged(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("matplotlib")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "other"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(RuntimeError, match=r"wandb.init"):
        WandbLogger().log(RECORD, 7)
    quiet = ("x_disable_stats", "x_disable_meta")  # of newer versions
    quiet = {name: True for name in quiet if hasattr(wandb.Settings(), name)}
    settings = wandb.Settings(console="off", disable_git=True, **quiet)
    run = wandb.init(project="test", dir=tmp_path, settings=settings)
    try:
        logger = WandbLogger(figures={"history": plots.sharpness})  # finds the run by itself
        logger.log(RECORD, 7)
        run.log({"mine": 1.0})
        logger.log({**RECORD, "step": 9, "sharpness": 4.0}, 9)
        summary = dict(run.summary)
    finally:
        run.finish()
    assert summary["curvature/sharpness"] == 4.0
    rows, metrics = wandb_history(tmp_path)
    for _ in range(50):  # a process of its own writes them, in its own time
        if rows:
            break
        time.sleep(0.2)
        rows, metrics = wandb_history(tmp_path)
    found = [
        (row["curvature/step"], row["curvature/sharpness"])
        for row in rows
        if "curvature/sharpness" in row
    ]
    assert found == [(7, 3.0), (9, 4.0)]
    first = rows[0]
    assert first["curvature/overlap_by_parameter/0.weight"] == 0.25
    assert first["curvature/event"] == "pruned"
    assert first["curvature/eigenvalues._type"] == "histogram"
    assert sum(first["curvature/eigenvalues.values"]) == 3
    images = [row["curvature/step"] for row in rows if "curvature/history._type" in row]
    assert images == [7, 9]
    assert metrics["curvature/*"] == "curvature/step"


def test_a_monitor_writes_to_both_kinds_of_logger(tmp_path):
    pytest.importorskip("tensorboard")
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    monitor = CurvatureMonitor(
        model,
        hesscurv.supervised(nn.CrossEntropyLoss()),
        [(x, torch.randint(0, 2, (8,)))],
        k=2,
        quantities="overlap",
        schedule=every(1),
        loggers=[TensorBoardLogger(tmp_path)],
    )
    for step in range(2):
        assert monitor.step(step)["status"] == "ok"
    tags = read(tmp_path).Tags()
    assert {"curvature/sharpness", "curvature/overlap_by_parameter/weight"} <= set(tags["scalars"])
    assert "curvature/eigenvalues" in tags["histograms"]


WITHOUT = """
import builtins, sys
found = builtins.__import__
def without(name, *args, **kwargs):
    if name.split(".")[0] in {"lightning", "transformers", "tensorboard", "wandb"}:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return found(name, *args, **kwargs)
builtins.__import__ = without
import hesscurv.integrations as integrations
for name, use in {
    "lightning": lambda: integrations.CurvatureCallback,
    "transformers": lambda: integrations.CurvatureTrainerCallback,
    "loggers": lambda: integrations.TensorBoardLogger("runs"),
    "loggers ": lambda: integrations.WandbLogger(),
}.items():
    try:
        use()
    except ImportError as error:
        assert f"hesscurv[{name.strip()}]" in str(error), error
    else:
        raise AssertionError(name)
try:
    integrations.Nothing
except AttributeError as error:
    assert "Nothing" in str(error)
assert {"CurvatureCallback", "CurvatureTrainerCallback", "CausalLMTask"} <= set(dir(integrations))
"""


def test_without_the_libraries_it_imports_and_names_the_extra():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
