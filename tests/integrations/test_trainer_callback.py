"""Hugging Face's Trainer: the same training with the callback, its steps, checkpoints, reports."""

import random
import shutil

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import hesscurv
from hesscurv.hooks import MonitorWarning, every
from hesscurv.storage.checked_files import read_checked

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hesscurv.integrations import CausalLMTask, CurvatureTrainerCallback, ModelLossTask

V = 19


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its state in classes, from one test to the next."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def language_model():
    config = GPT2Config(
        vocab_size=V, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)  # with dropout


def classifier():
    config = BertConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def tokens(n=24):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, V, (n, 8), generator=generator)
    labels = ids.clone()
    labels[:, 6:] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def sentences(n=24):
    return [{**row, "labels": int(row["input_ids"][0]) % 3} for row in tokens(n)]


def train(folder, callbacks, build=language_model, data=None, resume=None, **given):
    """Train, from the same random numbers every time."""
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", **given}
    arguments = TrainingArguments(
        str(folder),
        learning_rate=0.01,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"report_to": "none", **options},
    )
    set_seed(1)
    trainer = Trainer(build(), arguments, train_dataset=data or tokens(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def everything(trainer):
    """Weights, what was logged, and random generators."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    logged = [{k: v for k, v in row.items() if k in keys} for row in trainer.state.log_history]
    state = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    return state, logged, states


def assert_equal(found, expected):
    different = [name for name, t in expected[0].items() if not torch.equal(found[0][name], t)]
    assert different == []
    assert found[1] == expected[1]
    assert torch.equal(found[2][0], expected[2][0])
    assert found[2][1:] == expected[2][1:]


CASES = {
    "as it is": {},
    "accumulated, bf16": {"gradient_accumulation_steps": 2, "bf16": True},
    "classifier": {"build": classifier, "data": sentences()},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if c == "checkpointed" else ()) for c in CASES],
)
def test_training_has_the_same_bits_with_the_callback(case, tmp_path):
    callback = CurvatureTrainerCallback(k=2, schedule=every(3))
    expected = everything(train(tmp_path, [], **CASES[case]))
    assert_equal(everything(train(tmp_path, [callback], **CASES[case])), expected)
    assert [(r["step"], r["status"]) for r in callback.records] == [(0, "ok"), (3, "ok"), (6, "ok")]
    task = callback.monitor.task
    assert isinstance(task, ModelLossTask if case == "classifier" else CausalLMTask)


def test_the_curvature_is_that_of_the_models_loss_in_full_precision(tmp_path):
    rows = tokens(8)
    probe = [{k: torch.stack([row[k] for row in part]) for k in rows[0]} for part in
             (rows[:3], rows[3:])]  # fmt: skip
    callback = CurvatureTrainerCallback(batches=probe, k=3, schedule=every(99), tol=1e-5)
    train(tmp_path, [callback], max_steps=1, bf16=True)  # which wraps the model's forward

    set_seed(1)
    model = language_model().double()

    class Plain(hesscurv.Task):
        def outputs(self, model, batch):
            return model(input_ids=batch["input_ids"]).logits[:, :5].flatten(0, 1)

        def loss(self, outputs, batch):
            return nn.functional.cross_entropy(outputs, batch["labels"][:, 1:6].flatten())

    exact = hesscurv.eigsh(hesscurv.HessianOperator(model, Plain(), probe), k=3, tol=1e-8)
    found = torch.tensor(callback.records[0]["eigenvalues"], dtype=torch.float64)
    # float32 products; with bfloat16 in them, an error of 1e-2 would be usual.
    torch.testing.assert_close(found, exact.eigenvalues, rtol=2e-5, atol=0)


def values(callback):
    return [(r["step"], r["eigenvalues"], r.get("space_overlap")) for r in callback.records]


def watching(**options):
    return CurvatureTrainerCallback(k=1, schedule=every(3), quantities="overlap", **options)


def test_a_resumed_run_goes_on_with_records_and_eigenspace(tmp_path):
    whole, second, third = watching(), watching(), watching()
    saved = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "a", [whole], **saved)
    folder = tmp_path / "a" / "checkpoint-3"
    kept = read_checked(folder / "curvature_monitor.pt")
    assert [r["step"] for r in kept["records"]] == [0, 3]

    train(tmp_path / "a", [second], resume=str(folder), **saved)
    assert [r["step"] for r in second.records] == [0, 3, 6]
    assert values(second) == values(whole)

    # Into another folder: by name, since the trainer does not say which checkpoint it has read.
    with pytest.warns(MonitorWarning, match="start over"):
        train(tmp_path / "b", [third], resume=str(folder))
    assert [r["step"] for r in third.records] == [3, 6]
    third = watching(resume_from=folder)
    train(tmp_path / "b", [third], resume=str(folder))
    assert values(third) == values(whole)

    # A checkpoint of the same step, of another run.
    shutil.copytree(folder, tmp_path / "b" / "checkpoint-3")
    train(tmp_path / "b", [watching()], max_steps=3, seed=5, **saved)
    with pytest.warns(MonitorWarning, match="start over"):
        train(tmp_path / "b", [watching()], resume=str(folder))

    (folder / "curvature_monitor.pt").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="remove the file"):
        train(tmp_path / "a", [watching()], resume=str(folder))


def test_what_the_trainer_reports_to_gets_the_records(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = CurvatureTrainerCallback(k=2, schedule=every(3), name="watch")
    train(tmp_path, [callback], report_to=["tensorboard"])
    sizes = {"scalars": 0, "histograms": 0}
    events = EventAccumulator(str(tmp_path / "runs" / "watch"), sizes).Reload()
    found = [(e.step, e.value) for e in events.Scalars("watch/sharpness")]
    assert found == [(r["step"], pytest.approx(r["sharpness"])) for r in callback.records]
    assert [e.step for e in events.Histograms("watch/eigenvalues")] == [0, 3, 6]


def test_the_learning_rate_is_the_schedulers(tmp_path):
    got = []

    class Mine:
        def log(self, record, step):
            got.append((step, record["learning_rate"]))

    train(tmp_path, [CurvatureTrainerCallback(k=1, schedule=every(3), loggers=[Mine()])])
    assert got == [(s, pytest.approx(0.01 * (1 - s / 6))) for s in (0, 3, 6)]


def test_a_plain_call(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", dataloader_pin_memory=False
    )
    watch = CurvatureTrainerCallback(k=10, schedule=every(100))
    model = language_model()
    transformers.Trainer(model, arguments, train_dataset=tokens(), callbacks=[watch]).train()
    assert [r["step"] for r in watch.records] == [0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tokens())


def test_what_cannot_be_watched_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="iterable"):
        train(tmp_path, [CurvatureTrainerCallback()], data=Stream())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        train(tmp_path, [CurvatureTrainerCallback()], label_smoothing_factor=0.1)


def own_mean(outputs, labels, num_items_in_batch=None):
    losses = nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    return losses.sum() / num_items_in_batch


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (Trainer, {"compute_loss_func": own_mean}, "compute_loss_func=own_mean"),
        (OwnLoss, {}, "OwnLoss with a compute_loss of its own"),
    ],
)
def test_a_trainer_with_a_loss_of_its_own_is_refused_without_a_task(kind, options, named, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True
    )

    def trainer(callback):
        return kind(
            language_model(), arguments, train_dataset=tokens(), callbacks=[callback], **options
        )

    with pytest.raises(ValueError, match=rf"{named}.*pass the loss that is trained as the task"):
        trainer(CurvatureTrainerCallback()).train()
    callback = CurvatureTrainerCallback(CausalLMTask(), k=1, schedule=every(1))
    trainer(callback).train()
    assert callback.records


@pytest.mark.skipif(transformers.__version__ < "5", reason="counts labels that have no logits, too")
def test_batches_count_as_the_trainer_counts_items(tmp_path):
    class Counts(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            found.append((CausalLMTask().weight(inputs), float(num_items_in_batch)))
            return super().training_step(model, inputs, num_items_in_batch)

    data, found = tokens(), []
    for i, row in enumerate(data):  # of other lengths
        row["labels"][i % 5 : 5] = -100
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        disable_tqdm=True,
    )
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    Counts(LlamaForCausalLM(config), arguments, train_dataset=data).train()
    (a, n), (b, _) = found[:2]
    assert a != b
    assert a + b == n


def test_keywords_of_the_monitor_are_checked_when_the_callback_is_created():
    for wrong, message in (
        ({"history": 3}, r"CurvatureTrainerCallback\(.*options=MonitorOptions\(history=3\)"),
        ({"way": "retained"}, r"MonitorOptions\(operator_options={'way': 'retained'}\)"),
        ({"seed": 3}, "seed= has moved: pass generator="),
        ({"scedule": every(3)}, "unexpected keyword argument 'scedule'"),
        ({"options": 3}, "expected options to be a MonitorOptions, got an int"),
        ({"generator": 3}, "expected generator to be a torch.Generator"),
    ):
        with pytest.raises(TypeError, match=message):
            CurvatureTrainerCallback(**wrong)
