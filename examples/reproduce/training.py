"""Training that goes on after a kill, and the images that the networks are trained on.

Import it; it is not run. `train` leaves `weights-<step>.pt` in a folder for every step asked for,
each written whole or not at all, and `training.pt`, from which the same call goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from samples import balanced, cifar10_part, digits
from torch import Tensor, nn

SAVE_SECONDS, SAY_SECONDS = 120.0, 20.0
MEAN, STD = (0.49140, 0.48216, 0.44653), (0.24703, 0.24348, 0.26159)  # CIFAR-10's training images
FOLDER, FILES = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


class Images(NamedTuple):
    """Images (n, 3, 32, 32), normalised, with labels: to train on, and to test on."""

    source: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def hessian_batches(self, count: int, size: int, device: str) -> list[tuple[Tensor, Tensor]]:
        """Return the first test images of every class in equal numbers, cut into batches."""
        chosen = balanced(self.y_test, count)
        if int(chosen.sum()) < count:
            raise SystemExit(f"--samples: {self.source} has fewer than {count} in equal numbers")
        x, y = self.x_test[chosen].to(device), self.y_test[chosen].to(device)
        return list(zip(x.split(size), y.split(size), strict=True))


def check_cifar10(folder: Path | None) -> None:
    """Refuse a folder without CIFAR-10, before any work."""
    if folder is None:
        return
    missing = [name for name in FILES if not (folder / FOLDER / name).is_file()]
    if missing:
        raise SystemExit(
            f"--data: found no {', '.join(missing)} in {folder / FOLDER}; expected CIFAR-10's "
            f"'python version' unpacked there, or no --data for scikit-learn's digits"
        )


def colour_images(folder: Path | None, *, test_only: bool = False) -> Images:
    """Return CIFAR-10, or scikit-learn's digits enlarged to its shape, 500 of them to test on."""
    if folder is None:
        _, x, y = digits(None, 32, 3)
        x, test = (x - x.mean()) / x.std(), balanced(y, 500)
        source = "scikit-learn's digits as 3x32x32"
        return Images(source, x[~test], y[~test], x[test], y[test])
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)

    def normalised(names: list[str]) -> tuple[Tensor, Tensor]:
        parts = [cifar10_part(folder / FOLDER / name) for name in names]
        return (torch.cat([x for x, _ in parts]) - mean) / std, torch.cat([y for _, y in parts])

    test = normalised(FILES[-1:])
    return Images("CIFAR-10", *(normalised(FILES[:-1]) if not test_only else test), *test)


def loss_and_accuracy(model: nn.Module, x: Tensor, y: Tensor, device: str) -> dict[str, float]:
    """Return mean cross-entropy and accuracy in eval mode."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)).cpu() for part in x.split(500)])
    loss = nn.functional.cross_entropy(logits, y)
    accuracy = (logits.argmax(1) == y).float().mean()
    return {"test_loss": float(loss), "accuracy": float(accuracy)}


def shuffled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield index batches for ever, all of one size, in a new order every epoch."""
    generator, size = torch.Generator().manual_seed(seed), min(size, count)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: count // size]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that has its name only once it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(content)))


def weights_path(folder: Path, step: int) -> Path:
    return folder / f"weights-{step}.pt"


def load_weights(model: nn.Module, folder: Path, step: int, device: str) -> nn.Module:
    """Put the weights of one step into a model, and return it on its device in eval mode."""
    state = torch.load(weights_path(folder, step), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.to(device).eval()


def train(
    folder: Path,
    steps: Sequence[int],
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]],
    batches: Iterator[Tensor],
    loss_of: Callable[[nn.Module, Tensor, int], Tensor],
    *,
    rate: Callable[[int], float] | None = None,
) -> None:
    """Train until the weights of all steps lie in the folder; go on from where a kill left off.

    Args:
        folder: Where weights and the state of training are kept.
        steps: After how many steps to keep the weights; 0 for those at the start.
        make: Makes the model, on its device in training mode, and its optimizer.
        batches: The batches from the first step on; a resumed run skips those that were seen.
        loss_of: The loss of a model on a batch at a step.
        rate: The learning rate at a step; None leaves the optimizer's own.
    """
    missing = [step for step in steps if not weights_path(folder, step).is_file()]
    if not missing:
        print(f"training: the weights of steps {list(steps)} lie in the folder", flush=True)
        return
    model, optimizer = make()
    first, last, state = 0, max(missing), folder / "training.pt"
    if state.is_file():
        saved = torch.load(state, map_location="cpu", weights_only=True)
        if saved["step"] <= min(missing):
            first = saved["step"]
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            print(f"training goes on from step {first}", flush=True)
        del saved

    def save_state(step: int) -> None:
        saved = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        write_whole(state, lambda path: torch.save(saved, path))

    start = said = kept = time.perf_counter()
    batches = islice(batches, first, None)
    for step in range(first, last + 1):
        if step in missing:
            weights = model.state_dict()
            write_whole(weights_path(folder, step), lambda path: torch.save(weights, path))  # noqa: B023
        now = time.perf_counter()
        if step == last or now - kept > SAVE_SECONDS:
            save_state(step)
            kept = time.perf_counter()
        if step == last:
            break
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        optimizer.zero_grad()
        loss = loss_of(model, next(batches), step)
        loss.backward()
        optimizer.step()
        if now - said > SAY_SECONDS or step == first:
            said = now
            print(f"training: step {step} of {last}, loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start
    print(f"trained steps {first} to {last} in {seconds:.0f} s", flush=True)
