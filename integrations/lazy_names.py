"""The lazily imported adapters, for type checkers; no names at run time, see `optional_names`."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from hesscurv.integrations.channels.compensation import (
        compensate_channels_ as compensate_channels_,
    )
    from hesscurv.integrations.channels.costs import macs_per_entry as macs_per_entry
    from hesscurv.integrations.channels.removal import remove_channels_ as remove_channels_
    from hesscurv.integrations.importances.compensated_importance import (
        CompensatedImportance as CompensatedImportance,
    )
    from hesscurv.integrations.importances.pruning_importance import (
        EigenspaceImportance as EigenspaceImportance,
    )
    from hesscurv.integrations.importances.pruning_importance import (
        FisherImportance as FisherImportance,
    )
    from hesscurv.integrations.training.lightning_callback import (
        CurvatureCallback as CurvatureCallback,
    )
    from hesscurv.integrations.training.trainer_callback import (
        CurvatureTrainerCallback as CurvatureTrainerCallback,
    )
