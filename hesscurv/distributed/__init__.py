"""Communication between ranks: collectives, agreement, and failures that raise on every rank."""

from hesscurv.distributed.communicator import Communicator
from hesscurv.distributed.steps import DistributedError, Step

__all__ = ["Communicator", "DistributedError", "Step"]
