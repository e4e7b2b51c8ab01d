"""A user's script with each public name, for type checkers; see test_typing.py. It is not run."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import hesscurv
from hesscurv import hooks, integrations, optim, plots, pruning
from hesscurv.operators import OperatorSum, as_linear_operator
from hesscurv.spectra import Estimate

model = nn.Sequential(nn.Linear(4, 3))
x, y = torch.randn(8, 4), torch.arange(8) % 3
batches = [(x, y)]


class Language(hesscurv.Task):
    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = model(batch["input_ids"])
        return out

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])


class Diagonal:
    """An operator of a library of one's own."""

    shape = (8, 8)
    dtype = torch.float64
    device = torch.device("cpu")

    def __matmul__(self, other: Tensor) -> Tensor:
        return 2 * other


def operators() -> hesscurv.LinearOperator:
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    H = hesscurv.HessianOperator(model, task, batches, params=lambda name, p: p.ndim > 1)
    G = hesscurv.GGNOperator(model, Language(), batches, params=["0.weight"])
    F = hesscurv.EmpiricalFisherOperator(model, task, batches)
    closure = hesscurv.HessianOperator(model, lambda model: model(x).square().mean())
    operator: hesscurv.SymmetricOperator = Diagonal()
    assert_type(as_linear_operator(operator), hesscurv.LinearOperator)
    v = torch.randn(H.shape[0])
    assert_type(H @ v, Tensor)
    assert_type(2 * H, OperatorSum)
    assert_type(H * 0.5 + G - F, OperatorSum)
    assert_type(-H, OperatorSum)
    assert_type(H - 0.1, OperatorSum)
    part: hesscurv.LinearOperator = H.restrict(["0.weight"])
    assert_type(part.to_dense(), Tensor)
    assert_type(H.num_matvecs, int)
    assert_type(H.dtype, torch.dtype)
    assert_type(H.device, torch.device)
    assert_type(H.layout, hesscurv.ParameterLayout)
    assert_type(H.layout.split(v), dict[str, Tensor])
    assert_type(closure.matvec(v), Tensor)
    return H


def eigenpairs(H: hesscurv.LinearOperator, folder: Path) -> hesscurv.Eigenpairs:
    pairs = hesscurv.eigsh(H, k=5, progress=True, generator=torch.Generator())
    assert_type(pairs, hesscurv.Eigenpairs)
    assert_type(hesscurv.eigsh(torch.eye(4), 2, which="SA"), hesscurv.Eigenpairs)
    assert_type(hesscurv.eigsh(Diagonal(), 2, "single_pass"), hesscurv.Eigenpairs)
    assert_type(pairs.eigenvalues, Tensor)
    assert_type(pairs.eigenvectors, Tensor)
    assert_type(pairs.residuals, Tensor)
    assert_type(pairs.converged, Tensor)
    assert_type(pairs.num_matvecs, int)
    assert_type(pairs[0], hesscurv.Eigenpairs)
    assert_type(pairs[:3], hesscurv.Eigenpairs)
    assert_type([pair.num_matvecs for pair in pairs], list[int])
    assert_type(len(pairs), int)
    assert_type(pairs.truncate(2).to(torch.float64).gather(), hesscurv.Eigenpairs)
    pairs.save(folder / "pairs.pt")
    assert_type(hesscurv.Eigenpairs.load("pairs.pt"), hesscurv.Eigenpairs)
    assert_type(hesscurv.measure(H, 5, folder, part=(0, 2)), list[tuple[int, int]])
    assert_type(hesscurv.missing(folder), list[tuple[int, int]])
    assert_type(hesscurv.assemble(folder, H), hesscurv.Eigenpairs)
    error = hesscurv.a_posteriori_error(H, pairs)
    assert_type(error, hesscurv.ErrorEstimate)
    G = hesscurv.GGNOperator(model, hesscurv.supervised(nn.CrossEntropyLoss()), batches)
    space = hesscurv.SampleSpace(G)
    assert_type(space.eigenvalues, Tensor)
    assert_type(space.trace(), float)
    assert_type(space.overlap_by_parameter(space.leverage(3) > 0.1, k=3), dict[str, float])
    assert_type(error.relative_error, float)
    assert_type(error.confidence_interval(), tuple[float, float])
    warnings.simplefilter("error", hesscurv.ConvergenceWarning)
    try:
        H.confirm()
    except hesscurv.DistributedError as failed:
        print(failed)
    return pairs


def spectra(H: hesscurv.LinearOperator, pairs: hesscurv.Eigenpairs) -> None:
    density = hesscurv.spectral_density(H, eigenpairs=pairs)
    assert_type(density, hesscurv.SpectralDensity)
    assert_type(density.expectation(torch.abs), Estimate)
    assert_type(density.density().value, Tensor)
    assert_type(density.range, tuple[float, float])
    trace: hesscurv.TraceEstimate = hesscurv.trace(H, 12)
    assert_type(trace.value, float)
    diagonal: hesscurv.DiagonalEstimate = hesscurv.diagonal(H, 12)
    assert_type(diagonal.values, Tensor)


def metrics(pairs: hesscurv.Eigenpairs) -> None:
    mask = hesscurv.magnitude_mask(model, 5)
    assert_type(mask, Tensor)
    subspaces: list[hesscurv.Subspace] = [mask, pairs, pairs.eigenvectors]
    a, b = subspaces[:2]
    assert_type(hesscurv.overlap(a, b), float)
    assert_type(hesscurv.principal_angles(a, b), Tensor)
    assert_type(hesscurv.geodesic_distance(a, b, normalized=True), float)
    assert_type(hesscurv.chordal_2_distance(a, b), float)
    assert_type(hesscurv.chordal_f_distance(a, b), float)
    assert_type(hesscurv.projection_2_distance(a, b), float)
    assert_type(hesscurv.projection_f_distance(a, b), float)
    assert_type(hesscurv.fubini_study_distance(a, b), float)
    assert_type(hesscurv.grassmann_distances(a, b), dict[str, float])
    assert_type(hesscurv.random_mask(15, 5), Tensor)
    assert_type(hesscurv.top_k_mask(torch.rand(15), 5), Tensor)
    assert_type(hesscurv.best_mask(pairs), Tensor)
    assert_type(hesscurv.intersection_over_union(mask, mask), float)
    assert_type(hesscurv.leverage_scores(pairs), Tensor)
    assert_type(hesscurv.leverage_by_parameter(pairs), dict[str, Tensor])
    assert_type(hesscurv.overlap_by_k(torch.rand(15), pairs), Tensor)
    by_parameter = hesscurv.overlap_by_parameter(mask, pairs)
    assert_type(by_parameter, dict[str, hesscurv.ParameterOverlap])
    chance: hesscurv.ChanceOverlap = hesscurv.chance_overlap(5, 15, against="random_mask")
    assert_type(chance.mean, float)
    assert_type(hesscurv.overlap_z_score(a, b), float)


def prune(pairs: hesscurv.Eigenpairs, folder: Path) -> None:
    layer = nn.Linear(4, 3)
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    weights = pruning.find_weights(model)
    assert_type(weights, dict[str, pruning.Weight])
    scores = pruning.saliency(model, pairs, "obs")
    assert_type(scores, dict[pruning.Weight, Tensor])
    some = torch.rand(3, 4)
    assert_type(pruning.curvature_unstructured(layer, "weight", 0.5, some), nn.Linear)
    assert_type(pruning.curvature_structured(layer, "weight", 0.5), nn.Linear)
    assert_type(pruning.curvature_nm(layer, "weight", 2, 4, some), nn.Linear)
    pruning.CurvatureUnstructured.apply(layer, "weight", 0.5, some)
    pruning.CurvatureStructured.apply(layer, "weight", 0.5)
    pruning.CurvatureNM.apply(layer, "weight", 2, 4)
    pruning.curvature_global(list(scores), 0.5, scores)
    pruning.prepare_attention_(model)
    quadratic = pruning.quadratic_model_of(model, pairs)
    assert_type(quadratic, pruning.QuadraticModel)
    assert_type(pruning.compensate_(model, pruning.masks_of(model), quadratic), float)
    report = pruning.prune_model(model, task, batches, 0.8, method="obs", progress=True)
    assert_type(report, pruning.PruningReport)
    options = pruning.PruningOptions(measuring=pruning.Measuring(rows="fisher"))
    assert_type(options.max_calibration, int)
    assert_type(report.stages, list[pruning.StageReport])
    assert_type(report.layers, list[pruning.LayerReport])
    assert_type(report.loss, float)
    assert_type(report.plot(), Figure)
    assert_type(pruning.recalibrate_(model, task, batches), int)
    assert_type(pruning.pruned_weights(model), dict[str, pruning.Weight])
    pruning.refresh_(layer, "weight")
    pruning.register_weight_axes(nn.Linear, outputs=0, inputs=1)
    pruning.apply_masks_(model, pruning.masks_of(model))
    pruning.load_pruned_(model, pruning.dense_state_dict(model))
    adam = torch.optim.Adam(model.parameters())
    assert_type(pruning.mask_optimizer_state_(adam, model), int)
    assert_type(pruning.save_sparse(model, folder / "sparse.pt"), int)
    assert_type(pruning.load_sparse(folder / "sparse.pt")["0.weight"], Tensor)
    assert_type(pruning.is_semi_structured(some > 0), bool)
    assert_type(pruning.to_semi_structured_(model), list[str])


def train(folder: Path) -> None:
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    warnings.simplefilter("error", optim.CurvatureWarning)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = optim.PreconditionedOptimizer(base, model, task, batches, rank=5)
    assert_type(optimizer.step(lambda: 1.0), float)
    optimizer.step()
    report = optimizer.report()
    assert_type(report, optim.PreconditionerReport)
    assert_type(report.refresh_fraction, float)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    newton = optim.NewtonCG(model.parameters(), rank=5)
    loss: Callable[[], Tensor] = lambda: model(x).square().mean()  # noqa: E731
    assert_type(newton.step(loss), Tensor)
    assert_type(optim.NewtonOptions(solver="dense").solver, str)
    assert_type(optim.PreconditionerOptions(tol=0.1).tol, float)
    assert_type(hooks.MonitorOptions(history=3).history, int | None)
    live = hooks.LiveReport(folder / "live.html")
    live.close()
    assert_type(newton.diagnostics(), dict[str, float])
    identity = optim.LowRankPreconditioner.identity(torch.zeros(15))
    assert_type(identity, optim.LowRankPreconditioner)
    assert_type(optim.stable_rate(2.0), float)

    monitor = hooks.CurvatureMonitor(
        model,
        task,
        batches,
        k=5,
        schedule=hooks.every(10),
        loggers=[hooks.JSONLinesWriter(folder / "a.jsonl"), hooks.CSVWriter(folder / "a.csv")],
        optimizer=base,
    )
    assert_type(hooks.logarithmic()(3), bool)
    assert_type(hooks.dense_then_sparse(until=20)(3), bool)
    warnings.simplefilter("error", hooks.MonitorWarning)
    assert_type(monitor.step(3), dict[str, Any] | None)
    assert_type(monitor.pairs, hesscurv.Eigenpairs | None)
    assert_type(monitor.report(folder / "run.html"), Path)
    records = hooks.read_records(folder / "a.jsonl")
    assert_type(records, list[dict[str, Any]])
    trigger = hooks.PruneWhenStable(monitor, batches, 0.8, stability=hooks.Stability(patience=2))
    assert_type(trigger.done, bool)

    axes = [
        *(plots.spectrum(monitor.records[-1]), plots.eigenvalues(records)),
        *(plots.overlap_by_k(records), plots.overlap_by_step(records)),
        *(
            plots.leverage(records),
            plots.sparsity(records),
            plots.by_parameter(records, "sparsity"),
        ),
        *(plots.sharpness(records), plots.space_overlaps(records), plots.mask_ious(records)),
        plots.by_step(records, "loss"),
    ]
    assert_type(axes, list[Axes])


def adapters(pairs: hesscurv.Eigenpairs, task: hesscurv.Task) -> None:
    eigenspace = integrations.EigenspaceImportance(model, pairs)
    assert_type(eigenspace.pairs, hesscurv.Eigenpairs | None)
    assert_type(integrations.FisherImportance(model, task, batches).measured(), set[str])
    assert_type(integrations.CompensatedImportance(model, task, batches).measured(), set[str])
    assert_type(integrations.compensate_channels_(model, task, batches, []), dict[str, float])
    assert_type(integrations.remove_channels_(model, task, batches, []), dict[str, float])
    assert_type(integrations.macs_per_entry(model, x), dict[str, float])
    assert_type(integrations.TrainingStepTask().weight(x), float)
    assert_type(integrations.ModelLossTask().weight(x), float)
    assert_type(integrations.CausalLMTask().loss(x, y), Tensor)
    integrations.TensorBoardLogger("runs").log({"loss": 1.0}, 0)
    integrations.WandbLogger().log({"loss": 1.0}, 0)
    assert_type(integrations.CurvatureCallback(task, batches, k=5).name, str)
    assert_type(integrations.CurvatureTrainerCallback(task, batches, k=5).name, str)
