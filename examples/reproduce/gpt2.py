"""GPT-2 small, 124,439,808 parameters: the top Hessian eigenpairs of a network of that size.

    python examples/reproduce/gpt2.py --data DIR --folder WORK --storage disk   # k = 10, 24 GB
    python examples/reproduce/gpt2.py --data DIR --folder WORK                  # a GPU: k = 200
    python examples/reproduce/gpt2.py --quick                                   # a tiny one

12 layers, 12 heads, width 768, 50257 tokens, 1024 positions, the head tied to the embedding;
initialised as GPT-2 is, and trained by Adam for a few steps. Tokens are the bytes of a text, and
sequences are short, so that most embeddings and positions never come: they count all the same. The
Hessian is that of the mean cross-entropy of sequences from the last tenth of the text, which the
training does not see. `test loss` and `accuracy` are of the next byte in these.

`--data` is the folder that holds `tinyshakespeare.txt` (or its folder `text`); without it, a text
drawn from a random Markov chain. In `--folder` lie weights, checkpoints and what is done: after a
kill, the same command goes on. One vector takes 0.5 GB in float32: on 24 GB use `--storage disk`,
or `--storage-dtype float16`, and `--max-basis`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from decompositions import (
    decompose,
    in_own_process,
    judge_pairs,
    positive,
    print_plan,
    shared_options,
    show,
    start,
    work_folder,
)
from models import TokenLoss, TransformerBlock
from results import Report
from samples import markov_tokens
from torch import Tensor, nn
from torch.nn import functional as F
from training import load_weights, train

FILE = "tinyshakespeare.txt"
MOST_GB = 24


class GPT2(nn.Module):
    """GPT-2: pre-norm blocks, tanh-GELU, learned positions, tied head."""

    def __init__(
        self,
        depth: int = 12,
        heads: int = 12,
        width: int = 768,
        vocabulary: int = 50257,
        positions: int = 1024,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for block in self.blocks:
            block.mlp[1] = nn.GELU("tanh")

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

    def initialise_(self) -> GPT2:
        """Draw all matrices from N(0, .02^2), smaller where they add to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if adds else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return self


def make_model(options: argparse.Namespace) -> GPT2:
    if options.quick:
        return GPT2(depth=2, heads=2, width=32, vocabulary=256, positions=32)
    return GPT2()


def main() -> None:
    options = parse()
    tokens, source = load_text(options)
    if options.worker is not None:
        work(options, tokens)
        return
    settings = {"script": "gpt2", "data": source, "seed": options.seed, "length": options.length}
    work_folder(options, settings | {"train_batch": options.train_batch, "quick": options.quick})
    report = Report("reproduce gpt2", options)
    if options.data is None:
        print("No --data: a text from a random Markov chain, not tinyshakespeare.")
    with torch.device("meta"):
        model = make_model(options)
    print_plan(options, model, f"{options.length} bytes of {source}")
    fit(options, tokens)
    row = in_own_process(options, options.steps)
    report.rows.append(row)
    show(report.rows)
    judge_pairs(report, row)
    on_gpu = bool(row["device_peak_bytes"])
    # With --storage disk the bound is on what cannot be written out; mapped files are caches.
    gigabytes = row["peak_bytes"] / 1e9
    report.judge(
        f"top 10 pairs in {MOST_GB} GB",
        gigabytes < MOST_GB if not options.quick and not on_gpu and row["k"] >= 10 else None,
        f"k = {row['k']}, {gigabytes:.3g} GB at its peak, {row['seconds'] / 60:.3g} minutes",
    )
    report.judge(
        "top 200 pairs on a GPU",
        row["converged"] == row["k"] if on_gpu and row["k"] >= 200 else None,
        f"k = {row['k']} on {options.device}, {row['device_peak_bytes'] / 1e9:.3g} GB of a GPU",
    )
    report.write()


def load_text(options: argparse.Namespace) -> tuple[Tensor, str]:
    """Return the tokens of the text, one after the other, and the text's name."""
    if options.data is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            _, tokens, _ = markov_tokens(500, 400)
        return tokens.flatten(), "a Markov chain"
    places = [options.data / FILE, options.data / "text" / FILE]
    for path in places:
        if path.is_file():
            return torch.tensor(list(path.read_bytes())), "tinyshakespeare"
    raise SystemExit(
        f"--data: found no {' or '.join(map(str, places))}; expected karpathy/char-rnn's "
        "data/tinyshakespeare/input.txt under that name, or no --data for a Markov chain"
    )


def sequences(tokens: Tensor, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the sequences that begin at `first`, and the same shifted by one."""
    windows = tokens[first[:, None] + torch.arange(length + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def fit(options: argparse.Namespace, tokens: Tensor) -> None:
    """Train on the first nine tenths of the text."""
    seen, length = tokens[: len(tokens) * 9 // 10], options.length

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(options.seed)
        model = make_model(options).initialise_().to(options.device)
        how = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
        return model, torch.optim.AdamW(model.parameters(), **how)

    def starts() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(options.seed)
        while True:
            yield torch.randint(len(seen) - length, (options.train_batch,), generator=generator)

    def loss_of(model: nn.Module, first: Tensor, step: int) -> Tensor:
        x, y = (t.to(options.device) for t in sequences(seen, first, length))
        with torch.autocast("cuda", torch.bfloat16, enabled=options.device.startswith("cuda")):
            return TokenLoss()(model(x), y)

    train(options.folder, [options.steps], make, starts(), loss_of)


def work(options: argparse.Namespace, tokens: Tensor) -> None:
    """Decompose the Hessian of the trained net, in this process."""
    unseen, device = tokens[len(tokens) * 9 // 10 :], options.device
    first = torch.linspace(0, len(unseen) - options.length - 1, options.samples).long()
    x, y = (t.to(device) for t in sequences(unseen, first, options.length))
    batches = list(zip(x.split(options.batch), y.split(options.batch), strict=True))
    model = load_weights(make_model(options), options.folder, options.worker, device)
    loss = hits = 0.0
    with torch.no_grad():
        for x, y in batches:
            logits = model(x)
            loss += float(TokenLoss()(logits, y)) * len(x) / options.samples
            hits += float((logits.argmax(-1) == y).sum())
            del logits
    facts = {"test_loss": loss, "accuracy": hits / (options.samples * options.length)}
    decompose(options, model, TokenLoss(), batches, facts | {"length": options.length})


def parse() -> argparse.Namespace:
    out = shared_options(__doc__)
    out.add_argument("--steps", type=positive, help="of training; default 300 on a GPU, else 20")
    out.add_argument("--length", type=positive, help="bytes in a sequence; default 64")
    out.add_argument("--train-batch", type=positive, help="sequences in a step of training")
    options = out.parse_args()
    if options.quick:
        defaults = {"k": 3, "samples": 4, "batch": 4, "steps": 3, "length": 16, "train_batch": 4}
    elif options.device.startswith("cuda"):
        defaults = {"k": 200, "samples": 64, "batch": 8, "steps": 300, "train_batch": 32}
    else:
        defaults = {"k": 10, "samples": 16, "batch": 4, "steps": 20, "train_batch": 8}
    start(options, {"length": 64, **defaults} if not options.quick else defaults)
    longest = 32 if options.quick else 1024
    if options.length > longest:
        out.error(f"--length: expected at most {longest}, got {options.length}")
    return options


if __name__ == "__main__":
    main()
