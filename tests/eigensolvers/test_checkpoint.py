"""Checkpoints: what was computed is not lost, and what does not belong together is refused."""

import copy
import json
import os
import resource
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from killed_solves import BLOCK
from planted import planted
from support.forks import run_script

import hesscurv
from hesscurv.eigensolvers.krylov.checkpoint import Checkpoint
from hesscurv.operators.matrix_operators import DenseOperator
from hesscurv.storage.checked_files import read_checked, write_checked
from hesscurv.storage.mapped_files import DiskFullError

WORKER = Path(__file__).parents[1] / "killed_solves.py"
K = 30


@pytest.fixture(autouse=True)
def _every_block_is_saved(monkeypatch):
    monkeypatch.setattr("hesscurv.eigensolvers.krylov.checkpoint._OVERHEAD", 1e9)


class Failing(DenseOperator):
    """A matrix whose products end with an error after so many vectors."""

    def __init__(self, matrix, allowed=10**9):
        super().__init__(matrix)
        self.allowed = allowed

    def _matmat(self, vectors_DB):
        if self.num_matvecs >= self.allowed:
            raise RuntimeError("the power went out")
        return super()._matmat(vectors_DB)


def matrix(seed=0, size=300, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=g, dtype=torch.float64) ** 3
    return planted(values, size, seed).matrix.to(dtype)


def solve(A, folder, allowed=10**9, **options):
    options = {"tol": 1e-6, "block_size": 4, "max_basis": K + 24, **options}
    k = options.pop("k", K)
    return hesscurv.eigsh(Failing(A, allowed), k, checkpoint=folder, **options)


def interrupted(A, folder, allowed=80, **options):
    with pytest.raises(RuntimeError, match="power"):
        solve(A, folder, allowed, **options)


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


@pytest.mark.parametrize(
    ("how", "kills"),
    [
        ("kill", 2),
        pytest.param("kill", 20, marks=pytest.mark.slow),
        pytest.param("crash", 25, marks=pytest.mark.slow),
    ],
)
def test_killed_many_times_it_ends_with_the_same_bits(how, kills, tmp_path):
    results, cache = [], str(tmp_path / "cache")  # one calibration for all processes
    for name, count in (("whole", 0), ("killed", kills)):
        folder = tmp_path / name
        folder.mkdir()
        done = run_script(WORKER, folder, 0, count, how, cwd=tmp_path, HESSCURV_CACHE=cache)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(json.loads(done.stdout))
    whole, killed = results
    assert killed["killed"] == kills
    assert killed["values"] == whole["values"]
    assert killed["norms"] == whole["norms"]
    assert killed["num_matvecs"] == whole["num_matvecs"]
    assert whole["restarts"] > 2
    # Lost is the block in work, and what a slow disk left unsaved: blocks here take 20 ms.
    lost = killed["all_products"] - whole["all_products"]
    assert 0 < lost <= kills * 4 * BLOCK


class PowerCutError(BaseException):
    """What ends a process at once, which no handler of errors takes for one."""


def cut_power(monkeypatch, count):
    """Raise in place of the call number `count` of those by which files change, and of all after.

    Nothing is written on the way out, as if the process had been killed there.
    """
    left = [count]

    def cutting(fn):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                raise PowerCutError
            return fn(*args, **kwargs)

        return call

    # Checksums are taken after each write to the journal, and after each reading of it.
    for module, names in ((os, ("replace", "unlink", "fsync", "open")), (zlib, ("crc32",))):
        for name in names:
            monkeypatch.setattr(module, name, cutting(getattr(module, name)))


def cut_off(A, folder, count, monkeypatch, **options):
    """Solve until the power is cut; return whether it was."""
    with monkeypatch.context() as patch:
        cut_power(patch, count)
        try:
            solve(A, folder, **options)
        except PowerCutError:
            return True
    return False


def test_cut_off_at_any_call_that_changes_files_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    A = torch.diag(2.0 ** -torch.arange(40, dtype=torch.float64))
    options = {"k": 4, "block_size": 4, "max_basis": 16}
    expected = solve(A, None, **options)
    assert expected.info["restarts"] > 2
    # Each of the first three blocks' calls, and some of all that follow; then several in a row.
    cuts = [[count] for count in (*range(1, 24), *range(24, 150, 14))] + [[9, 14, 23, 31, 57]]
    for counts in cuts:
        folder = tmp_path / str(counts[0]) / str(len(counts))
        cut = all(cut_off(A, folder, count, monkeypatch, **options) for count in counts)
        assert cut or counts[0] > 60, counts  # how many calls there are depends on the rounding
        pairs = solve(A, folder, **options)
        assert torch.equal(pairs.eigenvalues, expected.eigenvalues), counts
        assert torch.equal(pairs.eigenvectors, expected.eigenvectors), counts
        assert pairs.num_matvecs == expected.num_matvecs


@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float64), (1, torch.float32)])
def test_resumed_after_an_error_it_ends_with_the_same_bits(seed, dtype, tmp_path):
    A = matrix(seed, dtype=dtype)
    options = {"tol": 1e-4, "generator": torch.Generator().manual_seed(seed)}
    expected = solve(A, None, **options)
    for allowed in (37, 29, 8, 40):
        options["generator"] = torch.Generator().manual_seed(seed)
        interrupted(A, tmp_path, allowed, **options)
    options["generator"] = torch.Generator().manual_seed(seed)
    pairs = solve(A, tmp_path, **options)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)
    assert torch.equal(pairs.eigenvectors, expected.eigenvectors)
    assert torch.equal(pairs.residuals, expected.residuals)
    assert pairs.num_matvecs == expected.num_matvecs


def test_a_half_precision_basis_on_disk_is_resumed_too(tmp_path):
    A = matrix(dtype=torch.float32)
    options = {"storage": tmp_path / "basis", "storage_dtype": torch.float16, "tol": 1e-2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        expected = solve(A, None, **options)
        interrupted(A, tmp_path / "work", 60, **options)
        pairs = solve(A, tmp_path / "work", **options)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)
    assert torch.equal(pairs.eigenvectors, expected.eigenvectors)


def test_a_warm_start_is_resumed(tmp_path):
    A = matrix()
    near = solve(A, None, tol=1e-2).eigenvectors
    expected = solve(A, None, initial=near, max_basis=None)
    interrupted(A, tmp_path, 40, initial=near, max_basis=None)
    pairs = solve(A, tmp_path, initial=near, max_basis=None)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)


def test_a_finished_one_gives_its_result_again_for_a_block_of_products(tmp_path):
    A = matrix()
    expected = solve(A, tmp_path)
    H = Failing(A)
    pairs = hesscurv.eigsh(H, K, tol=1e-6, block_size=4, max_basis=K + 24, checkpoint=tmp_path)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)
    assert torch.equal(pairs.eigenvectors, expected.eigenvectors)
    assert pairs.num_matvecs == expected.num_matvecs
    assert H.num_matvecs <= 4


def test_it_may_go_on_with_more_products_and_a_smaller_tolerance(tmp_path):
    A = matrix()
    with pytest.warns(hesscurv.ConvergenceWarning):
        few = solve(A, tmp_path, max_matvecs=80)
    pairs = solve(A, tmp_path)
    finer = solve(A, tmp_path, tol=1e-9)
    assert few.num_matvecs <= 80 < pairs.num_matvecs < finer.num_matvecs
    exact = torch.linalg.eigvalsh(A)
    exact = exact[exact.abs().argsort(descending=True)][:K]
    # Errors of Ritz values are of second order in the residuals.
    torch.testing.assert_close(finer.eigenvalues, exact, rtol=1e-10, atol=1e-10)


def test_a_journal_that_restarts_have_made_long_is_written_anew(tmp_path):
    A = matrix()
    pairs = solve(A, tmp_path, tol=1e-9)
    assert pairs.num_matvecs > 3 * (K + 24)
    journal = sorted(tmp_path.glob("journal-0-*.bin"))[-1]
    assert journal.name != "journal-0-000.bin"
    assert journal.stat().st_size < 3 * (K + 24) * (300 + 54) * 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"A": matrix(1)}, "entries"),
        ({"k": K - 1}, "k"),
        ({"generator": torch.Generator().manual_seed(5)}, "generator"),
        ({"block_size": 3}, "block_size"),
        ({"initial": torch.eye(300, 3, dtype=torch.float64)}, "initial"),
    ],
)
def test_work_on_another_problem_is_refused_and_left_alone(change, named, tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"another problem.*{named} \(there"):
        solve(change.pop("A", A), tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    batches = [(torch.randn(20, 5), torch.randint(3, (20,)))]
    task = hesscurv.supervised(torch.nn.CrossEntropyLoss())
    hesscurv.eigsh(hesscurv.HessianOperator(model, task, batches), 3, checkpoint=tmp_path)
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    H = hesscurv.HessianOperator(model, task, batches)
    with pytest.raises(ValueError, match="another problem; what differs: values"):
        hesscurv.eigsh(H, 3, checkpoint=tmp_path)


# Activations and losses; the weights, buffers and batches are the same.
OTHER_CODE = {
    "label smoothing": (torch.nn.Tanh(), torch.nn.CrossEntropyLoss(label_smoothing=0.5)),
    "activation": (torch.nn.Softplus(), torch.nn.CrossEntropyLoss()),
    "class weights": (
        torch.nn.Tanh(),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0])),
    ),
    "scale": (torch.nn.Tanh(), lambda z, y: 1.02 * torch.nn.functional.cross_entropy(z, y)),
}


def curvature(activation, loss, dtype, head=1.0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), activation, torch.nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(head)
        model[2].bias.mul_(head)
    batch = torch.randn(30, 6, dtype=dtype), torch.arange(30) % 3
    loss = copy.deepcopy(loss).to(dtype) if isinstance(loss, torch.nn.Module) else loss
    return hesscurv.HessianOperator(model, hesscurv.supervised(loss), [batch])


@pytest.mark.parametrize(
    ("name", "dtype", "head"),
    [
        *((name, torch.float32, 1.0) for name in OTHER_CODE),
        ("label smoothing", torch.float64, 0.0),
        ("activation", torch.float64, 1.0),
        ("class weights", torch.float32, 0.0),
        ("scale", torch.float64, 0.0),
    ],
)
def test_another_loss_or_model_code_is_refused_and_loses_nothing(name, dtype, head, tmp_path):
    first = torch.nn.Tanh(), torch.nn.CrossEntropyLoss()
    options = {"k": 5, "tol": 1e-4, "max_matvecs": 200, "block_size": 2}
    expected = hesscurv.eigsh(curvature(*first, dtype, head=head), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        few = {**options, "max_matvecs": 12}
        hesscurv.eigsh(curvature(*first, dtype, head=head), checkpoint=tmp_path, **few)
    with pytest.raises(ValueError, match=r"another problem.*loss function.*another folder"):
        hesscurv.eigsh(
            curvature(*OTHER_CODE[name], dtype, head=head), checkpoint=tmp_path, **options
        )
    pairs = hesscurv.eigsh(curvature(*first, dtype, head=head), checkpoint=tmp_path, **options)
    torch.testing.assert_close(pairs.eigenvalues, expected.eigenvalues, rtol=1e-3, atol=1e-6)


class Foreign:
    """Another library's operator, of which a fingerprint knows the size alone."""

    def __init__(self, matrix):
        self.matrix, self.shape = matrix, matrix.shape

    def __matmul__(self, other):
        return self.matrix @ other


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_change_of_a_tenth_is_seen_beyond_the_rounding_of_the_basis(stored, tmp_path):
    A = matrix(dtype=torch.float32)
    A /= torch.linalg.matrix_norm(A, 2)
    options = {"storage_dtype": stored, "tol": 1e-2, "block_size": 4, "max_basis": K + 24}
    foreign = [Foreign(A), Foreign(1.1 * A)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        hesscurv.eigsh(foreign[0], K, checkpoint=tmp_path, max_matvecs=90, **options)
        with pytest.raises(ValueError, match="another problem: a product"):
            hesscurv.eigsh(foreign[1], K, checkpoint=tmp_path, **options)
        hesscurv.eigsh(foreign[0], K, checkpoint=tmp_path, **options)


@pytest.mark.parametrize(
    ("pattern", "position"),
    [("state-0-*.pt", 3), ("state-0-*.pt", 2000), ("state-0-*.pt", -5), ("journal-0-*.bin", 3000)],
)
def test_a_flipped_byte_is_found(pattern, position, tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    damage(sorted(tmp_path.glob(pattern))[-1], position)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="damaged"):
        solve(A, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("pattern", ["state-0-*.pt", "journal-0-*.bin"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_cut_short_is_found(pattern, share, tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    path = sorted(tmp_path.glob(pattern))[-1]
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"damaged|cut short"):
        solve(A, tmp_path)


def test_a_missing_journal_is_found(tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    only(tmp_path, "journal-0-*.bin").unlink()
    with pytest.raises(ValueError, match="missing"):
        solve(A, tmp_path)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    A = matrix()
    monkeypatch.setattr("hesscurv.eigensolvers.krylov.checkpoint._VERSION", 2)
    interrupted(A, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format version 1 .* version 2"):
        solve(A, tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = Checkpoint(tmp_path, {})
    with pytest.raises(BlockingIOError, match="another process is working"):
        Checkpoint(tmp_path, {})
    first.close()
    Checkpoint(tmp_path, {}).close()


def test_parts_of_a_file_that_a_kill_left_are_removed(tmp_path):
    (tmp_path / ".state-0-000001.pt.abc").write_bytes(b"half")
    (tmp_path / "journal-0-000.bin").write_bytes(b"vectors of no state")
    A = matrix()
    expected = solve(A, None)
    assert torch.equal(solve(A, tmp_path).eigenvalues, expected.eigenvalues)
    assert not list(tmp_path.glob(".state*"))


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    A = matrix()
    expected = solve(A, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of files fails a write as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DiskFullError, match=r"the disk is full.*make the same call again"):
            solve(A, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    H = Failing(A)
    pairs = hesscurv.eigsh(H, K, tol=1e-6, block_size=4, max_basis=K + 24, checkpoint=tmp_path)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)
    assert H.num_matvecs < expected.num_matvecs - 20


def test_a_checkpoint_that_the_disk_has_no_room_for_is_refused_at_once(tmp_path, monkeypatch):
    H = Failing(matrix())
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"will take .* GB, and the disk .* has"):
        hesscurv.eigsh(H, K, checkpoint=tmp_path)
    assert H.num_matvecs == 0


def test_more_products_bring_the_search_for_missed_pairs_too(tmp_path):
    # Four copies of the largest eigenvalue: one starting vector sees one of them.
    A = torch.diag(torch.tensor([5.0] * 4 + torch.linspace(1, 4, 200).tolist()).double())
    options = {"k": 6, "block_size": 1, "max_basis": None, "tol": 1e-4}
    with pytest.warns(hesscurv.ConvergenceWarning):
        solve(A, tmp_path, max_matvecs=12, **options)
    pairs = solve(A, tmp_path, **options)
    assert pairs.eigenvalues[:4].tolist() == pytest.approx([5.0] * 4)


def test_a_failed_solve_gives_the_generator_back(tmp_path):
    A, generator = matrix(), torch.Generator().manual_seed(3)
    before = generator.get_state()
    interrupted(A, tmp_path, generator=generator)
    assert torch.equal(generator.get_state(), before)
    expected = solve(A, None, generator=torch.Generator().manual_seed(3))
    assert torch.equal(solve(A, tmp_path, generator=generator).eigenvalues, expected.eigenvalues)


def test_a_refused_checkpoint_is_not_locked_any_more(tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    with pytest.raises(ValueError, match="another problem"):
        solve(matrix(1), tmp_path)
    solve(A, tmp_path)


@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz"])
def test_other_methods_say_that_they_have_no_checkpoint(method, tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint; use method='block_krylov'"):
        hesscurv.eigsh(matrix(), K, method=method, checkpoint=tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**9, 10**9]},
        {"shape": [-4, -300]},
        {"shape": [4 * 300]},
        {"shape": "wide"},
        {"offset": -8},
        {"offset": 10**15},
        {"dtype": "load"},
        {"dtype": "float16"},
        {"kind": "append", "crc": None},
    ],
)
def test_sizes_that_the_journal_cannot_hold_take_no_memory(changes, tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    for path in tmp_path.glob("state-*.pt"):
        data = read_checked(path)
        data["journal"][0].update(changes)
        write_checked(path, data)
    with pytest.raises(ValueError, match=r"is damaged, cut short.*delete this one"):
        solve(A, tmp_path)


@pytest.mark.parametrize("part", ["journal", "state", "identity", "length"])
def test_a_state_without_a_part_is_refused(part, tmp_path):
    A = matrix()
    interrupted(A, tmp_path)
    for path in tmp_path.glob("state-*.pt"):
        data = read_checked(path)
        del data[part]
        write_checked(path, data)
    with pytest.raises(ValueError, match=f"is damaged: it lacks .*{part}"):
        solve(A, tmp_path)
