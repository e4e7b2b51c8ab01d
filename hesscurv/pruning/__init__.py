"""Prune with curvature: methods for ``torch.nn.utils.prune``, saliencies, compensation, one call.

The masks are those of ``torch.nn.utils.prune`` throughout.
"""

from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.batch_statistics import recalibrate_
from hesscurv.pruning.eigenspace_model import quadratic_model_of
from hesscurv.pruning.global_pruning import curvature_global
from hesscurv.pruning.methods import (
    CurvatureNM,
    CurvatureStructured,
    CurvatureUnstructured,
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
)
from hesscurv.pruning.obs import compensate_
from hesscurv.pruning.optimizer_state import mask_optimizer_state_
from hesscurv.pruning.prune_model import prune_model
from hesscurv.pruning.quadratic_model import Measuring, QuadraticModel
from hesscurv.pruning.report import LayerReport, PruningReport, StageReport
from hesscurv.pruning.saliency import saliency
from hesscurv.pruning.semi_structured import is_semi_structured, to_semi_structured_
from hesscurv.pruning.sparse_files import load_sparse, save_sparse
from hesscurv.pruning.state_dicts import (
    apply_masks_,
    dense_state_dict,
    load_pruned_,
    masks_of,
)
from hesscurv.pruning.weight_axes import register_weight_axes
from hesscurv.pruning.weights import Weight, find_weights, pruned_weights, refresh_

__all__ = [
    # Methods for torch.nn.utils.prune
    "CurvatureUnstructured",
    "CurvatureStructured",
    "CurvatureNM",
    "curvature_unstructured",
    "curvature_structured",
    "curvature_nm",
    "curvature_global",
    "prepare_attention_",
    # Saliency and compensation
    "saliency",
    "compensate_",
    "quadratic_model_of",
    "QuadraticModel",
    # One call
    "prune_model",
    "recalibrate_",
    "Measuring",
    "PruningReport",
    "StageReport",
    "LayerReport",
    # Weights, masks, files
    "Weight",
    "find_weights",
    "pruned_weights",
    "refresh_",
    "register_weight_axes",
    "masks_of",
    "apply_masks_",
    "dense_state_dict",
    "load_pruned_",
    "mask_optimizer_state_",
    "save_sparse",
    "load_sparse",
    "is_semi_structured",
    "to_semi_structured_",
]
