"""Adapters between hesscurv and other libraries, imported as ``hesscurv.integrations``.

Each module adapts one library, which is imported when a name of it is first used: importing this
package imports none of them. `CurvatureCallback` (Lightning) and `CurvatureTrainerCallback`
(Transformers), whose libraries are extras, are not in ``__all__``.
"""

from hesscurv.integrations.lazy_names import *  # noqa: F403, the names for type checkers
from hesscurv.integrations.optional_names import __dir__, __getattr__  # noqa: F401
from hesscurv.integrations.training.causal_lm_task import CausalLMTask, ModelLossTask
from hesscurv.integrations.training.training_loggers import TensorBoardLogger, WandbLogger
from hesscurv.integrations.training.training_step_task import TrainingStepTask

__all__ = [
    # torch-pruning
    "EigenspaceImportance",  # noqa: F405
    "FisherImportance",  # noqa: F405
    "CompensatedImportance",  # noqa: F405
    "compensate_channels_",  # noqa: F405
    "remove_channels_",  # noqa: F405
    "macs_per_entry",  # noqa: F405
    # Tasks: Lightning's training step, and the models of Transformers
    "TrainingStepTask",
    "ModelLossTask",
    "CausalLMTask",
    # Where a monitor's records go
    "TensorBoardLogger",
    "WandbLogger",
]
