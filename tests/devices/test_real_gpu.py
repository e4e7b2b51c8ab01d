"""What only a real CUDA device can show; skipped without one. Run by `make test-gpu`."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import hesscurv
from hesscurv.linalg.transfers import prefetched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
# Float32 products of these nets are within 3e-6 of float64's; TF32's are off by 1e-3 to 1e-2.
FLOAT32 = 2e-5


def network(width=16):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.Tanh(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(4 * width, 10)),
    ).eval()


def data(n=32):
    return torch.randn(n, 3, 8, 8), torch.randint(10, (n,))


def relative_error(got, expected):
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def residuals_in_double(H64, pairs):
    """The true residuals, relative to the eigenvalues."""
    V, values = pairs.eigenvectors.double().cpu(), pairs.eigenvalues.double().cpu()
    return (H64 @ V - V * values).norm(dim=0) / values.abs()


@pytest.fixture
def settings():
    """Restore the process's precision and default device, whatever a test has set."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_default_device(None)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(
    "kind", [hesscurv.HessianOperator, hesscurv.GGNOperator, hesscurv.EmpiricalFisherOperator]
)
@pytest.mark.usefixtures("settings")
def test_products_are_those_of_float64(kind, tf32):
    net, batch = network(), data()
    expected = kind(net, TASK, [batch], compute_dtype=torch.float64)
    V = torch.randn(expected.shape[0], 4)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    H = kind(copy.deepcopy(net).cuda(), TASK, [batch])
    assert relative_error(H @ V.cuda(), expected @ V.double()) < FLOAT32
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own compiler says so
@pytest.mark.parametrize("way", [*hesscurv.HessianOperator.ways, "compiled"])
def test_every_way_gives_the_same_products(way):
    net, batch = network(), data()
    expected = hesscurv.HessianOperator(net, TASK, [batch], compute_dtype=torch.float64)
    V = torch.randn(expected.shape[0], 4)
    H = hesscurv.HessianOperator(copy.deepcopy(net).cuda(), TASK, [batch], way=way)
    assert relative_error(H @ V.cuda(), expected @ V.double()) < FLOAT32


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = kind(6, 12, batch_first=True), nn.Linear(12, 10)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    net, batch = Net(), (torch.randn(16, 5, 6), torch.randint(10, (16,)))
    expected = hesscurv.HessianOperator(net, TASK, [batch], compute_dtype=torch.float64)
    V = torch.randn(expected.shape[0], 4)
    H = hesscurv.HessianOperator(copy.deepcopy(net).cuda(), TASK, [batch])
    assert relative_error(H @ V.cuda(), expected @ V.double()) < FLOAT32


@pytest.mark.parametrize("storage", ["device", "host", "cpu", "disk"])
def test_pairs_called_converged_have_small_residuals(storage, tmp_path):
    net, batch = network(), data()
    H64 = hesscurv.HessianOperator(net, TASK, [batch], compute_dtype=torch.float64)
    H = hesscurv.HessianOperator(copy.deepcopy(net).cuda(), TASK, [batch])
    pairs = hesscurv.eigsh(H, 12, tol=1e-3, storage=tmp_path if storage == "disk" else storage)
    assert pairs.converged.all()
    # A half more than the tolerance: residuals are measured in float32.
    assert float(residuals_in_double(H64, pairs).max()) < 1.5e-3


class SlowDiagonal(hesscurv.LinearOperator):
    """A known spectrum in float64, with products that keep the device busy for a while.

    So the host is far ahead of the device, and copies of one stream meet work of the other.
    """

    def __init__(self, dim):
        super().__init__(dim, torch.float64, torch.device("cuda"))
        self.values_D1 = (1 / torch.arange(1, dim + 1, dtype=torch.float64)).cuda()[:, None]
        self.values_D1[1::2] *= -1
        self.load = torch.randn(1024, 1024, device="cuda")

    def _matmat(self, vectors_DB):
        for _ in range(20):
            self.load = (self.load @ self.load).clamp(-1, 1)
        return self.values_D1 * vectors_DB


@pytest.mark.parametrize("max_basis", [None, 60])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_basis_on_the_host_gives_the_pairs_of_one_on_the_device(
    max_basis, pinned, monkeypatch, tmp_path
):
    if not pinned:
        monkeypatch.setattr(
            "hesscurv.storage.placement.pinned_if_possible",
            lambda shape, dtype, **_: torch.empty(shape, dtype=dtype),
        )
    # Many chunks: usually one is of 2^27 entries.
    monkeypatch.setattr("hesscurv.linalg.projections.chunk_entries", lambda *_: 2**17)
    monkeypatch.setattr("hesscurv.eigensolvers.krylov.basis.chunk_entries", lambda *_: 2**17)
    H, options = SlowDiagonal(300_000), {"tol": 1e-9, "max_basis": max_basis, "block_size": 8}
    near = hesscurv.eigsh(H, 30, storage="device", **options)
    for turn in range(3):  # a race need not show at once
        checkpoint = tmp_path / "work" if turn == 2 else None
        far = hesscurv.eigsh(H, 30, storage="host", checkpoint=checkpoint, **options)
        assert far.info["storage"] == "cpu"
        assert far.eigenvectors.is_pinned() == pinned
        # Float64 sums in another order, over some hundred blocks.
        torch.testing.assert_close(far.eigenvalues, near.eigenvalues, rtol=1e-12, atol=1e-14)
        V = far.eigenvectors.cuda()
        gaps = (H @ V - V * far.eigenvalues.cuda()).norm(dim=0)
        assert bool((gaps <= 2e-9 * far.eigenvalues.cuda().abs()).all())
        assert float((V.mT @ V - torch.eye(30, device="cuda").double()).abs().max()) < 1e-12


def test_columns_fetched_ahead_are_whole():
    """Chunks are used by work that is far slower than the copies, and much faster."""
    pinned = torch.randn(40, 200_000).pin_memory()
    chunks = [pinned[:, i : i + 9000] for i in range(0, 200_000, 9000)]
    load = torch.randn(2048, 2048, device="cuda")
    for slow in (True, False):
        found = []
        with contextlib.closing(prefetched(chunks, load.device, torch.float64)) as parts:
            for part in parts:
                if slow:
                    load = (load @ load).clamp(-1, 1)
                found.append(part.clone())
        assert torch.equal(torch.cat(found, dim=1).cpu(), pinned.double())


def test_sixty_pairs_of_a_known_spectrum():
    D, k = 4000, 60
    values = 1 / torch.arange(1, D + 1, dtype=torch.float32)
    values[1::2] *= -1

    class Diagonal(hesscurv.LinearOperator):
        def __init__(self):
            super().__init__(D, torch.float32, torch.device("cuda"))
            self.values_D1 = values.cuda()[:, None]

        def _matmat(self, vectors_DB):
            return self.values_D1 * vectors_DB

    pairs = hesscurv.eigsh(Diagonal(), k)
    V = pairs.eigenvectors
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues.cpu(), values[:k], rtol=1e-5, atol=1e-6)
    # Orthonormal to some eps of float32.
    assert float((V.mT.double() @ V.double() - torch.eye(k, device="cuda")).abs().max()) < 1e-5


@pytest.mark.usefixtures("settings")
def test_the_default_device_may_be_the_gpu():
    torch.set_default_device("cuda")
    x, y = (t.cuda() for t in data())
    H = hesscurv.HessianOperator(network().cuda(), TASK, [(x, y)])
    pairs = hesscurv.eigsh(H, 6)
    hesscurv.spectral_density(H, num_steps=5, num_probes=2)
    assert pairs.converged.all()
    assert float(hesscurv.overlap(pairs, pairs)) == pytest.approx(1, abs=1e-4)
    assert torch.isfinite(torch.as_tensor(hesscurv.trace(H, num_matvecs=12).value))


def test_a_monitor_leaves_training_the_same_to_the_bit():
    x, y = (t.cuda() for t in data())

    def train(watched):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Dropout(0.2))
        net = net.append(nn.Linear(32, 10)).cuda()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        monitor = hesscurv.hooks.CurvatureMonitor(
            net,
            TASK,
            [(x, y)],
            k=4,
            quantities="full",
            schedule=hesscurv.hooks.every(2),
            optimizer=optimizer,
        )
        for step in range(5):
            optimizer.zero_grad()
            TASK(net, (x, y)).backward()
            optimizer.step()
            if watched:
                monitor.step(step)
        return torch.cat([p.detach().flatten() for p in net.parameters()]), monitor.records

    plain, _ = train(False)
    watched, records = train(True)
    assert torch.equal(plain, watched)
    assert records
    assert all(record["status"] == "ok" for record in records)


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.filterwarnings("ignore::hesscurv.optim.CurvatureWarning")
def test_a_step_between_refreshes_never_waits(base, mode):
    net, batch = network().cuda(), tuple(t.cuda() for t in data())
    inner = {
        "sgd": lambda: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
        "adam": lambda: torch.optim.AdamW(net.parameters(), lr=0.01),
    }[base]()
    optimizer = hesscurv.optim.PreconditionedOptimizer(
        inner,
        net,
        TASK,
        [batch],
        rank=4,
        refresh_every=1000,
        options=hesscurv.optim.PreconditionerOptions(mode=mode),
    )
    for _ in range(3):
        optimizer.zero_grad()
        TASK(net, batch).backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_saved_pairs_load_on_either_device(tmp_path):
    H = hesscurv.HessianOperator(network().cuda(), TASK, [data()])
    pairs = hesscurv.eigsh(H, 4)
    pairs.save(tmp_path / "pairs")
    for device in ("cpu", "cuda"):
        loaded = hesscurv.Eigenpairs.load(tmp_path / "pairs", map_location=device)
        assert loaded.eigenvectors.device.type == device
        assert torch.equal(loaded.eigenvectors.cpu(), pairs.eigenvectors.cpu())
