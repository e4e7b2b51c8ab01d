"""Measurements by independent jobs give what `single_pass` gives, whatever happens to the jobs."""

import copy
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import PlainOperator, indefinite, planted
from torch import nn

import hesscurv
from hesscurv import ConvergenceWarning, assemble, measure, missing
from hesscurv.eigensolvers import single_pass
from hesscurv.operators.linear_operator import as_linear_operator

every_kind = pytest.mark.parametrize("measurements", ["ssrft", "gaussian", "rademacher"])
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "measurements"


def whole(H, k, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return single_pass(H, k, generator=generator, residuals=False, **options)


def filled(H, folder, **options):
    """A folder with all measurements for k = 10: 20 + 20, five chunks of 4 and five."""
    options = {"block_size": 4, **options}
    assert measure(H, 10, folder, **options) == []
    return sorted(folder.glob("*.npz"))


def assert_same(a, b, tolerance=0.0):
    """Equal to the last bit, or, with the eigenvectors' projectors, up to a tolerance."""
    if tolerance == 0.0:
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert torch.equal(a.eigenvectors, b.eigenvectors)
        return
    torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=0, atol=tolerance)
    projectors = [pairs.eigenvectors @ pairs.eigenvectors.mT for pairs in (a, b)]
    torch.testing.assert_close(*projectors, rtol=0, atol=tolerance)


@every_kind
@every_seed
def test_two_jobs_give_the_eigenpairs_of_single_pass(measurements, seed, folder):
    H = planted(indefinite(300), 300, seed)
    options = {"measurements": measurements, "seed": seed, "block_size": 4}
    assert measure(H, 10, folder, part=(1, 2), **options) == [(0, 20)]
    assert measure(H, 10, folder, part=(0, 2), **options) == missing(folder) == []
    pairs = assemble(folder)
    # Psi^T Y of a chunk and of all vectors at once round differently, except by SSRFT.
    tolerance = 0.0 if measurements == "ssrft" else 1e-11
    assert_same(pairs, whole(H, 10, **options), tolerance)
    assert pairs.num_matvecs == 40
    assert pairs.info["outer"] == 20
    assert pairs.info["inner"] == 40
    assert pairs.info["seed"] == seed


@every_kind
def test_float32_agrees_to_its_rounding(measurements, folder):
    H = planted(indefinite(12), 300, dtype=torch.float32)
    measure(H, 12, folder, measurements=measurements, block_size=3)
    expected = whole(H, 12, measurements=measurements, block_size=3)
    pairs = assemble(folder)
    assert pairs.eigenvectors.dtype == torch.float32
    # 20 eps times |lambda_1| = 10, as for single_pass itself.
    assert_same(pairs, expected, 0.0 if measurements == "ssrft" else 2.4e-5)


def test_fewer_dimensions_than_measurements_and_rank_below_k(folder):
    H = planted([3.0, -2.0], 30)
    assert measure(H, 20, folder, measurements="gaussian") == []  # 30 of 30: by SSRFT
    pairs = assemble(folder)
    assert_same(pairs, whole(H, 20, measurements="gaussian"))
    assert pairs.info["measurements"] == "ssrft"
    assert pairs.info["rank"] < 20  # the random vectors that complete them are the same too


@pytest.mark.parametrize("order", list(itertools.permutations([(0, 13), (13, 29), (29, 40)])))
def test_ranges_cut_anywhere_share_the_chunks_out_in_any_order(order, folder):
    H = planted(indefinite(100), 100)
    for start, stop in order:
        measure(H, 10, folder, start, stop, block_size=4)
    assert H.num_matvecs == 40  # nothing twice
    assert missing(folder) == []
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_more_parts_than_chunks_and_overlapping_ranges(folder):
    H = planted(indefinite(100), 100)
    for part in range(13):
        measure(H, 10, folder, part=(part, 13), block_size=4)
    assert H.num_matvecs == 40
    measure(H, 10, folder, 3, 30, block_size=4)
    measure(H, 10, folder, block_size=4)
    assert H.num_matvecs == 40
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_a_later_job_may_take_smaller_blocks(folder):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, 0, 8, block_size=8)
    before = sorted(folder.glob("*.npz"))
    assert measure(H, 10, folder, block_size=3) == []
    assert before == [folder / "measurements_0000000_0000008.npz"]
    assert (folder / "measurements_0000008_0000016.npz").exists()
    # Products in blocks of 3 and of 8 differ by rounding.
    assert_same(assemble(folder), whole(H, 10, block_size=8), 1e-11)


def test_residuals_need_the_operator(folder):
    H = planted(indefinite(100), 100)
    filled(H, folder)
    pairs = assemble(folder)
    assert pairs.residuals.isnan().all()
    assert not pairs.converged.any()
    with pytest.warns(ConvergenceWarning, match="of 10 eigenpairs"):
        measured = assemble(folder, H)
    assert_same(measured, pairs)
    gaps = H.matrix @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues
    torch.testing.assert_close(measured.residuals, gaps.norm(dim=0), rtol=1e-10, atol=0)
    assert measured.num_matvecs == 50
    assert assemble(folder, H, residuals=False).num_matvecs == 40


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(torch.randn(20, 4), torch.randint(3, (20,))) for _ in range(2)]
    return model, batches


def hessian(model, batches, **options):
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    options = {"compute_dtype": torch.float64, **options}
    return hesscurv.HessianOperator(model, task, batches, **options)


def test_jobs_of_a_network_keep_its_layout(folder):
    model, batches = network()
    for part in range(3):  # each builds the model anew, as jobs do
        measure(hessian(*network()), 5, folder, part=(part, 3), block_size=4)
    H = hessian(model, batches)
    pairs = assemble(folder)
    assert pairs.layout == H.layout
    assert pairs.layout.names[0] == "0.weight"
    # Two operators may compute the same product in two ways.
    assert_same(pairs, whole(H, 5, block_size=4), 1e-11)
    assert_same(assemble(folder, H, tol=1e9), pairs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m, b: m[0].weight.data.add_(1e-6), "the parameters' values"),
        (lambda m, b: m[1].running_mean.add_(0.1), "the buffers or frozen parameters"),
        (lambda m, b: b[1][0].mul_(1.01), "the batches"),
    ],
)
def test_another_operator_is_refused_before_any_product(change, named, folder):
    measure(hessian(*network()), 5, folder, part=(0, 2), block_size=4)
    files = sorted(folder.iterdir())
    model, batches = network()
    change(model, batches)
    H = hessian(model, batches)
    for refused in (lambda: measure(H, 5, folder, block_size=4), lambda: assemble(folder, H)):
        with pytest.raises(ValueError, match=f"of another operator: what differs is {named};"):
            refused()
    assert H.num_matvecs == 0
    assert sorted(folder.iterdir()) == files


def test_part_of_the_model_and_another_dtype_are_other_operators(folder):
    model, batches = network()
    measure(hessian(model, batches), 5, folder, part=(0, 2))
    with pytest.raises(ValueError, match="its size D"):
        measure(hessian(model, batches, params=["0"]), 5, folder)
    with pytest.raises(ValueError, match="the dtype"):
        measure(hessian(model, batches, compute_dtype=torch.float32), 5, folder)
    matrix = torch.diag(torch.arange(1.0, 31.0))
    measure(matrix, 2, folder.with_name("dense"))
    with pytest.raises(ValueError, match="the matrix' entries"):
        measure(matrix + torch.eye(30), 2, folder.with_name("dense"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": 11, "outer": 20}, "k=10 there and 11 here;"),
        ({"outer": 16, "inner": 40}, "outer=20 there and 16 here;"),
        ({"inner": 44}, "inner=40 there and 44 here;"),
        ({"measurements": "gaussian"}, "measurements='ssrft' there and 'gaussian' here;"),
        ({"seed": 1}, "seed=0 there and 1 here, omega_seed="),
    ],
)
def test_other_settings_are_refused_before_any_product(options, named, folder):
    measure(planted(indefinite(100), 100), 10, folder, 0, 4, block_size=4)
    H = planted(indefinite(100), 100)
    with pytest.raises(ValueError, match=re.escape(named)):
        measure(H, **{"k": 10, "folder": folder, **options})
    assert H.num_matvecs == 0
    assert missing(folder) == [(4, 40)]


def test_the_calls_in_the_message_take_what_is_missing(folder):
    H = planted(indefinite(100), 100)
    for start in (4, 12, 28):
        measure(H, 10, folder, start, start + 4, block_size=4)
    assert missing(folder) == [(0, 4), (8, 12), (16, 28), (32, 40)]
    with pytest.raises(ValueError, match="28 of 40 measurements are missing in") as raised:
        assemble(folder)
    calls = re.findall(r"measure\(.*\)", str(raised.value))
    assert len(calls) == 4
    for call in calls:
        eval(call)
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_a_flipped_byte_is_found_or_without_meaning(folder):
    H = planted(indefinite(30), 30)
    files = filled(H, folder, outer=10, inner=20, block_size=5)
    expected = assemble(folder)
    path, messages = files[0], []
    content = path.read_bytes()
    positions = range(0, len(content), 7)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            pairs = assemble(folder)
        except ValueError as error:  # none of zipfile's or NumPy's own
            messages.append(str(error))
        else:
            assert_same(pairs, expected)
    for message in messages:
        assert re.search(r"0005\.npz (is damaged|holds other)", message)
        assert "delete it and run measure(H, 10," in message
    # Numbers are 2000 of 3100 bytes, and most of the rest is names and sizes.
    assert len(messages) > 0.8 * len(positions)
    # A run again measures the damaged chunk, and no other.
    path.write_bytes(content[:-1500] + b"?" + content[-1499:])
    before = H.num_matvecs
    assert filled(H, folder, outer=10, inner=20, block_size=5) == files
    assert H.num_matvecs == before + 5
    assert_same(assemble(folder), expected)


def test_a_cut_off_file_is_found_and_measured_again(folder):
    H = planted(indefinite(100), 100)
    path = filled(H, folder)[2]
    expected, content = assemble(folder), path.read_bytes()
    for length in (0, 1, 40, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:length])
        assert missing(folder) == [(8, 12)]
        with pytest.raises(ValueError, match=r"0000012\.npz is damaged .* start=8, stop=12"):
            assemble(folder)
    before = H.num_matvecs
    measure(H, 10, folder, block_size=4)
    assert H.num_matvecs == before + 4
    assert_same(assemble(folder), expected)


def test_a_file_of_other_measurements_is_refused(folder):
    H = planted(indefinite(100), 100)
    files = filled(H, folder)
    others = filled(H, folder.with_name("other"), seed=1)
    expected, before = assemble(folder), H.num_matvecs
    for source, target in [(others[3], files[3]), (files[4], files[3])]:
        kept = target.read_bytes()
        shutil.copy(source, target)
        for refused in (
            lambda: assemble(folder),
            lambda: missing(folder),
            lambda: measure(H, 10, folder, block_size=4),
        ):
            with pytest.raises(ValueError, match=r"0000016\.npz holds other measurements"):
                refused()
        assert target.read_bytes() == source.read_bytes()  # not ours to remove
        target.write_bytes(kept)
    assert H.num_matvecs == before
    assert_same(assemble(folder), expected)


def test_numbers_of_another_shape_or_dtype_are_refused(folder):
    path = filled(planted(indefinite(100), 100), folder)[2]
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    for vectors in (arrays["vectors"].T.copy(), arrays["vectors"].view("<i8")):
        np.savez(path, **{**arrays, "vectors": vectors})
        with pytest.raises(ValueError, match=r"0000012\.npz is damaged \(expected vectors"):
            assemble(folder)


def test_a_disk_without_hard_links_will_do(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    H = planted(indefinite(100), 100)
    filled(H, folder)
    assert (folder / "manifest.json").exists()
    assert len(list(folder.iterdir())) == 11  # with the 10 chunks
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_a_manifest_that_is_damaged_or_changed_is_refused(folder):
    H = planted(indefinite(100), 100)
    filled(H, folder)
    path = folder / "manifest.json"
    text = path.read_text()
    data = json.loads(text)
    for content, message in [
        (text[:-10], "manifest.json is damaged; delete it"),
        ("[1]", "manifest.json is damaged; delete it"),
        (json.dumps({**data, "surplus": 1}), "manifest.json is damaged; delete it"),
        (json.dumps({**data, "format": "other"}), "manifest.json is damaged; delete it"),
        (json.dumps({**data, "version": 2}), "expected format version 1, got 2"),
        (json.dumps({**data, "psi_seed": 5}), "holds other measurements"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            assemble(folder)
    # Without it nothing can be assembled; the same call writes it again, and the rest is there.
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a folder with the manifest\.json"):
        assemble(folder)
    filled(H, folder)
    assert path.read_text() == text
    assert H.num_matvecs == 40


def test_a_plan_that_does_not_fit_on_the_disk_is_refused(folder, monkeypatch):
    H = planted(indefinite(100), 100)
    # 20 vectors of 100 doubles, 40 x 40 doubles, and up to 4096 bytes for each of 10 files.
    needed = 20 * 100 * 8 + 40 * 40 * 8 + 10 * 4096
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"take 69\.8 KB .* and 69\.8 KB are free") as raised:
        measure(H, 10, folder, 0, 4, block_size=4)
    assert raised.value.errno == 28
    assert H.num_matvecs == 0
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert measure(H, 10, folder, 0, 4, block_size=4) == [(4, 40)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(OSError, match="are free"):  # less is missing now, but still too much
        measure(H, 10, folder, 4, 8, block_size=4)
    assert H.num_matvecs == 4
    used = sum(path.stat().st_size for path in folder.glob("*.npz"))
    assert used <= 4 * 100 * 8 + 4 * 40 * 8 + 4096


@pytest.mark.parametrize("limit", [100, 2500, 5400])  # in the first member, the last, the directory
def test_a_full_disk_leaves_whole_files(limit, folder):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, 0, 8, block_size=4)
    files = sorted(folder.iterdir())
    assert files[1].stat().st_size > 5400
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"could not write measurements 8 to 12 .*run the same"):
            measure(H, 10, folder, block_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(folder.iterdir()) == files
    assert missing(folder) == [(8, 40)]
    measure(H, 10, folder, block_size=4)
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_leftovers_of_killed_jobs_are_ignored_and_removed_when_old(folder):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, 0, 4, block_size=4)
    old, new = (folder / f".measurements_0000004_0000008.npz.{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half of a file")
    os.utime(old, (time.time() - 4000,) * 2)
    assert missing(folder) == [(4, 40)]
    measure(H, 10, folder, block_size=4)
    assert not old.exists()
    assert new.exists()  # its job may still be writing
    os.utime(new, (time.time() - 4000,) * 2)
    assemble(folder)
    assert not new.exists()


def test_products_that_are_not_finite_are_not_written(folder):
    matrix = torch.eye(30, dtype=torch.float64)
    matrix[3, 3] = float("nan")
    with pytest.raises(ValueError, match="have NaN or inf"):
        measure(PlainOperator(matrix), 3, folder)
    assert list(folder.glob("*.npz")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected 1 <= k <= D=100, got k=0"),
        ({"outer": 9}, "k=10, outer=9, inner=18"),
        ({"measurements": "fourier"}, "expected a kind of test matrix"),
        ({"block_size": 0}, "expected block_size >= 1"),
        ({"start": 0, "stop": 41}, r"inner=40 measurements, got \[0, 41\)"),
        ({"start": 8, "stop": 8}, r"got \[8, 8\)"),
        ({"start": 5, "stop": 7, "block_size": 4}, r"begin at 4 and 8: take \[4, 8\)"),
        ({"start": 39, "block_size": 4}, r"begin at 36 and 40: take \[36, 40\)"),
        ({"part": (2, 2)}, r"0 <= i < n, got \(2, 2\)"),
        ({"part": (0, 2), "start": 0}, "got both"),
    ],
)
def test_bad_arguments_are_refused_before_any_product(options, message, folder):
    H = planted(indefinite(100), 100)
    with pytest.raises(ValueError, match=message):
        measure(H, **{"k": 10, "folder": folder, **options})
    assert H.num_matvecs == 0


def test_a_missing_place_is_named(folder):
    H = planted(indefinite(100), 100)
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        measure(H, 10, folder / "deep")
    with pytest.raises(FileNotFoundError, match=r"run measure\(H, k, folder\) first"):
        missing(folder)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        measure(torch.eye(30, dtype=torch.bfloat16), 3, folder)
    assert not folder.exists()


def test_progress_is_shown_on_request_only(folder, capsys):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, part=(0, 2))
    assert capsys.readouterr().err == ""
    measure(H, 10, folder, progress=True)
    assert "20/20" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_measurements_of_a_gpu_are_assembled_on_either(folder):
    matrix = planted(indefinite(300), 300).matrix
    H, H_gpu = as_linear_operator(matrix), as_linear_operator(matrix.cuda())
    measure(H, 10, folder, part=(0, 2), block_size=4)
    measure(H_gpu, 10, folder, block_size=4)
    expected = whole(H, 10, block_size=4)
    on_gpu = assemble(folder, H_gpu, tol=1e9)
    assert on_gpu.eigenvectors.is_cuda
    assert_same(assemble(folder), expected, 1e-10)
    assert_same(on_gpu.to("cpu"), expected, 1e-10)


def run_script(source, *arguments):
    """What a script prints that forks and kills: in a process of its own, with one thread."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


@every_seed
def test_jobs_killed_at_any_moment_are_run_again(seed, folder):
    killed, code = run_script(KILLED_JOBS, folder, seed)
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
for number in range(15):
    folder, gate = Path(sys.argv[1]) / str(number), os.pipe()
    jobs = [start(folder, gate, k, (i, 3)) for i in range(3) for k in (7, 8)]
    os.close(gate[0])
    os.close(gate[1])
    rounds.append([os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) for job in jobs])
print(json.dumps(rounds))
"""


def test_of_jobs_that_make_the_folder_at_once_one_is_the_first(tmp_path):
    rounds = run_script(RACING_JOBS, tmp_path)
    H = planted(indefinite(60), 60)
    for number, codes in enumerate(rounds):
        of_seven, of_eight = codes[::2], codes[1::2]
        assert sorted([of_seven, of_eight]) == [[0, 0, 0], [3, 3, 3]]
        k = 7 if of_seven == [0, 0, 0] else 8
        assert_same(assemble(tmp_path / str(number)), whole(H, k, block_size=4), 1e-11)


def test_a_copy_of_the_operator_is_the_same_operator(folder):
    model, batches = network()
    measure(hessian(model, batches), 5, folder, part=(0, 2))
    H = hessian(copy.deepcopy(model), [tuple(t.clone() for t in batch) for batch in batches])
    assert measure(H, 5, folder) == []
