"""torch.set_default_device and set_default_dtype change nothing: every tensor says what it is."""

import copy

import pytest
import torch
from torch import nn

import hesscurv
from hesscurv import hooks, integrations, optim, pruning

SIZE = 167
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def net():
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)),
    )
    return model.eval()


def batches():
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(6, 1, 4, 4, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2]))] * 2


def hessian(**options):
    return hesscurv.HessianOperator(net(), TASK, batches(), **options)


def products():
    kinds = (hesscurv.HessianOperator, hesscurv.GGNOperator, hesscurv.EmpiricalFisherOperator)
    v = torch.linspace(-1, 1, SIZE, device="cpu", dtype=torch.float32)
    return [
        kind(net(), TASK, batches()[:1], way=way) @ v
        for kind in kinds
        for way in ("auto", *kind.ways)
    ]


def pairs_of(**options):
    pairs = hesscurv.eigsh(hessian(), 4, **options)
    return pairs.eigenvalues, pairs.eigenvectors.abs(), pairs[[0, 2]].eigenvalues, pairs.converged


def files(tmp_path):
    pairs = hesscurv.eigsh(hessian(), 3, storage=tmp_path / "basis", checkpoint=tmp_path / "solve")
    pairs.save(tmp_path / "pairs.pt")
    loaded = hesscurv.Eigenpairs.load(tmp_path / "pairs.pt")
    H = hessian()
    for part in range(2):
        hesscurv.measure(H, 3, tmp_path / "measured", part=(part, 2))
    assembled = hesscurv.assemble(tmp_path / "measured")
    return loaded.eigenvalues, assembled.eigenvalues


def spectra():
    H = hessian()
    density = hesscurv.spectral_density(H, num_steps=6, num_probes=2)
    return (
        density.density().value,
        density.range,
        hesscurv.trace(H, num_matvecs=12).value,
        hesscurv.diagonal(H, num_matvecs=12).values,
        hesscurv.a_posteriori_error(H, hesscurv.eigsh(H, 3)).error_norm_squared,
    )


def comparisons():
    model = net()
    pairs = hesscurv.eigsh(hesscurv.HessianOperator(model, TASK, batches()), 4)
    mask = hesscurv.magnitude_mask(model, 10)
    return (
        hesscurv.overlap(mask, pairs),
        hesscurv.overlap(pairs, pairs),
        list(hesscurv.grassmann_distances(pairs, pairs).values()),
        hesscurv.principal_angles(pairs, pairs),
        hesscurv.leverage_scores(pairs),
        hesscurv.overlap_by_k(hesscurv.leverage_scores(pairs), pairs),
        hesscurv.best_mask(pairs, 3),
        hesscurv.chance_overlap(10, SIZE).mean,
        hesscurv.intersection_over_union(mask, hesscurv.random_mask(SIZE, 10)),
    )


def preconditioned(base):
    model = net()
    optimizer = optim.PreconditionedOptimizer(base(model.parameters()), model, TASK, batches())
    for _ in range(3):
        optimizer.zero_grad()
        TASK(model, batches()[0]).backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    return [p.detach() for p in model.parameters()], list(optimizer.report().eigenvalues)


def newton():
    model = net()
    optimizer = optim.NewtonCG(model.parameters(), rank=3)

    def closure():
        optimizer.zero_grad()
        loss = TASK(model, batches()[0])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


def pruned(tmp_path):
    model = net()
    pairs = hesscurv.eigsh(hesscurv.HessianOperator(model, TASK, batches()), 4)
    saliencies = pruning.saliency(model, pairs)
    for weight, of in saliencies.items():
        pruning.curvature_unstructured(weight.module, weight.name, 0.3, of)
    other = net()
    pruning.prune_model(other, TASK, batches(), sparsity=0.5)
    pruning.save_sparse(other, tmp_path / "sparse.pt")
    loaded = net()
    pruning.load_pruned_(loaded, pruning.load_sparse(tmp_path / "sparse.pt"))
    return [p.detach() for m in (model, other, loaded) for p in m.parameters()]


def watched():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = hooks.CurvatureMonitor(
        model, TASK, batches(), k=3, schedule=hooks.every(1), optimizer=optimizer, quantities="full"
    )
    for step in range(2):
        optimizer.zero_grad()
        TASK(model, batches()[0]).backward()
        optimizer.step()
        monitor.step(step)
    assert [r["status"] for r in monitor.records] == ["ok", "ok"]
    return [r["eigenvalues"] for r in monitor.records]


def channels():
    import torch_pruning

    model = net()
    importance = integrations.CompensatedImportance(model, TASK, batches())
    torch_pruning.pruner.BasePruner(
        model, batches()[0][0], importance, pruning_ratio=0.4, ignored_layers=[model[6]]
    ).step()
    return [p.detach() for p in model.parameters()]


CALLS = {
    "products": products,
    "eigsh": pairs_of,
    "single_pass": lambda: pairs_of(method="single_pass", tol=9.0),
    "rayleigh_ritz": lambda: pairs_of(method="rayleigh_ritz", tol=9.0),
    "Gaussian": lambda: pairs_of(method="single_pass", measurements="gaussian", tol=9.0),
    "half": lambda: pairs_of(storage_dtype=torch.float16, tol=1e-2),
    "smallest": lambda: pairs_of(which="SA"),
    "files": files,
    "spectra": spectra,
    "comparisons": comparisons,
    "SGD": lambda: preconditioned(lambda p: torch.optim.SGD(p, 0.1)),
    "AdamW": lambda: preconditioned(lambda p: torch.optim.AdamW(p, 0.01, foreach=False)),
    "NewtonCG": newton,
    "pruning": pruned,
    "watching": watched,
    "channels": channels,
}


def call(name, tmp_path):
    tmp_path.mkdir()
    takes_folder = CALLS[name] in (files, pruned)
    return CALLS[name](tmp_path) if takes_folder else CALLS[name]()


def outside(fn):
    def made():
        with torch.device("cpu"):
            return fn()

    return made


def single(fn):
    def made():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return fn()
        finally:
            torch.set_default_dtype(before)

    return made


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_and_dtype_are_nobodys(name, tmp_path, monkeypatch):
    expected = call(name, tmp_path / "without")
    with monkeypatch.context() as patch:
        # What makes the model and the data is not on trial.
        patch.setattr(f"{__name__}.net", single(net))
        patch.setattr(f"{__name__}.batches", single(batches))
        torch.set_default_dtype(torch.float16)  # of half precision it would show at once
        try:
            got = call(name, tmp_path / "half")
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if name == "AdamW" and torch.__version__ < "2.7":
        pytest.skip("that AdamW counts its steps on the default device")
    monkeypatch.setattr(f"{__name__}.net", outside(net))
    monkeypatch.setattr(f"{__name__}.batches", outside(batches))
    torch.set_default_device("meta")
    try:
        got = call(name, tmp_path / "meta")
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
