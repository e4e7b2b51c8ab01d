"""Adapters between hesscurv and other libraries, imported as ``hesscurv.integrations``.

Each module adapts one library. Only torch-pruning, a dependency of hesscurv, is imported here; the
others import theirs on use, so that importing this package needs none of them. Therefore
`CurvatureCallback` (Lightning) and `CurvatureTrainerCallback` (Transformers), which derive from
classes of those libraries, are not in ``__all__``: they are imported on first access.
"""

from hesscurv.integrations.channels.compensation import compensate_channels_
from hesscurv.integrations.channels.costs import macs_per_entry
from hesscurv.integrations.channels.removal import remove_channels_
from hesscurv.integrations.importances.compensated_importance import CompensatedImportance
from hesscurv.integrations.importances.pruning_importance import (
    EigenspaceImportance,
    FisherImportance,
)
from hesscurv.integrations.optional_names import __dir__, __getattr__  # noqa: F401
from hesscurv.integrations.training.causal_lm_task import CausalLMTask, ModelLossTask
from hesscurv.integrations.training.training_loggers import TensorBoardLogger, WandbLogger
from hesscurv.integrations.training.training_step_task import TrainingStepTask

__all__ = [
    # torch-pruning
    "EigenspaceImportance",
    "FisherImportance",
    "CompensatedImportance",
    "compensate_channels_",
    "remove_channels_",
    "macs_per_entry",
    # Tasks: Lightning's training step, and the models of Transformers
    "TrainingStepTask",
    "ModelLossTask",
    "CausalLMTask",
    # Where a monitor's records go
    "TensorBoardLogger",
    "WandbLogger",
]
