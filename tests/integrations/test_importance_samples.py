"""How the samples are cut and weighted changes no score, and reading them leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from channels import TASK, build, data, groups_of, random_pairs
from torch import nn

from hesscurv.integrations import EigenspaceImportance, FisherImportance


@pytest.mark.parametrize("rows", ["fisher", "ggn"])
def test_batch_and_chunk_size_do_not_matter(rows):
    model, (batch,) = build("residual"), data((8,))
    cut = [(batch[0][i:j], batch[1][i:j]) for i, j in [(0, 3), (3, 4), (4, 8)]]
    group = groups_of(model)[0]
    score = lambda batches, chunk: FisherImportance(  # noqa: E731
        model, TASK, batches, rows=rows, chunk_size=chunk
    )(group)
    whole = score([batch], 8)
    if rows == "ggn":  # the signs are drawn chunk by chunk: equal in distribution alone
        assert whole.shape == score(cut, 2).shape
        torch.testing.assert_close(whole, score([batch], 8), rtol=0, atol=0)
        return
    for batches, chunk in [(cut, None), (cut, 1), ([batch], 3)]:
        torch.testing.assert_close(score(batches, chunk), whole)


def test_weighted_batches_count_by_their_weight():
    class Doubled(type(TASK)):
        def weight(self, batch):
            return 2.0 if len(batch[1]) == 3 else 1.0

    model, batches = build("plain"), data((5, 3))
    group = groups_of(model)[0]
    task = Doubled(nn.CrossEntropyLoss())
    parts = [FisherImportance(model, TASK, [b])(group) for b in batches]
    scores = FisherImportance(model, task, batches)(group)
    torch.testing.assert_close(scores, (parts[0] + 2 * parts[1]) / 3)


def test_samples_within_a_batch_count_by_their_own_weight():
    # The third class has no weight: a sample of it alone has the loss 0 / 0.
    counts = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)

    class ClassWeighted(type(TASK)):
        def weight(self, batch):
            return float(counts[batch[1]].sum())

    model, batches = build("plain"), data((6, 3))
    group = groups_of(model)[0]
    batches = [(x, torch.arange(len(x)) % 3) for x, _ in batches]
    scores = FisherImportance(model, ClassWeighted(nn.CrossEntropyLoss(counts)), batches)(group)
    total = 0
    for x, y in batches:
        for i in range(len(x)):
            alone = FisherImportance(model, TASK, [(x[i : i + 1], y[i : i + 1])])(group)
            total = total + counts[y[i]] * alone
    torch.testing.assert_close(scores, total / 12)


def test_operations_without_a_rule_for_vmap_are_taken_one_by_one():
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x if float(x.abs().sum()) > 0 else -x)

    model, batches = Branching(build("plain")), data()
    scores = FisherImportance(model, TASK, batches)(groups_of(model)[0])
    expected = FisherImportance(model.inner, TASK, batches)(groups_of(model.inner)[0])
    torch.testing.assert_close(scores, expected)


def test_nothing_of_the_model_is_touched():
    model, batches = build("plain"), data()
    model.train()
    model.bn1.eval()
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 7.0)
    calls = []
    model.conv1.weight.register_hook(lambda g: calls.append("gradient"))
    model.conv2.register_full_backward_hook(lambda *a: calls.append("backward"))
    group = groups_of(model)[0]
    model.train()
    model.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    versions = [t._version for t in [*model.parameters(), *model.buffers()]]
    modes = [m.training for m in model.modules()]
    random_states = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    for rows in ("fisher", "ggn"):
        FisherImportance(model, TASK, batches, rows=rows)(group)
        EigenspaceImportance(model, random_pairs_of(model))(group)
    assert not calls
    assert [m.training for m in model.modules()] == modes
    assert [t._version for t in [*model.parameters(), *model.buffers()]] == versions
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert bool((model.conv1.weight.grad == 7).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "conv1.weight")
    assert torch.equal(random_states[0], torch.get_rng_state())
    assert random_states[1:] == (random.getstate(), str(np.random.get_state()))


def random_pairs_of(model):
    """`random_pairs`, without drawing from the global generator."""
    with torch.random.fork_rng([]):
        return random_pairs(model)
