"""Training loss of Hugging Face's Trainer: the model's own, or an error."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hesscurv.integrations.training.causal_lm_task import CausalLMTask, ModelLossTask, is_causal_lm

_REMEDY = (
    "pass the loss that is trained as the task, a callable (model, batch) -> loss with "
    "weight(batch): CurvatureTrainerCallback(task=...)"
)


def own_loss(model: nn.Module) -> CausalLMTask | ModelLossTask:
    """Return the task for a model's own loss."""
    if is_causal_lm(model):
        return CausalLMTask()
    return ModelLossTask(shifted=_shifts_labels(model))


def check_own_loss(callback: Any, args: TrainingArguments) -> None:
    """Require a training on the model's own loss.

    Args:
        callback: The callback, called by its trainer.
        args: The trainer's arguments.

    Raises:
        ValueError: If labels are smoothed, the trainer has a `compute_loss_func`, or its
            `compute_loss` is not that of transformers.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            "expected label_smoothing_factor=0 for the model's own loss, got "
            f"{args.label_smoothing_factor}; {_REMEDY}"
        )
    trainer = _trainer_of(callback)
    if trainer is None:
        return
    own = getattr(trainer, "compute_loss_func", None)
    if own is not None:
        raise ValueError(
            "expected a Trainer that trains the model's own loss, got one with "
            f"compute_loss_func={getattr(own, '__name__', type(own).__name__)}; {_REMEDY}"
        )
    if getattr(trainer, "label_smoother", None) is not None:
        raise ValueError(
            "expected a Trainer that trains the model's own loss, got one with the label_smoother "
            f"{type(trainer.label_smoother).__name__}; {_REMEDY}"
        )
    compute = trainer.compute_loss
    module = getattr(getattr(compute, "__func__", compute), "__module__", "") or ""
    if module.split(".")[0] != "transformers":
        raise ValueError(
            f"expected a Trainer that trains the model's own loss, got {type(trainer).__name__} "
            f"with a compute_loss of its own, of {module}; {_REMEDY}"
        )


def _trainer_of(callback: Any) -> Any:
    """Return the trainer that is calling a callback, or None.

    Callbacks are given the model, the optimizer and the loaders, but not the trainer, which
    determines the loss: it is searched for in the call stack.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            caller = frame.f_locals.get("self")
            handler = getattr(caller, "callback_handler", None)
            if any(known is callback for known in getattr(handler, "callbacks", ())):
                return caller
            frame = frame.f_back
    finally:
        del frame
    return None


def _shifts_labels(model: Any) -> bool:
    """Whether a model's own loss is next-token prediction, by the Trainer's criterion."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return "CausalLM" in type(model).__name__ or getattr(model, "loss_type", None) == "ForCausalLM"
