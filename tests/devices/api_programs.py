"""The public API on a device that is told, each use returning plain numbers to compare.

Weights, data and random vectors are drawn on the CPU, so that every device has the same.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path

import cases
import prunable
import torch
from torch import nn
from torch.nn.utils import prune

import hesscurv

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
KINDS = {
    "hessian": hesscurv.HessianOperator,
    "ggn": hesscurv.GGNOperator,
    "fisher": hesscurv.EmpiricalFisherOperator,
}
K = 4


def seeded():
    return torch.Generator().manual_seed(1)


def problem(name, device):
    """A case's model on the device; its batches stay where loaders leave them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = cases.build(name)
    found.model.to(device)
    return found


def operator(device, kind="hessian", case="mlp", **options):
    return problem(case, device).operator(KINDS[kind], **options)


def block(H, size=3):
    return torch.randn(H.shape[0], size, generator=seeded(), dtype=H.dtype).to(H.device)


# -- operators ------------------------------------------------------------------------------------


def product(device, kind, case, way):
    H = operator(device, kind, case, way=way)
    V = block(H)
    return {"block": H @ V, "vector": H @ V[:, 0]}


def chosen_way(device, kind):
    """The way is measured and chosen, on a shape that a way could fail on."""
    H = operator(device, kind, "conv_bn")
    H.calibrate(200)
    return H @ block(H, 40)


def changed_weights(device):
    found = problem("mlp", device)
    H = found.operator(hesscurv.HessianOperator)
    V = block(H)
    before = H @ V
    with torch.no_grad():
        for p in found.model.parameters():
            p.data.mul_(1.25)  # past the version counters
    return {"before": before, "after": H @ V}


def refused_vectors(device):
    """What is refused on the device: the CPU's vectors, and NaN among the device's."""
    H = operator(device)
    other = torch.zeros(H.shape[0], dtype=H.dtype)
    wrong = torch.full((H.shape[0],), float("nan"), dtype=H.dtype, device=device)
    said = []
    for vector in (other, wrong):
        try:
            H @ vector
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


# -- eigenpairs -----------------------------------------------------------------------------------


def spread(pairs):
    """What does not depend on the eigenvectors' signs."""
    V = pairs.eigenvectors
    return {
        "eigenvalues": pairs.eigenvalues,
        "projector": V @ V.mT,
        "converged": pairs.converged,
    }


def solved(device, method, options):
    H = operator(device)
    tight = {"method": method, "tol": 1e-8, "generator": seeded()} | options
    if method == "rayleigh_ritz":
        tight |= {"initial": hesscurv.eigsh(H, K, tol=1e-8)}
    if tight.get("storage") == "disk":
        with tempfile.TemporaryDirectory() as folder:
            pairs = hesscurv.eigsh(H, K, **tight | {"storage": folder})
            return spread(pairs) | {"device": pairs.eigenvectors.device.type == "cpu"}
    return spread(hesscurv.eigsh(H, K, **tight))


def low_rank():
    """A matrix of rank K, of which a sketch finds all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Q, _ = torch.linalg.qr(torch.randn(40, K, dtype=torch.float64))
    matrix = (Q * torch.tensor([4.0, -3.0, 2.0, -1.0], dtype=torch.float64)) @ Q.mT
    return (matrix + matrix.mT) / 2


def sketched(device, method):
    pairs = hesscurv.eigsh(low_rank().to(device), K, method=method, generator=seeded())
    return spread(pairs)


def resumed_solve(device):
    """A solve that a checkpoint is written of, and one that goes on from it."""
    with tempfile.TemporaryDirectory() as folder:
        H = operator(device)
        options = {"tol": 1e-8, "checkpoint": Path(folder) / "work"}
        first = hesscurv.eigsh(H, K, **options)
        again = hesscurv.eigsh(operator(device), K, **options)
    return spread(first) | {"same": torch.equal(first.eigenvectors, again.eigenvectors)}


def measured_in_jobs(device):
    """Two jobs' measurements of a matrix of low rank, put together."""
    matrix = low_rank().to(device)
    with tempfile.TemporaryDirectory() as folder:
        for part in ((0, 2), (1, 2)):
            hesscurv.measure(matrix, K, folder, part=part)
        return spread(hesscurv.assemble(folder, matrix))


def saved_pairs(device):
    with tempfile.TemporaryDirectory() as folder:
        pairs = hesscurv.eigsh(operator(device), K, tol=1e-8)
        pairs.save(Path(folder) / "pairs")
        loaded = hesscurv.Eigenpairs.load(Path(folder) / "pairs")
    same = torch.equal(loaded.eigenvectors.cpu(), pairs.eigenvectors.cpu())
    return spread(loaded) | {"same": same}


# -- spectra and metrics --------------------------------------------------------------------------


def spectra(device):
    H = operator(device)
    density = hesscurv.spectral_density(H, num_steps=6, num_probes=2, generator=seeded())
    exact = hesscurv.spectral_density(
        H, num_steps=6, num_probes=2, generator=seeded(), eigenpairs=hesscurv.eigsh(H, K, tol=1e-8)
    )
    out = {"density": density.density(torch.linspace(-1, 1, 5, dtype=torch.float64))}
    out["with pairs"] = exact.density(torch.linspace(-1, 1, 5, dtype=torch.float64))
    for method in ("xtrace", "hutch++", "hutchinson"):
        out[method] = hesscurv.trace(H, 12, method, generator=seeded()).value
    for method in ("xdiag", "hutchinson"):
        out[f"diagonal {method}"] = hesscurv.diagonal(H, 12, method, generator=seeded()).values
    return out


def metrics(device):
    H = operator(device)
    a = hesscurv.eigsh(H, K, tol=1e-8)
    b = hesscurv.eigsh(operator(device, "ggn"), K, tol=1e-8)
    mask = hesscurv.magnitude_mask(problem("mlp", device).model, K)
    out = {"mask": mask}
    for name in ("overlap", "geodesic_distance", "chordal_f_distance", "principal_angles"):
        metric = getattr(hesscurv, name)
        out[name] = [metric(a, b), metric(a, mask)]
    out["leverage"] = hesscurv.leverage_scores(a)
    out["best"] = hesscurv.best_mask(a, K)
    return out


def by_default(device):
    """The same with the device as torch's default one."""
    H = operator(device)
    torch.set_default_device(device)
    try:
        pairs = hesscurv.eigsh(H, K, tol=1e-8)
        hesscurv.eigsh(H, K, method="rayleigh_ritz", initial=pairs)
        hesscurv.trace(H, 12)
        hesscurv.diagonal(H, 12)
        hesscurv.spectral_density(H, num_steps=5, num_probes=2)
        return spread(pairs) | {"overlap": hesscurv.overlap(pairs, pairs)}
    finally:
        torch.set_default_device(None)


# -- optimizers and the monitor -------------------------------------------------------------------


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def trained(device, base, mode, loaded):
    """Weights after some steps, a refresh among them; `loaded`: the state goes through a file."""
    found = problem("mlp", device)
    model, batch = found.model, tuple(t.to(device) for t in found.batches[0])

    def wrapped():
        inner = {
            "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            "adam": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
        }[base]()
        return hesscurv.optim.PreconditionedOptimizer(
            inner,
            model,
            TASK,
            found.batches,
            rank=K,
            refresh_every=3,
            options=hesscurv.optim.PreconditionerOptions(mode=mode, tol=1e-8),
        )

    # The problem is too small to gain anything, of which a warning tells.
    warnings.simplefilter("ignore", hesscurv.optim.CurvatureWarning)
    optimizer = wrapped()
    for step in range(5):
        if loaded and step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = wrapped()
            optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        optimizer.zero_grad()
        TASK(model, batch).backward()
        optimizer.step()
    return flat(model)


def newton(device, options):
    found = problem("mlp", device)
    batch = tuple(t.to(device) for t in found.batches[0])
    optimizer = hesscurv.optim.NewtonCG(found.model.parameters(), rank=K, **options)

    return [float(optimizer.step(lambda: TASK(found.model, batch))) for _ in range(3)]


def plain_numbers(record):
    """A record without times."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, (float, int, list)) and "seconds" not in name
    }


def monitored(device):
    """Training with a monitor: what it records; and the weights, with one and without."""
    weights, records = [], []
    for watched in (True, False):
        found = problem("mlp", device)
        batch = tuple(t.to(device) for t in found.batches[0])
        optimizer = torch.optim.SGD(found.model.parameters(), lr=0.05)
        monitor = hesscurv.hooks.CurvatureMonitor(
            found.model, TASK, found.batches, k=K, quantities="full", tol=1e-8
        )
        for step in range(3):
            optimizer.zero_grad()
            TASK(found.model, batch).backward()
            optimizer.step()
            if watched:
                records.append(monitor.step(step))
        weights.append(flat(found.model))
    return {
        "same": torch.equal(*weights),
        "records": [plain_numbers(r) for r in records if r is not None],
    }


# -- pruning --------------------------------------------------------------------------------------


def pruned(device, method, structure):
    net = prunable.network().to(device)
    report = prunable.run(net, method=method, structure=structure, generator=seeded())
    masks = {name: m.reshape(-1) for name, m in prunable.masks_of(net).items()}
    return {"masks": masks, "loss": report.loss}


def curvature_pruned(device, kind):
    found = problem("mlp", device)
    model = found.model
    pairs = hesscurv.eigsh(found.operator(hesscurv.GGNOperator), K, tol=1e-8)
    scores = hesscurv.pruning.saliency(model, pairs, kind=kind)
    hesscurv.pruning.curvature_global(list(scores), 0.5, scores)
    return {name: b for name, b in model.named_buffers() if name.endswith("_mask")}


def pruning_method(device, name):
    layer = nn.Linear(8, 4).double()
    scores = torch.arange(32, dtype=torch.float64).view(4, 8) % 7 + torch.arange(8) / 100
    layer, scores = layer.to(device), scores.to(device)
    module = hesscurv.pruning
    {
        "unstructured": lambda: module.curvature_unstructured(layer, "weight", 0.5, scores),
        "structured": lambda: module.curvature_structured(layer, "weight", 0.5, 1, scores),
        "nm": lambda: module.curvature_nm(layer, "weight", 2, 4, scores),
    }[name]()
    mask = layer.weight_mask
    prune.remove(layer, "weight")
    return mask


def pruned_files(device):
    """A pruned model's sparse file, and its masks by state dict, on another device."""
    with tempfile.TemporaryDirectory() as folder:
        net = prunable.network().to(device)
        prunable.run(net, method="magnitude")
        path = Path(folder) / "sparse"
        hesscurv.pruning.save_sparse(net, path)
        state = hesscurv.pruning.load_sparse(path)
        other, there = prunable.network(), prunable.network().to(device)
        for model in (other, there):
            model.load_state_dict(state)
    weights = [flat(m).cpu() for m in (other, there)]
    return {"same": torch.equal(*weights), "weights": weights[0]}
