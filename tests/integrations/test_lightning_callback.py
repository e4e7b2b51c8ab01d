"""Lightning: the same training with the callback; steps, checkpoints, loggers, training steps."""

import os
import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hesscurv
from hesscurv.hooks import every

pytest.importorskip("lightning")

import lightning
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoard

from hesscurv.integrations import CurvatureCallback, TrainingStepTask
from hesscurv.integrations.training.hosted_monitor import HostedMonitor

pytestmark = [
    # What Lightning says about two cores, short epochs, and interrupted ones.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*treespec.*is deprecated.*"),
]
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


class Net(LightningModule):
    """Dropout, batch norm, and a step that takes notes in the ways that steps do."""

    def __init__(self, automatic=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
        )
        self.automatic_optimization = automatic
        self.seen, self.best, self.calls = [], {}, 0
        self.register_buffer("batches", torch.zeros(()))
        self.correct = torch.zeros(())  # as a metric keeps it: no buffer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log_dict({"twice": 2 * loss}, on_epoch=True, sync_dist=True)
        self.seen.append(loss.detach())
        self.best["loss"] = loss.detach()
        self.correct += (logits.argmax(1) == y).sum()
        self.batches += 1
        self.calls += 1
        if self.logger is not None:
            self.logger.log_metrics({"by_hand": 1.0}, step=self.calls)
        if not self.automatic_optimization:
            optimizer, _ = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss}

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        layers = list(self.net)
        return [
            torch.optim.SGD(layers[0].parameters(), lr=0.1),
            torch.optim.Adam(layers[4].parameters(), lr=0.2),
        ]


def samples(n=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def loader(**options):
    return DataLoader(samples(), 8, shuffle=True, **options)


def fit(callbacks, folder, build=Net, data=None, epochs=2, **options):
    """Train, from the same random numbers every time."""
    given = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
    checkpoint = given.pop("ckpt_path", None)
    seed_everything(1)
    module = build()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **given,
    )
    trainer.fit(module, loader() if data is None else data, ckpt_path=checkpoint)
    return trainer, module


def everything(trainer, module):
    """Weights, buffers, gradients, notes, what was logged, and random generators."""
    return {
        **{name: t.clone() for name, t in module.state_dict().items()},
        **{f"{name}.grad": p.grad for name, p in module.named_parameters()},
        "seen": torch.stack(module.seen),
        "correct": module.correct,
        "calls": torch.tensor(module.calls),
        **{f"logged {name}": value for name, value in trainer.callback_metrics.items()},
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.from_numpy(numpy.random.get_state()[1].astype("int64")),
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    different = [
        name
        for name, value in expected.items()
        if (value is None) != (found[name] is None)
        or (value is not None and not torch.equal(found[name], value))
    ]
    assert different == []


CASES = {
    "as it is": {},
    "accumulated, own generator": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "manual": {"build": lambda: Net(automatic=False)},
}


@pytest.mark.parametrize("case", CASES)
def test_training_has_the_same_bits_with_the_callback(case, tmp_path):
    def run(*callbacks):
        options = dict(CASES[case])
        if "own generator" in case:
            options["data"] = loader(generator=torch.Generator().manual_seed(5))
        return everything(*fit(list(callbacks), tmp_path, **options))

    task = TASK if case == "manual" else None
    quantities = "full" if case == "as it is" else "cheap"
    callback = CurvatureCallback(task, k=2, schedule=every(2), quantities=quantities)
    expected = run()
    assert_equal(run(callback), expected)
    assert {record["status"] for record in callback.records} == {"ok"}
    # Steps of the optimizer, of ten batches, and the start.
    last = 6 if "accumulate_grad_batches" in CASES[case] else 10
    assert [record["step"] for record in callback.records] == list(range(0, last + 1, 2))
    rate = 0.2 if case == "manual" else 0.1  # the largest of all optimizers
    assert {record["learning_rate"] for record in callback.records} == {rate}


@pytest.mark.parametrize("task", [None, TASK], ids=["training step", "task"])
def test_the_curvature_is_that_of_the_training_loss(task, tmp_path):
    probe = [samples()[:10], samples()[10:40]]  # of unequal sizes
    callback = CurvatureCallback(task, probe, k=3, schedule=every(100), tol=1e-8)
    model = Net()
    before = {name: t.double() for name, t in model.state_dict().items()}
    fit([callback], tmp_path, lambda: model, precision="64-true", epochs=1)

    x, y = samples().tensors
    plain = Net().double().eval()
    names = [name for name, _ in plain.named_parameters()]
    shapes = [before[name].shape for name in names]

    def loss(w):
        parts = w.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(plain, {**before, **values}, (x.double(),))
        return nn.functional.cross_entropy(logits, y)

    w = torch.cat([before[name].flatten() for name in names])
    dense = torch.autograd.functional.hessian(loss, w)
    exact = torch.linalg.eigvalsh(dense)
    top = exact[exact.abs().argsort(descending=True)][:3]
    record = callback.records[0]
    # Converged to 1e-8 of the eigenvalue, in float64; eigenvalues are better than that.
    torch.testing.assert_close(torch.tensor(record["eigenvalues"]).double(), top, rtol=1e-7, atol=0)
    assert record["loss"] == pytest.approx(float(loss(w)), rel=1e-12)


def test_a_resumed_run_goes_on_with_records_and_eigenspace(tmp_path):
    def callback():
        return CurvatureCallback(TASK, [samples()[:]], k=2, schedule=every(2), quantities="overlap")

    def values(records):
        return [(r["step"], r["eigenvalues"], r.get("space_overlap")) for r in records]

    # Without dropout, since Lightning restores no random numbers; and in order.
    def build():
        module = Net()
        module.net[3].p = 0.0
        return module

    def run(watch, epochs, **options):
        return fit([watch], tmp_path, build, DataLoader(samples(), 8), epochs, **options)

    whole, first, second = callback(), callback(), callback()
    run(whole, 2)
    trainer, _ = run(first, 1)
    assert trainer.global_step == 5
    half = tmp_path / "half.ckpt"
    trainer.save_checkpoint(half)
    state = torch.load(half, weights_only=True)["callbacks"]
    assert any("curvature" in key for key in state)
    run(second, 2, ckpt_path=half)
    assert [r["step"] for r in second.records] == [0, 2, 4, 6, 8, 10]
    assert values(second.records) == values(whole.records)
    # One with another name in the same run has a state of its own.
    assert callback().state_key != CurvatureCallback(TASK, name="other").state_key


def test_the_trainers_loggers_get_scalars_and_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = LightningTensorBoard(tmp_path, "board"), CSVLogger(tmp_path, "table")
    callback = CurvatureCallback(k=2, schedule=every(5), name="watch")
    fit([callback], tmp_path, logger=[board, table])
    events = EventAccumulator(board.log_dir, {"scalars": 0, "histograms": 0}).Reload()
    values = [(e.step, e.value) for e in events.Scalars("watch/sharpness")]
    expected = [(r["step"], pytest.approx(r["sharpness"])) for r in callback.records]
    assert values == expected
    assert [e.step for e in events.Histograms("watch/eigenvalues")] == [0, 5, 10]
    assert "watch/sharpness" in (tmp_path / "table/version_0/metrics.csv").read_text()
    # What the step logs by hand is logged by the training's steps alone.
    assert len(events.Scalars("by_hand")) == 10


def test_loggers_that_are_given_take_the_place_of_the_trainers(tmp_path):
    got = []

    class Mine:
        def log(self, record, step):
            got.append((step, record["sharpness"]))

    callback = CurvatureCallback(k=1, schedule=every(4), loggers=[Mine()])
    fit([callback], tmp_path, logger=CSVLogger(tmp_path, "table"))
    assert got == [(r["step"], r["sharpness"]) for r in callback.records]
    assert "curvature" not in (tmp_path / "table/version_0/metrics.csv").read_text()


@pytest.fixture
def no_ranks():
    """Lightning leaves a process group, and variables that name it."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("no_ranks")
def test_in_ddp_the_wrapped_module_is_measured(tmp_path):
    x, y = samples().tensors
    callback = CurvatureCallback(None, [(x, y)], k=2, schedule=every(5))
    expected = everything(*fit([], tmp_path, strategy="ddp"))
    assert_equal(everything(*fit([callback], tmp_path, strategy="ddp")), expected)
    assert isinstance(callback.monitor.model, nn.parallel.DistributedDataParallel)
    seed_everything(1)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(Net().eval()(x), y))
    assert callback.records[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert [(r["step"], r["status"]) for r in callback.records] == [
        (0, "ok"),
        (5, "ok"),
        (10, "ok"),
    ]


def test_batches_go_through_the_modules_transfer_hooks(tmp_path):
    class Shifted(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

    x, y = samples().tensors
    given = CurvatureCallback(TASK, [(x, y)], k=1, schedule=every(99))
    by_hand = CurvatureCallback(TASK, [(x + 1, y)], k=1, schedule=every(99))
    fit([given], tmp_path, Shifted)
    fit([by_hand], tmp_path)
    assert given.records[0]["loss"] == by_hand.records[0]["loss"]


def test_a_plain_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = CurvatureCallback(k=10, schedule=every(100))
    lightning.Trainer(max_epochs=1, callbacks=[watch]).fit(Net(), loader())
    assert [r["step"] for r in watch.records] == [0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(4), 1)] * 8)


REFUSED = {
    "manual": (TypeError, "automatic optimization", {"build": lambda: Net(automatic=False)}),
    "stream": (ValueError, "iterable", {"data": lambda: DataLoader(Stream(), 4)}),
    "dict": (ValueError, "one training DataLoader", {"data": lambda: {"a": loader()}}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_watched_is_refused_before_the_first_step(case, tmp_path):
    error, words, options = REFUSED[case]
    module = options.get("build", Net)()
    data = options["data"]() if "data" in options else None
    with pytest.raises(error, match=words):
        fit([CurvatureCallback()], tmp_path, lambda: module, data)
    assert module.calls == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="expected a task"):
        CurvatureCallback(3)
    with pytest.raises(ValueError, match="one batch"):
        CurvatureCallback(TASK, samples().tensors)
    with pytest.raises(TypeError, match="trainer's own is watched"):
        CurvatureCallback(optimizer=torch.optim.SGD([torch.zeros(1)], lr=1))
    with pytest.raises(TypeError, match=r"CurvatureCallback\(.*MonitorOptions\(history=3\)"):
        CurvatureCallback(history=3)
    with pytest.raises(TypeError, match="seed= has moved: pass generator="):
        CurvatureCallback(seed=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'scedule'"):
        CurvatureCallback(scedule=every(3))
    with pytest.raises(TypeError, match="expected options to be a MonitorOptions, got a dict"):
        CurvatureCallback(options={"history": 3})


def test_a_training_step_serves_as_a_task_without_a_trainer():
    module = Net().double()
    x, y = samples().tensors
    step = hesscurv.HessianOperator(module, TrainingStepTask(), [(x.double(), y)])
    task = hesscurv.HessianOperator(module, TASK, [(x.double(), y)])
    v = torch.randn(step.shape[0], dtype=torch.float64)
    torch.testing.assert_close(step @ v, task @ v, rtol=1e-12, atol=1e-12)
    assert (module.seen, module.best, module.calls, float(module.correct)) == ([], {}, 0, 0.0)
    assert float(module.batches) == 0
    assert "log" not in vars(module)


def test_a_step_that_is_no_loss_of_a_batch_is_an_error():
    class Silent(Net):
        def training_step(self, batch):
            return None

    class OfIterator(Net):
        def training_step(self, dataloader_iter):
            raise AssertionError("is not to be called")

    with pytest.raises(TypeError, match="dataloader_iter"):
        TrainingStepTask()(OfIterator(), samples()[:4])
    with pytest.raises(TypeError, match="return a loss"):
        TrainingStepTask()(Silent(), samples()[:4])
    with pytest.raises(TypeError, match="training_step"):
        TrainingStepTask()(nn.Linear(2, 2), samples()[:4])


def test_a_generator_decides_the_probe_set_for_all_runs_of_the_trainer():
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batches = loader()

    def losses(**arguments):
        hosted = HostedMonitor(TASK, None, 2, 8, {"quantities": ("loss",), **arguments})
        found = []
        for step in range(2):  # the second run of a trainer has a new monitor
            hosted.begin(module, TASK, batches, optimizer, [])
            found.append(hosted.monitor.measure(step)["loss"])
        return found

    generator = torch.Generator().manual_seed(3)
    (plain, again), (first, second) = losses(), losses(generator=generator)
    assert plain == again
    assert first == second != plain
    assert losses(generator=torch.Generator().manual_seed(3)) == [first, second]
    assert losses(generator=generator) != [first, second]  # drawn from, once
