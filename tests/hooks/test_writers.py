"""Files of records: nothing lost, no half lines, readable by others."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import pytest
from hooks.watched import TASK, data, net

from hesscurv.hooks import CSVWriter, CurvatureMonitor, JSONLinesWriter, every, read_records

RECORDS = [
    {"step": 0, "status": "ok", "sharpness": 1.5, "eigenvalues": [1.5, -1.0]},
    {"step": 3, "status": "failed", "error": 'RuntimeError: a, "b"\nand more'},
    {"step": 6, "status": "ok", "sharpness": 2.5, "overlap_by_parameter": {"a.weight": 0.25}},
]


def test_json_lines_are_read_as_written(tmp_path):
    writer = JSONLinesWriter(tmp_path / "run.jsonl")
    for record in RECORDS:
        writer.log(record, record["step"])
    assert read_records(tmp_path / "run.jsonl") == RECORDS
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_of_two_records_of_a_step_the_last_counts(tmp_path):
    writer = JSONLinesWriter(tmp_path / "run.jsonl")
    for step, value in [(0, 1.0), (5, 2.0), (10, 3.0), (5, 4.0)]:
        writer.log({"step": step, "sharpness": value}, step)
    found = read_records(tmp_path / "run.jsonl")
    assert [(r["step"], r["sharpness"]) for r in found] == [(0, 1.0), (5, 4.0), (10, 3.0)]


@pytest.mark.parametrize("size", [10, 10_000])
def test_half_a_line_is_not_read_and_is_removed_by_the_next_writer(tmp_path, size):
    path = tmp_path / "run.jsonl"
    JSONLinesWriter(path).log(RECORDS[0], 0)
    with open(path, "a") as file:
        file.write('{"step": 3, "status": "' + size * "o")
    assert read_records(path) == RECORDS[:1]
    JSONLinesWriter(path).log(RECORDS[1], 3)
    assert read_records(path) == RECORDS[:2]


def test_a_line_of_something_else_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 0}\nhello\n')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_a_table_gets_columns_as_they_come(tmp_path):
    writer = CSVWriter(tmp_path / "run.csv")
    for record in RECORDS:
        writer.log(record, record["step"])
    writer.log({"step": 9, "status": "ok", "sharpness": 3.5}, 9)
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "3", "6", "9"]
    assert [row["sharpness"] for row in rows] == ["1.5", "", "2.5", "3.5"]
    assert json.loads(rows[0]["eigenvalues"]) == [1.5, -1.0]
    assert json.loads(rows[2]["overlap_by_parameter"]) == {"a.weight": 0.25}
    assert rows[1]["error"] == 'RuntimeError: a, "b" and more'
    assert list(tmp_path.iterdir()) == [tmp_path / "run.csv"]


def test_a_table_is_gone_on_with_and_half_a_row_is_dropped(tmp_path):
    path = tmp_path / "run.csv"
    CSVWriter(path).log(RECORDS[0], 0)
    for extra in ({}, {"new": 1}):
        with open(path, "a") as file:
            file.write("5,ok,9")
        CSVWriter(path).log({**RECORDS[2], **extra}, 6)
    with open(path, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "6", "6"]


PROGRAM = """
import sys
from hesscurv.hooks import CSVWriter, JSONLinesWriter
writers = [JSONLinesWriter(sys.argv[1]), CSVWriter(sys.argv[2])]
step = 0
while True:
    for writer in writers:
        writer.log({"step": step, "eigenvalues": [0.5] * 500, f"key{step % 7}": step}, step)
    step += 1
    print(step, flush=True)
"""


def test_a_kill_leaves_whole_lines(tmp_path):
    lines, table = tmp_path / "run.jsonl", tmp_path / "run.csv"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, lines, table],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for _ in range(25):
        written = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert lines.read_bytes().endswith(b"\n")
    assert table.read_bytes().endswith(b"\n")
    assert len(read_records(lines)) >= written
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= written
    assert all(json.loads(row["eigenvalues"]) == [0.5] * 500 for row in rows)


@pytest.mark.parametrize("kind", [JSONLinesWriter, CSVWriter])
def test_a_folder_that_is_not_there_is_refused(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        kind(tmp_path / "none" / "run")


def test_a_run_writes_its_records(tmp_path):
    model = net()
    loggers = [JSONLinesWriter(tmp_path / "run.jsonl"), CSVWriter(tmp_path / "run.csv")]
    monitor = CurvatureMonitor(
        model, TASK, data(1), 3, quantities="full", schedule=every(2), loggers=loggers
    )
    for step in range(5):
        monitor.step(step)
    assert read_records(tmp_path / "run.jsonl") == monitor.records
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, monitor.records, strict=True):
        assert math.isclose(float(row["sharpness"]), record["sharpness"])


WRITERS = {"jsonl": JSONLinesWriter, "csv": CSVWriter}


def rows_of(path, kind):
    if kind == "jsonl":
        return [record["step"] for record in read_records(path)]
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path, kind):
    target, link = tmp_path / "run", tmp_path / "latest"
    link.symlink_to("run")
    writer = WRITERS[kind](link)
    writer.log(RECORDS[0], 0)
    target.chmod(0o640)
    for record in RECORDS[1:]:  # with new columns
        writer.log(record, record["step"])
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert rows_of(target, kind) == [0, 3, 6]


@pytest.mark.parametrize("kind", WRITERS)
def test_records_go_through_a_fifo(tmp_path, kind):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    writer = WRITERS[kind](path)
    with pytest.raises(OSError, match="No such device"):  # nobody reads, and nobody waits
        writer.log(RECORDS[0], 0)
    keep = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for record in RECORDS:
            writer.log(record, record["step"])
            got.append(os.read(keep, 10_000).decode())
    finally:
        os.close(keep)
    if kind == "jsonl":
        assert [json.loads(text) for text in got] == RECORDS
    else:
        assert [text.count("step,") for text in got] == [1, 1, 1]  # the columns grew each time


def test_a_table_with_cells_of_any_length_gets_columns(tmp_path):
    path = tmp_path / "run.csv"
    writer = CSVWriter(path)
    values = [1 / 3] * 20_000  # longer than the csv module reads by default
    writer.log({"step": 0, "eigenvalues": values}, 0)
    writer.log({"step": 1, "eigenvalues": values, "loss": 1.0}, 1)
    limit = csv.field_size_limit(10**7)
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    finally:
        csv.field_size_limit(limit)
    assert [row["loss"] for row in rows] == ["", "1.0"]
    assert [json.loads(row["eigenvalues"]) for row in rows] == [values, values]


def test_a_table_that_a_spreadsheet_has_saved_is_gone_on_with(tmp_path):
    path = tmp_path / "run.csv"
    path.write_bytes(b"step,loss\r\n0,1.5\r\n")
    CSVWriter(path).log({"step": 1, "loss": 1.0, "trace": 2.0}, 1)
    with open(path, newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "0", "loss": "1.5", "trace": ""},
            {"step": "1", "loss": "1.0", "trace": "2.0"},
        ]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80" * 100])
def test_another_kind_of_file_is_not_made_a_table(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content + b"\n")
    with pytest.raises(ValueError, match="got another kind of file"):
        CSVWriter(path).log(RECORDS[0], 0)
    assert path.read_bytes() == content + b"\n"


@pytest.mark.parametrize(
    "line", [b"{}", b"[1]", b"\xff", b"[" * 10**5, b'{"step": "a"}', b'{"step": [1]}', b"null"]
)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "run.jsonl"
    JSONLinesWriter(path).log(RECORDS[0], 0)
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match="in line 2 of"):
        read_records(path)


def test_a_folder_holds_no_records(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_records(tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_any_name_is_written_and_read(tmp_path, kind):
    names = ["a$_b^$", "层", 'a,b;"c"', "new\nline", "\ud800", "x" * 500, "<b>", ""]
    values = {name: float(i) for i, name in enumerate(names)}
    path = tmp_path / "run"
    WRITERS[kind](path).log({"step": 0, "sparsity_by_parameter": values, "event": "\ud800"}, 0)
    if kind == "jsonl":
        assert read_records(path)[0]["sparsity_by_parameter"] == values
    else:
        with open(path, newline="") as file:
            (row,) = csv.DictReader(file)
        assert json.loads(row["sparsity_by_parameter"]) == values


def test_standard_output_is_a_place_for_records(tmp_path):
    code = (
        "from hesscurv.hooks import JSONLinesWriter\n"
        "print('half a line', end=' ', flush=True)\n"
        "JSONLinesWriter('/dev/stdout').log({'step': 1, 'loss': 0.5}, 1)\n"
    )
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == 'half a line {"step": 1, "loss": 0.5}\n'
