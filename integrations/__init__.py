"""Adapters between hesscurv and other libraries, imported as ``hesscurv.integrations``.

Each module adapts one library. Only torch-pruning, which hesscurv depends on, is imported here; the
others import theirs when they are used, so that importing this package needs none of them.
"""

from hesscurv.integrations.channel_compensation import compensate_channels_
from hesscurv.integrations.channel_costs import macs_per_entry
from hesscurv.integrations.pruning_importance import EigenspaceImportance, FisherImportance

__all__ = ["EigenspaceImportance", "FisherImportance", "compensate_channels_", "macs_per_entry"]
