"""Jobs that are killed at any moment, or begin in the same one, lose and spoil nothing."""

import json

import pytest
from measured import assert_same, whole
from planted import indefinite, planted
from support.forks import run_source

from hesscurv import assemble


def run(source, folder, *arguments):
    """What a script prints that forks and kills, in a process of its own."""
    return json.loads(run_source(source, folder, *arguments, cwd=folder.parent, sees_tests=True))


# Each job takes 20 chunks of 5 ms and more. It is killed after 0 to 60 ms, until one is faster.
KILLED_JOBS = """
import json, os, random, signal, sys, time, zipfile
from pathlib import Path
from planted import PlainOperator, indefinite, planted
import hesscurv

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
log = os.open(folder.with_name("log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)

class SlowOperator(PlainOperator):
    def _matmat(self, vectors):
        os.write(log, b"x" * vectors.shape[1])
        time.sleep(0.005)
        return super()._matmat(vectors)

def start():
    job = os.fork()
    if job:
        return job
    H = SlowOperator(planted(indefinite(200), 200).matrix)
    code = 1
    try:
        code = 2 if hesscurv.measure(H, 10, folder, outer=40, inner=80, block_size=4) else 0
    finally:
        os._exit(code)

rng, killed, codes = random.Random(seed), 0, []
for attempt in range(40):
    job = start()
    time.sleep(rng.uniform(0, 0.06))
    os.kill(job, signal.SIGKILL)  # no harm if it has ended: it was not waited for yet
    code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    killed += code == -signal.SIGKILL
    for path in folder.glob("*.npz"):
        assert zipfile.ZipFile(path).testzip() is None, path
    if code != -signal.SIGKILL:
        break
code = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
print(json.dumps([killed, code]))
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_jobs_killed_at_any_moment_are_run_again(seed, folder):
    killed, code = run(KILLED_JOBS, folder, seed)
    assert killed >= 3  # or the test shows nothing
    assert code == 0
    products = folder.with_name("log").stat().st_size
    assert 80 <= products <= 80 + 4 * killed  # each lost a chunk at most
    H = planted(indefinite(200), 200)
    assert_same(assemble(folder), whole(H, 10, outer=40, inner=80, block_size=4), 1e-11)


# In each round six jobs begin in the same moment, three with one k and three with another.
RACING_JOBS = """
import json, os, sys
from pathlib import Path
from planted import indefinite, planted
import hesscurv

def start(folder, gate, k, part):
    job = os.fork()
    if job:
        return job
    os.close(gate[1])
    os.read(gate[0], 1)  # until all are there
    code = 1
    try:
        hesscurv.measure(planted(indefinite(60), 60), k, folder, part=part, block_size=4)
        code = 0
    except ValueError as error:
        code = 3 if "have other settings: k=" in str(error) else 1
    finally:
        os._exit(code)

rounds = []
for number in range(int(sys.argv[2])):
    folder, gate = Path(sys.argv[1]) / str(number), os.pipe()
    jobs = [start(folder, gate, k, (i, 3)) for i in range(3) for k in (7, 8)]
    os.close(gate[0])
    os.close(gate[1])
    rounds.append([os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) for job in jobs])
print(json.dumps(rounds))
"""


@pytest.mark.parametrize("count", [4, pytest.param(15, marks=pytest.mark.slow)])
def test_of_jobs_that_make_the_folder_at_once_one_is_the_first(count, tmp_path):
    rounds = run(RACING_JOBS, tmp_path, count)
    H = planted(indefinite(60), 60)
    for number, codes in enumerate(rounds):
        of_seven, of_eight = codes[::2], codes[1::2]
        assert sorted([of_seven, of_eight]) == [[0, 0, 0], [3, 3, 3]]
        k = 7 if of_seven == [0, 0, 0] else 8
        assert_same(assemble(tmp_path / str(number)), whole(H, k, block_size=4), 1e-11)
