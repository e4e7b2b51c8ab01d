"""Measurements by independent jobs give what `single_pass` gives, and only of one operator."""

import copy
import itertools
import re

import pytest
import torch
from measured import assert_same, filled, whole
from planted import indefinite, planted
from torch import nn

import hesscurv
from hesscurv import ConvergenceWarning, assemble, measure, missing
from hesscurv.operators.matrix_operators import as_linear_operator

every_kind = pytest.mark.parametrize("measurements", ["ssrft", "gaussian", "rademacher"])
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])


@every_kind
@every_seed
def test_two_jobs_give_the_eigenpairs_of_single_pass(measurements, seed, folder):
    H = planted(indefinite(300), 300, seed)
    generator = torch.Generator().manual_seed(seed)
    options = {"measurements": measurements, "generator": generator, "block_size": 4}
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


def test_another_loss_is_refused_by_jobs_and_where_they_are_assembled(folder):
    """Weights, batches and settings are alike: one product tells."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    batches = [(torch.randn(20, 6), torch.randint(4, (20,)))]

    def hessian(scale):
        def loss(outputs, targets):
            return scale * torch.nn.functional.cross_entropy(outputs, targets)

        return hesscurv.HessianOperator(model, hesscurv.supervised(loss), batches)

    H = hessian(1.0)
    measure(H, 4, folder, part=(0, 2), block_size=4)
    assert H.num_matvecs == 8  # of 16: the product that is compared does not count
    for other in (hessian(1.02), hessian(0.5)):
        with pytest.raises(ValueError, match=r"a product differs .* the loss function"):
            measure(other, 4, folder, part=(1, 2), block_size=4)
    assert measure(hessian(1.0), 4, folder, part=(1, 2), block_size=4) == []
    with pytest.raises(ValueError, match=r"a product differs .* the loss function"):
        assemble(folder, hessian(1.02))
    assert_same(assemble(folder, residuals=False), assemble(folder, H, residuals=False))


def test_a_copy_of_the_operator_is_the_same_operator(folder):
    model, batches = network()
    measure(hessian(model, batches), 5, folder, part=(0, 2))
    H = hessian(copy.deepcopy(model), [tuple(t.clone() for t in batch) for batch in batches])
    assert measure(H, 5, folder) == []


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
        ({"generator": torch.Generator().manual_seed(1)}, "seed=0 there and 1 here, omega_seed="),
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


def test_progress_is_shown_on_request_only(folder, terminal):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, part=(0, 2))
    assert terminal.readouterr().err == ""
    measure(H, 10, folder, progress=True)
    assert "20/20" in terminal.readouterr().err


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


def test_jobs_share_a_generator_that_was_drawn_from(folder):
    H, generator = planted(indefinite(60), 60), torch.Generator().manual_seed(3)
    torch.randn(2, generator=generator)
    before = generator.get_state()
    for part in ((0, 2), (1, 2)):
        measure(H, 5, folder, part=part, generator=generator, block_size=4)
    assert torch.equal(generator.get_state(), before)
    assert_same(assemble(folder), whole(H, 5, generator=generator, block_size=4), 0.0)
    with pytest.raises(ValueError, match="have other settings: omega_seed="):
        measure(H, 5, folder, generator=torch.Generator().manual_seed(3), block_size=4)
    folder = folder.with_name("others")
    for given, typed in ((before, "generator"), (None, r"torch.Generator\(\).manual_seed\(3\)")):
        generator.manual_seed(3) if given is None else generator.set_state(given)
        measure(H, 5, folder, 0, 4, generator=generator, block_size=4)
        with pytest.raises(ValueError, match=rf"generator={typed}\)"):
            assemble(folder)
        folder = folder.with_name("more")
