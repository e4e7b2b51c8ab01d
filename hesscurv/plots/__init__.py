"""Figures of eigenpairs and of the records of a monitor; matplotlib is an optional dependency.

Each function draws into the given axes or those of a new figure, and returns them:
``ax.figure.savefig(path)`` writes the figure. pyplot is not used, and no setting of matplotlib is
changed. Failed measurements are marked.
"""

from hesscurv.plots.by_parameter import by_parameter, leverage, sparsity
from hesscurv.plots.curves import by_step, sharpness
from hesscurv.plots.matrices import mask_ious, space_overlaps
from hesscurv.plots.overlaps import overlap_by_k, overlap_by_step
from hesscurv.plots.spectra import eigenvalues, spectrum

__all__ = [
    # Spectra
    "spectrum",
    "eigenvalues",
    # Mask and eigenspace
    "overlap_by_k",
    "overlap_by_step",
    # By parameter
    "leverage",
    "sparsity",
    "by_parameter",
    # While training
    "sharpness",
    "space_overlaps",
    "mask_ious",
    "by_step",
]
