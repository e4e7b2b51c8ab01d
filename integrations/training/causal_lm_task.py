"""Tasks for Hugging Face models: their own loss, and memory-efficient next-token prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hesscurv.integrations.training.chunked_loss import chunked_sum
from hesscurv.interface.descriptions import Described
from hesscurv.objective.data.samples import describe, num_samples
from hesscurv.operators import Task

IGNORED = -100  # the label of positions that have no loss
_OTHER_COUNTS = {"shift_labels", "num_items_in_batch"}  # inputs that change the mean


class ModelLossTask(Described):
    """The loss returned by a model: ``model(**batch).loss``, for dict batches with labels.

    For the Hessian; the GGN and the Fisher need the loss in two parts, see `hesscurv.Task`. The
    weight of a batch is its number of labels other than -100 if these are integers, otherwise of
    samples; operators test whether the loss is a mean over them.

    Args:
        shifted: Whether the model predicts each next token, so that the first label of a sequence
            has no loss; default False.

    Example:
        >>> from types import SimpleNamespace
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         return SimpleNamespace(loss=((super().forward(x) - labels) ** 2).mean())
        >>> batch = {"x": inputs, "labels": torch.zeros(32, 1).double()}
        >>> task = hesscurv.integrations.ModelLossTask()
        >>> hesscurv.HessianOperator(Net(4, 1).double(), task, [batch]).shape
        torch.Size([5, 5])
    """

    tests_mean = True  # its weights are tested by operators

    def __init__(self, shifted: bool = False) -> None:
        self.shifted = shifted

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the model's mean loss on a batch.

        Raises:
            TypeError: If the batch is not a mapping.
            ValueError: If the model returns no loss.
        """
        output = model(**_mapping(batch))
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"expected the model to return a loss, got a {type(output).__name__} without one; "
                "put labels into the batches, or pass a task such as hesscurv.supervised(loss)"
            )
        return found

    def weight(self, batch: Any) -> float:
        """Return the number of labels that the loss is a mean over.

        Raises:
            ValueError: If the batch specifies the divisor of its loss.
        """
        if "num_items_in_batch" in _mapping(batch):
            raise ValueError(
                "expected batches without num_items_in_batch, by which the model's loss is no mean "
                "over the batch's labels; leave it out"
            )
        labels = batch.get("labels")
        if isinstance(batch.get("shift_labels"), Tensor):
            return float((batch["shift_labels"] != IGNORED).sum())
        if isinstance(labels, Tensor) and labels.ndim > 0 and not labels.is_floating_point():
            return float(((labels[..., 1:] if self.shifted else labels) != IGNORED).sum())
        return float(num_samples(batch))


class CausalLMTask(Task):
    r"""Next-token prediction, with the logits of a few tokens at a time.

    The loss is the mean cross-entropy over all labels other than -100, label t + 1 predicted at
    position t, as in Hugging Face's causal language models. For a large vocabulary V, logits of
    shape (B, T, V) would dominate the memory of a Hessian product; here neither the loss nor its
    first or second derivative ever holds those of more than `chunk` tokens. The model's own code
    computes the logits, including scaling and capping.

    For the GGN or the Fisher, by `outputs` and `loss`, it computes all logits at once.

    Args:
        chunk: Tokens per chunk, at least 1; default 256.

    Raises:
        TypeError: If `chunk` is not an int.
        ValueError: If it is below 1.

    Cost: a product evaluates the head, from hidden states to logits, about twice as often as with
    all logits kept. Memory: a few tensors of shape (chunk, V).

    Example:
        >>> task = hesscurv.integrations.CausalLMTask(chunk=128)
        >>> H = hesscurv.HessianOperator(language_model, task, dict_batches)  # doctest: +SKIP
    """

    def __init__(self, chunk: int = 256) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int):
            raise TypeError(f"expected chunk to be a number of tokens, got {chunk!r}")
        if chunk < 1:
            raise ValueError(f"expected a chunk of at least 1 token, got {chunk}")
        self.chunk = chunk

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss over the batch's tokens.

        Args:
            model: A causal language model of transformers.
            batch: A mapping of keyword inputs, among them "labels", shape (B, T).

        Raises:
            TypeError: If the batch is not a mapping, or the model has no body and head.
            ValueError: If there are no labels, or the model's loss is a different one.
        """
        inputs, labels = _split(batch)
        body = body_of(model)
        output = body(**inputs, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"expected {type(body).__name__} to return a last_hidden_state, got a "
                f"{type(output).__name__}; pass hesscurv.integrations.ModelLossTask() as the task"
            )
        rows = hidden[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten().to(rows.device)
        head = {
            name: p
            for name, p in _head_parameters(model).items()
            if isinstance(p, Tensor) and p.is_floating_point()
        }

        def loss(h: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
            with _returning(body, type(output)(last_hidden_state=h[None])) as called:
                found = functional_call(
                    model, dict(zip(head, weights, strict=True)), kwargs={"use_cache": False}
                )
            if not called:
                raise TypeError(
                    f"expected {type(model).__name__} to call its {model.base_model_prefix}; pass "
                    "hesscurv.integrations.ModelLossTask() as the task"
                )
            return _cross_entropy(found.logits[0], y, "sum")

        total = chunked_sum(loss, rows, targets, self.chunk, *head.values())
        return total / (targets != IGNORED).sum()

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return all logits, shape (B, T, V)."""
        inputs, _ = _split(batch)
        body_of(model)
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of logits (B, T, V)."""
        labels = _split(batch)[1].to(outputs.device)
        return _cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), "mean")

    def weight(self, batch: Any) -> float:
        """Return the number of predicted tokens."""
        return float(self.row_weights(batch).sum())

    def row_weights(self, batch: Any) -> Tensor:
        """Return the number of predicted tokens in each sequence, shape (B,)."""
        return (_split(batch)[1][:, 1:] != IGNORED).sum(1).double()


def is_causal_lm(model: nn.Module) -> bool:
    """Whether `CausalLMTask` matches the loss of a model, judging by its attributes."""
    try:
        body_of(model)
    except (TypeError, ValueError):
        return False
    return True


def body_of(model: Any) -> nn.Module:
    """Return the body of a causal language model, which computes the hidden states.

    Raises:
        TypeError: If the model does not consist of a body and a head.
        ValueError: If its loss is not next-token prediction.
    """
    remedy = "pass hesscurv.integrations.ModelLossTask() as the task"
    name = type(model).__name__
    body = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module) or encoder_decoder:
        raise TypeError(
            f"expected a causal language model of transformers, with a body (base_model_prefix) "
            f"and a head (get_output_embeddings), got a {name}; {remedy}"
        )
    own = "ForCausalLM" if "LMHead" in name else getattr(model, "loss_type", None)
    if own != "ForCausalLM" or hasattr(model, "_loss_function"):
        raise ValueError(
            f"expected a model whose loss is next-token prediction, got a {name}; {remedy}"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"expected a model without learned prompts, got a {name}; {remedy}")
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"expected a loss of next tokens alone, got a {name} that adds a loss of its routers "
            f"(output_router_logits); set that to False, or {remedy}"
        )
    return body


def _head_parameters(model: Any) -> dict[str, Tensor]:
    """Return the head's parameters by their names in the model."""
    head = model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is head)
    return {f"{prefix}.{name}": p for name, p in head.named_parameters()}


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[list[bool]]:
    """Make a module return a precomputed output; record whether it was called."""
    called: list[bool] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return output

    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield called
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    logits = logits.float() if logits.itemsize < 4 else logits
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)


def _mapping(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"expected dict batches of keyword inputs, got {describe(batch)}; pass a task such as "
            "hesscurv.supervised(loss) for batches (inputs, targets)"
        )
    return batch


def _split(batch: Any) -> tuple[dict[str, Any], Tensor]:
    """Split a batch into the model's inputs and the labels."""
    inputs = dict(_mapping(batch))
    for name in _OTHER_COUNTS & inputs.keys():
        raise ValueError(
            f"expected batches of inputs and labels, got one with {name!r}, by which the model's "
            "loss is another; leave it out, or pass hesscurv.integrations.ModelLossTask() as the "
            "task"
        )
    labels = inputs.pop("labels", None)
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        raise ValueError(
            "expected dict batches with labels of shape (batch, tokens), got "
            f"{describe(batch) if labels is None else describe(labels)}; use a data collator that "
            "makes them, such as DataCollatorForLanguageModeling(mlm=False)"
        )
    return inputs, labels
