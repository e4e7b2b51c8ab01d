"""Monitoring of curvature during training, and pruning triggered by it."""

from hesscurv.hooks.live_report import LiveReport
from hesscurv.hooks.loggers import MonitorWarning
from hesscurv.hooks.monitoring.monitor import CurvatureMonitor
from hesscurv.hooks.monitoring.monitor_options import MonitorOptions
from hesscurv.hooks.pruning_trigger import PruneWhenStable
from hesscurv.hooks.schedules import dense_then_sparse, every, logarithmic
from hesscurv.hooks.stability import Stability
from hesscurv.hooks.writers import CSVWriter, JSONLinesWriter, read_records

__all__ = [
    "CurvatureMonitor",
    "MonitorOptions",
    "MonitorWarning",
    # Where records go
    "JSONLinesWriter",
    "CSVWriter",
    "read_records",
    "LiveReport",
    # Pruning
    "PruneWhenStable",
    "Stability",
    # Schedules
    "every",
    "logarithmic",
    "dense_then_sparse",
]
