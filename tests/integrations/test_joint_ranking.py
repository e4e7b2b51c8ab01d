"""A joint ranking takes the channels one after the other, each given those that are gone."""

import pytest
import torch
import torch_pruning as tp
from channels import (
    EXAMPLE,
    TASK,
    CifarResNet,
    build,
    data,
    entries_of_channels,
    flat,
    groups_of,
    random_pairs,
)

from hesscurv.integrations import EigenspaceImportance, FisherImportance, macs_per_entry
from hesscurv.integrations.importances.joint_ranking import backward_elimination


def test_channels_that_cancel_go_together_and_one_of_two_equals_stays():
    rows = torch.tensor([[3.0, -3.0, 2.0, 2.0, 9.0], [0.1, 0.0, 0.0, 0.0, 9.0]]).double()
    one, nothing = torch.ones(5).double(), torch.zeros(5).double()
    order = backward_elimination(rows, nothing, one, torch.zeros(5, dtype=torch.int64)).argsort()
    # 2 goes first (1/2 4); then 1, which takes the sum from 2 to -1; then 3, from -1 to 1 ...
    assert order.tolist() == [2, 1, 3, 0, 4]
    order = backward_elimination(rows, nothing, one, torch.tensor([0, 0, 1, 1, 1])).argsort()
    assert {0, 1} != set(order[:2].tolist())  # one of the first group stays to the end
    costly = torch.tensor([1.0, 1, 1, 1, 1e6]).double()
    order = backward_elimination(rows, nothing, costly, torch.zeros(5, dtype=torch.int64)).argsort()
    assert order[0] == 4


def test_a_joint_ranking_removes_what_raises_the_form_least():
    model = build("plain")
    pairs, w = random_pairs(model, 6), flat(model)
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE.double(),
        importance := EigenspaceImportance(model, pairs),
        global_pruning=True,
        pruning_ratio=0.3,
        ignored_layers=[model.fc2],
    )
    masks, groups = [], groups_of(model)
    for g, group in enumerate(groups):
        masks += [(g, m) for m in entries_of_channels(model, group)]
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    vectors = torch.stack([m * w for _, m in masks])
    gone, left = [], [len(group[0].idxs) for group in groups]
    for _ in range(5):
        rises = {
            c: float((v := vectors[[*gone, c]].sum(0)) @ matrix @ v)
            for c, (g, _) in enumerate(masks)
            if c not in gone and left[g] > 1
        }
        gone.append(min(rises, key=rises.get))
        left[masks[gone[-1]][0]] -= 1
    importance.rank_jointly(pruner)
    own = {group[0].dep.target.name: importance(group) for group in groups_in(pruner)}
    ranks = torch.cat([own[group[0].dep.target.name] for group in groups])
    assert ranks.argsort()[:5].tolist() == gone
    pruner.step()
    assert torch.isfinite(model(data()[0][0])).all()


def groups_in(pruner):
    return pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    )


@pytest.mark.parametrize("options", [{"normalizer": "mean"}, {"group_reduction": "max"}])
def test_a_joint_ranking_has_no_unit_and_no_layers(options):
    model = build("plain")
    with pytest.raises(ValueError, match="for a joint ranking"):
        EigenspaceImportance(model, random_pairs(model), **options).rank_jointly(None)
    with pytest.raises(ValueError, match="for a joint ranking"):
        EigenspaceImportance(model, random_pairs(model), kind="diagonal").rank_jointly(None)


def test_iterative_joint_ranking_reaches_the_ratio():
    torch.manual_seed(0)
    model, batches = CifarResNet().eval(), data(dtype=torch.float32)
    importance = FisherImportance(
        model, TASK, batches, rows="ggn", costs=macs_per_entry(model, EXAMPLE)
    )
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importance,
        global_pruning=True,
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[model.linear],
    )
    importance.rank_jointly(pruner)
    before = sum(len(g[0].idxs) for g in groups_in(pruner))
    for _ in range(3):
        pruner.step()
    after = sum(len(g[0].idxs) for g in groups_in(pruner))
    assert after / before == pytest.approx(0.5, abs=0.03)
    assert torch.isfinite(model(batches[0][0])).all()
