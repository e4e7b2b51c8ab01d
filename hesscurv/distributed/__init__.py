"""Many processes: what they send each other, and what they do when one of them fails."""

from hesscurv.distributed.communicator import Communicator
from hesscurv.distributed.steps import DistributedError, Step

__all__ = ["Communicator", "DistributedError", "Step"]
