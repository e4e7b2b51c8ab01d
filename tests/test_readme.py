"""The README's Python examples run, one after the other, on a small model."""

import importlib.util
import re
import warnings

import torch
import torch_pruning
from readme_blocks import README, readme_blocks
from torch import nn

import hesscurv


class TokenModel(nn.Module):
    """A language model as Hugging Face makes them: keyword inputs, an output with logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, input_ids):
        output = nn.Module()
        output.logits = self.head(torch.tanh(self.embedding(input_ids)))
        return output


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer3 = nn.Linear(4, 12)
        self.out = nn.Linear(12, 10)

    def forward(self, x):
        return self.out(torch.tanh(self.layer3(x)))


def test_the_examples_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = readme_blocks()
    assert len(blocks) >= 5
    model, data = Net(), [(torch.randn(30, 4), torch.randint(0, 10, (30,)))]
    line = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
    labels = torch.randint(0, 7, (3, 5))
    labels[0, :2] = -100
    tokens = [{"input_ids": torch.randint(0, 7, (3, 5)), "labels": labels}]
    names: dict = {"torch": torch, "hesscurv": hesscurv}
    solve = hesscurv.eigsh

    def small(H, k, **options):  # the README's k are for large models
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
            return solve(H, min(k, 10, H.shape[0]), **{**options, "progress": False})

    monkeypatch.setattr(hesscurv, "eigsh", small)
    for block in blocks:
        names.update(model=model, batches=data, x=torch.randn(20, 1, requires_grad=True))
        names.update(matrix=torch.diag(torch.linspace(1, 2, 12)), v=torch.randn(190))
        names.update(V=torch.randn(190, 3))
        if "residual(model)" in block:
            # Two examples in one block: a closure on points, then dict batches.
            closure, language = block.split("class LanguageModel")
            names["model"] = line
            exec(closure, names)
            names.update(model=TokenModel(), batches=tokens)
            exec("class LanguageModel" + language, names)
            assert names["G"].shape[0] == 7 * 6 + 6 * 7 + 7
            continue
        if "torch_pruning" in block:
            names.update(model=Net(), torch_pruning=torch_pruning, example=data[0][0][:1])
        if "integrations import Curvature" in block:
            continue  # in tests/integrations/, with the library whose callback it is
        if "TensorBoardLogger" in block and importlib.util.find_spec("tensorboard") is None:
            continue
        names["H"] = hesscurv.HessianOperator(
            model, hesscurv.supervised(nn.CrossEntropyLoss()), data
        )
        names["v"] = torch.randn(names["H"].shape[0])
        names["V"] = torch.randn(names["H"].shape[0], 3)
        if "compute_dtype=torch.float64" in block:
            names["v"], names["V"] = names["v"].double(), names["V"].double()
        exec(block, names)
    assert (tmp_path / "pairs.pt").exists()


def test_the_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(), flags=re.DOTALL):
        assert (README.parent / path).is_file()
