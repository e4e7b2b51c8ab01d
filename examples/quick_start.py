"""The top Hessian eigenpairs of a small net: compute, save, load, compare with a pruning mask."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import hesscurv

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
inputs = torch.randn(200, 20)
targets = inputs[:, :3].argmax(1)
batches = [(inputs[:100], targets[:100]), (inputs[100:], targets[100:])]  # or a DataLoader

optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()

task = hesscurv.supervised(nn.CrossEntropyLoss())
H = hesscurv.HessianOperator(model, task, batches)  # never formed: known by its products H @ v
pairs = hesscurv.eigsh(H, k=40)
print(pairs)

with tempfile.TemporaryDirectory() as folder:
    pairs.save(Path(folder) / "pairs.pt")
    loaded = hesscurv.Eigenpairs.load(Path(folder) / "pairs.pt")

mask = hesscurv.magnitude_mask(model, k=40)
overlap = hesscurv.overlap(mask, loaded)
chance = hesscurv.chance_overlap(40, len(mask)).mean
best = hesscurv.overlap(hesscurv.best_mask(loaded), loaded)
print(
    f"Overlap with the 40 largest parameters: {overlap:.3f}; chance {chance:.3f}, best {best:.3f}"
)

exact = torch.linalg.eigvalsh(H.to_dense())
largest = exact[exact.abs().argsort(descending=True)[:40]]
assert pairs.converged.all()
assert torch.allclose(pairs.eigenvalues, largest, rtol=1e-3)
assert torch.equal(loaded.eigenvectors, pairs.eigenvectors)
assert 0 < overlap < best
