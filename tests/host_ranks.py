"""What two ranks train by Lightning and by Hugging Face's Trainer, watched and not."""

import os
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hesscurv.hooks import every


class Counting:
    """A logger that counts."""

    def __init__(self):
        self.steps = []

    def log(self, record, step):
        self.steps.append(step)


def run_lightning():
    """Weights and buffers without and with the callback, its records, what was logged."""
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from hesscurv.integrations import CurvatureCallback

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)
            )

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 4, generator=generator)
    data = TensorDataset(x, torch.randint(0, 3, (48,), generator=generator))
    logger = Counting()
    watch = CurvatureCallback(k=2, samples=8, schedule=every(2), loggers=[logger])
    states = []
    for callbacks in ([], [watch]):
        seed_everything(1)
        module = Net()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            plugins=[TorchElasticEnvironment()],
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=os.getcwd(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice
            trainer.fit(module, DataLoader(data, 8, shuffle=True))
        states.append(dict(module.state_dict()))
    return {"states": states, "records": watch.records, "logged": logger.steps}


def run_trainer():
    """The same of the Trainer, with a third run that is resumed in its midst."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from hesscurv.integrations import CurvatureTrainerCallback

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 19, (32, 8), generator=generator)
    data = [{"input_ids": row, "labels": row.clone()} for row in ids]
    logger = Counting()

    def watching(*loggers):
        return CurvatureTrainerCallback(k=2, samples=4, schedule=every(2), loggers=loggers)

    first, second = watching(logger), watching()
    states = []
    for callbacks, resume in (([], None), ([first], None), ([second], "out/checkpoint-2")):
        torch.distributed.barrier()
        set_seed(1)
        config = GPT2Config(
            vocab_size=19,
            n_positions=12,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        arguments = TrainingArguments(
            "out",
            max_steps=4,
            per_device_train_batch_size=4,
            save_strategy="no" if not callbacks else "steps",
            save_steps=2,
            report_to="none",
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=callbacks
        )
        trainer.train(resume_from_checkpoint=resume)
        states.append(dict(trainer.model.state_dict()))
    files = sorted(path.name for path in Path("out/checkpoint-2").glob("*_monitor.pt"))
    return {
        "states": states,
        "records": first.records,
        "resumed": second.records,
        "logged": logger.steps,
        "files": files,
    }
