"""Pruning by curvature: methods for ``torch.nn.utils.prune``, saliencies, compensation, one call.

All masks are those of ``torch.nn.utils.prune``.
"""

from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.curvature.eigenspace_model import quadratic_model_of
from hesscurv.pruning.curvature.obs import compensate_
from hesscurv.pruning.curvature.quadratic_model import Measuring, QuadraticModel
from hesscurv.pruning.curvature.saliency import saliency
from hesscurv.pruning.masks.global_pruning import curvature_global
from hesscurv.pruning.masks.methods import (
    CurvatureNM,
    CurvatureStructured,
    CurvatureUnstructured,
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
)
from hesscurv.pruning.masks.momentum import mask_optimizer_state_
from hesscurv.pruning.masks.semi_structured import is_semi_structured, to_semi_structured_
from hesscurv.pruning.masks.sparse_files import load_sparse, save_sparse
from hesscurv.pruning.masks.state_dicts import (
    apply_masks_,
    dense_state_dict,
    load_pruned_,
    masks_of,
)
from hesscurv.pruning.run.batch_statistics import recalibrate_
from hesscurv.pruning.run.prune_model import prune_model
from hesscurv.pruning.run.pruning_options import PruningOptions
from hesscurv.pruning.run.pruning_report import LayerReport, PruningReport, StageReport
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
    "PruningOptions",
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
