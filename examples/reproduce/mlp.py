"""The paper's MLP on 16x16 digits, trained, with the top Hessian eigenpairs at a series of steps.

Import it; it is not run. Network, data and training are those of `examples/overlap.py`: 7,030
parameters, 256-20-20-20-20-20-10 with tanh, SGD with batches of 500 and rate 0.3, MNIST with
--data, else scikit-learn's digits. The Hessian is of 500 images, 50 of each class, of the test set
and, where asked for, of the training set.

    mlp_options     the options that the scripts about it have
    snapshots       trains, and returns what is measured at each step
    chance_by_layer overlap of random masks that keep as many entries of each layer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from overlap import TASK, load_data, make_net, train
from results import parser
from samples import balanced
from torch import Tensor, nn
from torch.nn import functional as F

import hesscurv

Samples = tuple[Tensor, Tensor]


@dataclass
class Snapshot:
    """The net at one step: its weights' magnitudes, and eigenpairs by the data they are of."""

    step: int
    loss: float
    accuracy: float
    magnitudes: Tensor
    pairs: dict[str, hesscurv.Eigenpairs]
    sketch: hesscurv.Eigenpairs | None = None

    def mask(self, k: int) -> Tensor:
        return hesscurv.magnitude_mask(self.magnitudes, k)


def mlp_options(description: str | None, arguments: Sequence[str] | None = None):
    """Return the options of a script about the MLP, with sizes that depend on --quick."""
    out = parser(description)
    figure_options(out)
    out.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    options = out.parse_args(arguments)
    check_figure(out, options)
    torch.set_num_threads(options.threads or 1)
    sys.stdout.reconfigure(line_buffering=True)
    options.side, options.k = (8, 64) if options.quick else (16, 355)
    options.steps = [0, 20, 40] if options.quick else list(range(0, 1001, 100))
    return options


def figure_options(out: argparse.ArgumentParser) -> None:
    out.add_argument("--data", type=Path, metavar="DIR", help="folder of the data; see above")
    out.add_argument("--figure", type=Path, metavar="FILE", help="draw it there")


def check_figure(out: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a figure that cannot be drawn, before any work."""
    if options.figure is None:
        return
    if not options.figure.resolve().parent.is_dir():
        out.error(f"--figure: there is no folder {options.figure.resolve().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        out.error("--figure needs matplotlib: pip install 'hesscurv[examples]'")


def source(options: argparse.Namespace) -> str:
    return "scikit-learn's digits" if options.data is None else "MNIST"


def parameter_count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def snapshots(
    options: argparse.Namespace, of: Sequence[str] = ("test",), sketched: bool = False
) -> list[Snapshot]:
    """Train the net and measure it at `options.steps`.

    Args:
        options: Those of `mlp_options`.
        of: The data whose Hessians are decomposed: "test", "train".
        sketched: Whether to make the paper's single-pass sketch of the test Hessian too, with
            outer = k and inner = 2 k measurements.
    """
    (x, y), test = load_data(options.data, options.side)
    chosen = balanced(y, 500)
    samples = {"test": test, "train": (x[chosen], y[chosen])}
    torch.manual_seed(options.seed)
    net, k = make_net(options.side**2), options.k
    print(
        f"{parameter_count(net):,} parameters, {len(y):,} training images of {source(options)}; "
        f"Hessians of {len(test[1])} images ({' and '.join(of)}), k = {k}, k/D = "
        f"{k / parameter_count(net):.4f}."
    )
    out = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for step in train(net, (x, y), optimizer, options.steps[-1], options.seed):
        if step in options.steps:
            out.append(_measure(step, net, {name: samples[name] for name in of}, k, sketched))
    return out


def _measure(
    step: int, net: nn.Module, samples: dict[str, Samples], k: int, sketched: bool
) -> Snapshot:
    with torch.no_grad():
        images, labels = samples.get("test") or samples["train"]
        logits = net(images)
    loss = float(F.cross_entropy(logits, labels))
    accuracy = float((logits.argmax(1) == labels).float().mean())
    pairs, sketch = {}, None
    for name, batch in samples.items():
        H = hesscurv.HessianOperator(net, TASK, [batch])
        pairs[name] = hesscurv.eigsh(H, k)
        if sketched and name == "test":
            sketch = hesscurv.eigsh(H, k, "single_pass", outer=k, inner=2 * k, residuals=False)
    magnitudes = nn.utils.parameters_to_vector(net.parameters()).detach().abs()
    products = sum(p.num_matvecs for p in pairs.values())
    print(f"step {step:4d}: loss {loss:.3f}, accuracy {accuracy:.1%}, {products} products")
    return Snapshot(step, loss, accuracy, magnitudes, pairs, sketch)


def converged(shots: Sequence[Snapshot]) -> tuple[bool, str]:
    """Return whether every pair has converged, and how many have."""
    all_pairs = [pairs for shot in shots for pairs in shot.pairs.values()]
    done, asked = sum(int(p.converged.sum()) for p in all_pairs), sum(map(len, all_pairs))
    return done == asked, f"{done} of {asked}"


def chance_by_layer(mask: Tensor, pairs: hesscurv.Eigenpairs) -> float:
    """Return the mean overlap of random masks that keep as many entries of each parameter tensor.

    The overlap of a mask is its mean leverage, so that of a random choice within the tensors l,
    of n_l entries with the share s_l of all leverage and m_l of them kept, is sum_l m_l s_l / n_l.
    What a mask has above it comes of which entries it keeps within the tensors, not of which
    tensors it keeps them in.
    """
    parts = hesscurv.overlap_by_parameter(mask, pairs).values()
    return sum(part.num_kept * part.leverage_share / part.numel for part in parts)
