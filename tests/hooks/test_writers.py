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
