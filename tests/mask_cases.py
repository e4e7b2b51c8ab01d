"""A layer, scores without ties, and the masks they give by sorting one Python number at a time."""

import torch
from torch import nn

from hesscurv.pruning.masks.methods import (
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
)
from hesscurv.pruning.weights import find_weights


def linear(inputs=8, outputs=4, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).double()


def permuted_scores(shape, seed=0):
    """Distinct signed integers, so that no rounding and no tie matters."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(numel, generator=generator) - numel // 2).double().view(shape)


def lowest_by_sorting(scores, alive, count):
    """The mask without the `count` lowest of what is alive, one Python number after the other."""
    flat, kept = scores.flatten().tolist(), alive.flatten().tolist()
    order = sorted((i for i in range(len(flat)) if kept[i]), key=lambda i: (flat[i], -i))
    for i in order[:count]:
        kept[i] = False
    return torch.tensor(kept).view(scores.shape)


def lowest_slices_by_sorting(scores, alive, dim, count):
    mask = alive.clone()
    sums = {
        i: sum(s for s, a in zip(row.flatten().tolist(), live.flatten().tolist(), strict=True) if a)
        for i, (row, live) in enumerate(
            zip(scores.movedim(dim, 0), alive.movedim(dim, 0), strict=True)
        )
        if live.any()
    }
    for i in sorted(sums, key=lambda i: (sums[i], -i))[:count]:
        mask.movedim(dim, 0)[i] = False
    return mask


def n_of_m_by_sorting(scores, alive, n, m, dim=1):
    mask = alive.clone().movedim(dim, -1).contiguous()
    rows = mask.view(-1, mask.shape[-1])
    values = scores.movedim(dim, -1).reshape(rows.shape)
    for row, value in zip(rows, values, strict=True):
        for start in range(0, len(row), m):
            group = [i for i in range(start, start + m) if row[i]]
            for i in sorted(group, key=lambda i: -value[i])[n:]:
                row[i] = False
    return mask.movedim(-1, dim)


OURS = {
    "unstructured": lambda m, s: curvature_unstructured(m, "weight", 0.5, s),
    "structured": lambda m, s: curvature_structured(m, "weight", 0.5, 0, s),
    "structured inputs": lambda m, s: curvature_structured(m, "weight", 2, 1, s),
    "n:m": lambda m, s: curvature_nm(m, "weight", 2, 4, s),
}
EXPECTED = {
    "unstructured": lambda s, a: lowest_by_sorting(s, a, round(0.5 * int(a.sum()))),
    "structured": lambda s, a: lowest_slices_by_sorting(s, a, 0, round(0.5 * int(a.any(1).sum()))),
    "structured inputs": lambda s, a: lowest_slices_by_sorting(s, a, 1, 2),
    "n:m": lambda s, a: n_of_m_by_sorting(s, a, 2, 4),
}


def two_layers():
    model = nn.Sequential(linear(8, 4), nn.Tanh(), linear(4, 4, seed=1))
    scores = permuted_scores((48,))
    weights = list(find_weights(model).values())
    return model, dict(zip(weights, [scores[:32].view(4, 8), scores[32:].view(4, 4)], strict=True))
