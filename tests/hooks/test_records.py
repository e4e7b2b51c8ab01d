"""What a record holds, against dense linear algebra on the same model."""

import json

import pytest
import torch
from hooks.watched import TASK, Kept, data, dense_hessian, net, train

import hesscurv
from hesscurv.hooks import CurvatureMonitor, MonitorOptions, every
from hesscurv.hooks.monitoring.quantities import PRESETS, QUANTITIES

K = 6
TOL = 1e-8  # the eigensolver's, where formulas are compared
ALWAYS = {"step", "status", "seconds", "num_matvecs", "fraction"}
KEYS = {
    "loss": {"loss"},
    "eigenvalues": {"eigenvalues", "residuals", "converged"},
    "sharpness": {"sharpness", "learning_rate", "stable_rate", "sharpness_ratio"},
    "gradient_share": {"gradient_share"},
    "overlap": {"overlap", "overlap_chance", "overlap_chance_std", "overlap_z_score"},
    "overlap_by_k": {"overlap_by_k"},
    "overlap_by_parameter": {
        "overlap_by_parameter",
        "leverage_by_parameter",
        "mask_by_parameter",
    },
    "space_overlap": {"space_overlap", "space_overlap_first", "space_overlaps"},
    "mask_iou": {"mask_iou", "mask_iou_first", "mask_ious"},
    "trace": {"trace", "trace_standard_error", "effective_rank"},
    "sparsity": {"sparsity", "sparsity_by_parameter"},
}


class Run:
    """A run of three measurements, with the dense eigendecomposition at each."""

    def __init__(self):
        self.model, self.batches = net(noisy=True), data(3)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.logger = Kept()
        self.monitor = CurvatureMonitor(
            self.model,
            TASK,
            self.batches,
            K,
            quantities="full",
            schedule=every(4),
            optimizer=optimizer,
            loggers=[self.logger],
            tol=TOL,
            options=MonitorOptions(max_matvecs=20 * K, trace_matvecs=40),
        )
        self.spectra, self.gradients, self.weights = [], [], []
        train(self.model, 9, self.after, optimizer=optimizer)
        self.records = self.monitor.records

    def after(self, step):
        if self.monitor.step(step) is None:
            return
        hessian, gradient = dense_hessian(self.model, self.batches)
        values, vectors = torch.linalg.eigh(hessian)
        order = values.abs().argsort(descending=True)
        self.spectra.append((values[order], vectors[:, order]))
        self.gradients.append(gradient)
        self.weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))

    def mask(self, i):
        """The mask of the largest weights at the i-th measurement."""
        mask = torch.zeros(len(self.weights[i]), dtype=torch.bool)
        mask[self.weights[i].abs().topk(K).indices] = True
        return mask

    def overlap(self, i, j):
        """Mean squared cosine between the i-th and the j-th eigenspace."""
        a, b = (self.spectra[m][1][:, :K] for m in (i, j))
        return float((a.T @ b).square().sum()) / K


@pytest.fixture(scope="module")
def run():
    return Run()


def test_a_record_is_plain_and_complete(run):
    assert [r["step"] for r in run.records] == [0, 4, 8]
    expected = ALWAYS | set().union(*KEYS.values())
    later = {"space_overlap", "space_overlap_first", "mask_iou", "mask_iou_first"}
    assert set(run.records[0]) == expected - later
    for record in run.records[1:]:
        assert set(record) == expected
    assert json.loads(json.dumps(run.records, allow_nan=False)) == run.records


def test_loggers_get_every_record(run):
    assert run.logger.records == [(r["step"], r) for r in run.records]


def test_eigenvalues_are_those_of_the_dense_hessian(run):
    for record, (values, _) in zip(run.records, run.spectra, strict=True):
        assert record["eigenvalues"] == pytest.approx(values[:K].tolist(), rel=1e-9)
        assert record["sharpness"] == pytest.approx(float(values[:K].max()), rel=1e-9)
        assert record["converged"] == K
        assert max(record["residuals"]) <= TOL * float(values[0].abs())


def test_sharpness_is_set_beside_the_learning_rate(run):
    for record in run.records:
        assert record["learning_rate"] == 0.1
        assert record["sharpness_ratio"] == pytest.approx(record["sharpness"] * 0.05)
        # Heavy-ball momentum is stable up to 2 (1 + beta) / lambda.
        assert record["stable_rate"] == pytest.approx(2 * 1.9 / record["sharpness"])


def test_the_loss_and_the_gradients_share_are_those_of_the_probe_in_eval_mode(run):
    model = run.model.eval()
    inputs, targets = (torch.cat(parts) for parts in zip(*run.batches, strict=True))
    expected = torch.nn.functional.cross_entropy(model(inputs), targets).item()
    model.train()
    assert run.records[-1]["loss"] == pytest.approx(expected, rel=1e-12)
    for record, (_, V), g in zip(run.records, run.spectra, run.gradients, strict=True):
        share = float((V[:, :K].T @ g).square().sum() / g.square().sum())
        assert record["gradient_share"] == pytest.approx(share, rel=1e-6)


def test_overlaps_are_mean_leverage_over_the_mask(run):
    D = len(run.weights[0])
    for i, record in enumerate(run.records):
        leverage = run.spectra[i][1][:, :K].square().sum(1)
        assert record["overlap"] == pytest.approx(float(leverage[run.mask(i)].sum()) / K, rel=1e-6)
        assert record["overlap_chance"] == pytest.approx(K / D)
        score = (record["overlap"] - K / D) / record["overlap_chance_std"]
        assert record["overlap_z_score"] == pytest.approx(score)
        assert record["overlap_by_k"][str(K)] == pytest.approx(record["overlap"])
        order = run.weights[i].abs().argsort(descending=True)
        for j in range(1, K + 1):
            part = run.spectra[i][1][order[:j], :j].square().sum() / j
            assert record["overlap_by_k"][str(j)] == pytest.approx(float(part), rel=1e-5)


def test_parts_by_parameter_sum_to_the_whole(run):
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    for i, record in enumerate(run.records):
        assert list(record["overlap_by_parameter"]) == list(sizes)
        assert sum(record["overlap_by_parameter"].values()) == pytest.approx(record["overlap"])
        assert sum(record["leverage_by_parameter"].values()) == pytest.approx(1)
        kept = {n: record["mask_by_parameter"][n] * size for n, size in sizes.items()}
        assert sum(kept.values()) == pytest.approx(K)
        first = int(run.mask(i)[: sizes["0.weight"]].sum())
        assert kept["0.weight"] == pytest.approx(first)


def test_spaces_are_compared_with_their_earlier_selves(run):
    # The first and the kept ones are rounded to float16, so overlaps err by some 1e-5.
    for i, record in enumerate(run.records[1:], start=1):
        assert record["space_overlap"] == pytest.approx(run.overlap(i - 1, i), rel=1e-6)
        assert record["space_overlap_first"] == pytest.approx(run.overlap(0, i), abs=1e-4)
        assert [step for step, _ in record["space_overlaps"]] == [0, 4][:i]
        for j, (_, value) in enumerate(record["space_overlaps"]):
            assert value == pytest.approx(run.overlap(j, i), abs=1e-4)
    assert run.records[0]["space_overlaps"] == []


def test_masks_are_compared_with_their_earlier_selves(run):
    def iou(i, j):
        a, b = run.mask(i), run.mask(j)
        return int((a & b).sum()) / int((a | b).sum())

    for i, record in enumerate(run.records[1:], start=1):
        assert record["mask_iou"] == iou(i - 1, i)
        assert record["mask_iou_first"] == iou(0, i)
        assert record["mask_ious"] == [[4 * j, iou(j, i)] for j in range(i)]
    assert torch.equal(run.monitor.mask, run.mask(2))


def test_the_trace_is_within_its_error(run):
    for record, (values, _) in zip(run.records, run.spectra, strict=True):
        error = record["trace_standard_error"]
        assert abs(record["trace"] - float(values.sum())) <= 4 * error
        assert error < 0.1 * float(values.abs().sum())
        assert record["effective_rank"] == pytest.approx(record["trace"] / float(values[0].abs()))


def test_pairs_have_the_names_of_the_parameters(run):
    pairs = run.monitor.pairs
    assert pairs.layout.names == tuple(name for name, _ in run.model.named_parameters())
    V = run.spectra[-1][1][:, :K]
    assert float((pairs.eigenvectors.T @ V).square().sum()) == pytest.approx(K, rel=1e-9)


def test_the_cost_is_counted(run):
    for record in run.records:
        assert record["num_matvecs"] >= K + 40
        assert record["seconds"] > 0
        assert 0 < record["fraction"] <= 1


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_quantity_by_itself_has_its_keys_and_no_others(quantity):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = CurvatureMonitor(
        model,
        TASK,
        data(1),
        3,
        quantities=(quantity,),
        optimizer=optimizer,
        options=MonitorOptions(history=2),
    )
    assert monitor.quantities == (quantity,)
    monitor.measure(0)
    assert set(monitor.measure(1)) == ALWAYS | KEYS[quantity]


def test_presets_grow():
    assert set(PRESETS["cheap"]) < set(PRESETS["overlap"]) < set(PRESETS["full"])
    monitor = CurvatureMonitor(net(), TASK, data(1), 3, quantities=("cheap", "trace"))
    assert monitor.quantities == (*PRESETS["cheap"], "trace")
    assert set(monitor.measure(0)) == ALWAYS | KEYS["loss"] | KEYS["eigenvalues"] | KEYS[
        "gradient_share"
    ] | KEYS["trace"] | {"sharpness", "stable_rate"}


def test_masks_and_sparsity_alone_need_no_product():
    monitor = CurvatureMonitor(net(), TASK, data(1), 3, quantities=("mask_iou", "sparsity"))
    assert monitor.measure(0)["num_matvecs"] == 0
    assert monitor.pairs is None


@pytest.mark.parametrize(("size", "entries"), [(None, 3), (20, 20), (0.25, 15), (1.0, 59)])
def test_the_mask_has_the_size_asked_for(size, entries):
    monitor = CurvatureMonitor(
        net(), TASK, data(1), 3, quantities="mask_iou", options=MonitorOptions(mask_size=size)
    )
    monitor.measure(0)
    assert int(monitor.mask.sum()) == entries


def test_a_fixed_mask_of_all_weights_has_the_overlap_of_its_size():
    monitor = CurvatureMonitor(
        net(), TASK, data(1), 3, quantities="overlap", options=MonitorOptions(mask_size=59)
    )
    record = monitor.measure(0)
    assert record["overlap"] == pytest.approx((3 * 59) ** 0.5 / 59)
    assert record["overlap_chance_std"] == 0
    assert "overlap_z_score" not in record


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_other_curvatures_are_positive(curvature):
    monitor = CurvatureMonitor(net(), TASK, data(1), 4, curvature=curvature)
    assert min(monitor.measure(0)["eigenvalues"]) > 0


def test_more_pairs_than_parameters_are_all_of_them():
    model = torch.nn.Linear(2, 1).double()
    task = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(),)]
    record = CurvatureMonitor(model, task, batches, 10, quantities="full").measure(0)
    assert len(record["eigenvalues"]) == 3
    H = torch.tensor([[1.0, 0.0, 1.0], [0.0, 4.0, 2.0], [1.0, 2.0, 2.0]]).double()
    assert record["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(H).flip(0), abs=1e-8)
    assert record["trace"] == pytest.approx(7.0)
    assert record["trace_standard_error"] == 0


def test_a_closure_needs_no_batches():
    model = net()
    inputs, targets = data(1)[0]
    loss = torch.nn.CrossEntropyLoss()
    closed = CurvatureMonitor(model, lambda model: loss(model(inputs), targets), k=3)
    given = CurvatureMonitor(model, TASK, [(inputs, targets)], 3)
    expected = given.measure(0)["eigenvalues"]
    assert closed.measure(0)["eigenvalues"] == pytest.approx(expected, rel=1e-6)


def test_some_of_the_parameters_are_measured():
    monitor = CurvatureMonitor(
        net(), TASK, data(1), 3, params=["0.weight", "2"], quantities=("overlap_by_parameter",)
    )
    parts = monitor.measure(0)["leverage_by_parameter"]
    assert list(parts) == ["0.weight", "2.weight", "2.bias"]


def test_a_step_is_measured_once():
    monitor = CurvatureMonitor(net(), TASK, data(1), 2, schedule=every(2))
    for step in (0, 0, 1, 2, 2, 2, 3):
        monitor.step(step)
    assert [r["step"] for r in monitor.records] == [0, 2]


def test_inputs_may_require_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    points = torch.linspace(-1, 1, 6)[:, None].requires_grad_()

    def slope(model, batch):
        (found,) = torch.autograd.grad(model(batch[0]).sum(), batch[0], create_graph=True)
        return found.square().mean()

    record = CurvatureMonitor(model, slope, [(points,)], 3).measure(0)
    assert record["status"] == "ok"
    expected = hesscurv.eigsh(hesscurv.HessianOperator(model, slope, [(points,)]), 3)
    assert record["eigenvalues"] == pytest.approx(expected.eigenvalues.tolist(), rel=1e-3)
