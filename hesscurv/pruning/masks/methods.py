"""Pruning methods for ``torch.nn.utils.prune`` that drop the entries of lowest given score.

They compose with torch's own methods in either order and are removed by ``prune.remove``. Unlike
torch's, they require scores and rank them with their sign; refuse NaN; leave the module unchanged
on an error; and leave a pruned module that can be copied at once.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hesscurv.interface.descriptions import Described
from hesscurv.pruning.ranking import as_scores, check_amount, check_int, check_scores, lowest
from hesscurv.pruning.rollback import unchanged_on_error
from hesscurv.pruning.weight_axes import axes_of, check_groups_of_inputs, output_dimension
from hesscurv.pruning.weights import check_prunable, refresh_, restore_hook_

Module = TypeVar("Module", bound=nn.Module)


class _CurvatureMethod(Described, prune.BasePruningMethod):
    """Base of the three methods: checks before pruning, and a consistent module after it."""

    @classmethod
    def _apply_checked(
        cls, module: nn.Module, name: str, importance_scores: Any, **arguments: Any
    ) -> prune.BasePruningMethod:
        parameter = check_prunable(module, name)
        scores = as_scores(importance_scores, parameter, f"{name!r} of {type(module).__name__}")
        with unchanged_on_error([module]):
            restore_hook_(module, name)
            method = super().apply(module, name, importance_scores=scores, **arguments)
            mask = module._buffers[f"{name}_mask"]
            assert mask is not None
            # PruningContainer creates the mask in the dtype of the scores.
            module._buffers[f"{name}_mask"] = mask.to(parameter.dtype)
            refresh_(module, name)
        return method


class CurvatureUnstructured(_CurvatureMethod):
    """Prune the entries of lowest score, one by one.

    ``prune.global_unstructured(parameters, CurvatureUnstructured, importance_scores=scores,
    amount=0.5)`` works as well, with scores keyed by (module, name). It silently replaces a missing
    score by the weight itself, which a method cannot detect: use `curvature_global`.

    Args:
        amount: A float in [0, 1] is a fraction of the entries not yet pruned, an int a number of
            entries.

    Raises:
        TypeError: If `amount` is neither an int nor a float.
        ValueError: If it is out of range.

    Example:
        >>> from torch.nn.utils import prune
        >>> net = copy.deepcopy(model)
        >>> scores = hesscurv.pruning.saliency(net, pairs)
        >>> prune.global_unstructured(
        ...     list(scores), hesscurv.pruning.CurvatureUnstructured, scores, amount=9)
        >>> int(net[0].weight_mask.sum() + net[2].weight_mask.sum())
        9
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        self.amount = check_amount(amount)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask with the lowest scores of those not yet pruned set to zero.

        Args:
            t: The scores, integer or floating, any shape, without NaN. Of equal scores the one
                that comes first is kept.
            default_mask: The mask so far, of the same shape: zero where pruned.

        Returns:
            A new mask, of the default mask's shape and dtype.

        Raises:
            TypeError: If the scores are not integer or floating.
            ValueError: If there is a NaN, or fewer entries are left than `amount`.

        Cost:
            A selection in O(D).
        """
        check_scores(t, "the scores")
        alive = (default_mask != 0).to(t.device)
        dropped = lowest(t[alive], self.amount, "entries")
        mask = default_mask.clone(memory_format=torch.contiguous_format)
        mask[alive] = mask[alive].masked_fill(dropped, 0)
        return mask

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        importance_scores: Tensor | None = None,
    ) -> prune.BasePruningMethod:
        """Prune a tensor of a module; see `curvature_unstructured`. Returns the hook."""
        return cls._apply_checked(module, name, importance_scores, amount=amount)


class CurvatureStructured(_CurvatureMethod):
    """Prune whole slices of lowest score along one dimension, such as output channels.

    The score of a slice is the sum of the scores of its entries that are not yet pruned: scores
    that estimate the rise in loss from removing one entry add up to that of the slice.

    Args:
        amount: A float in [0, 1] is a fraction of the slices not yet pruned, an int a number of
            slices.
        dim: The dimension of the slices; 0, the default, is the output dimension of linear and
            convolution layers, 1 the input dimension. Negative ones count from the end.
            `curvature_structured` handles layers stored transposed.

    Raises:
        TypeError: If `amount` is neither an int nor a float, or `dim` is not an int.
        ValueError: If `amount` is out of range.

    Example:
        >>> scores = torch.arange(8.0).reshape(2, 4)
        >>> method = hesscurv.pruning.CurvatureStructured(amount=1)
        >>> method.compute_mask(scores, torch.ones(2, 4))
        tensor([[0., 0., 0., 0.],
                [1., 1., 1., 1.]])
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: float, dim: int = 0) -> None:
        self.amount = check_amount(amount)
        self.dim = check_int(dim, "dim")

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask with the slices of lowest score set to zero.

        Args:
            t: The scores, integer or floating, of two dimensions or more, without NaN. Of slices
                of equal score the one that comes first is kept.
            default_mask: The mask so far, of the same shape: zero where pruned.

        Returns:
            A new mask, of the default mask's shape and dtype.

        Raises:
            TypeError: If the scores are not integer or floating.
            IndexError: If the tensor has no dimension `dim`.
            ValueError: If there is a NaN, the tensor has only one dimension, or fewer slices are
                left than `amount`.

        Cost:
            A sum over the tensor.
        """
        check_scores(t, "the scores")
        dim = _dimension(t, self.dim)
        others = [d for d in range(t.ndim) if d != dim]
        alive = (default_mask != 0).to(t.device)
        # In at least float32, since half precision would round the sums; integers sum exactly.
        dtype = torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else t.dtype
        sums = t.detach().to(dtype).masked_fill(~alive, 0).sum(others)
        check_scores(sums, "the slices' sums of scores, with both inf and -inf")
        live_slices = alive.sum(others) != 0
        dropped = torch.zeros_like(live_slices)
        dropped[live_slices] = lowest(sums[live_slices], self.amount, "slices")
        shape = [-1 if d == dim else 1 for d in range(t.ndim)]
        return default_mask.masked_fill(dropped.to(default_mask.device).view(shape), 0)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        dim: int | None = None,
        importance_scores: Tensor | None = None,
    ) -> prune.BasePruningMethod:
        """Prune a tensor of a module; see `curvature_structured`. Returns the hook."""
        parameter = check_prunable(module, name)
        dim = output_dimension(module, name, parameter) if dim is None else check_int(dim, "dim")
        _dimension(parameter, dim)
        return cls._apply_checked(module, name, importance_scores, amount=amount, dim=dim)


class CurvatureNM(_CurvatureMethod):
    """Keep the n highest scores of every m consecutive entries along the input dimension.

    2:4, the pattern of NVIDIA's sparse tensor cores, keeps 2 of 4. Entries pruned before count
    among the m - n zeros. For a linear layer, groups lie along the rows of the weight. For a
    convolution (out, in, kh, kw), they lie along the input channels at each position of the kernel,
    as in NVIDIA's ASP and TensorRT; in_channels / groups must be a multiple of m.

    Its type is "global", which makes a container pass the whole tensor;
    ``prune.global_unstructured`` therefore refuses it, as it should.

    Args:
        n: Number of entries kept per group, 1 <= n <= m.
        m: Group size; divides the tensor's size along `dim`.
        dim: The input dimension, along which groups lie: 1 by default. It is 0 for transposed
            convolutions and transformers' Conv1D, which `curvature_nm` handles.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If not 1 <= n <= m.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks (2021), arXiv 2104.08378.

    Example:
        >>> scores = torch.arange(8.0).reshape(2, 4)
        >>> method = hesscurv.pruning.CurvatureNM(n=2, m=4)
        >>> method.compute_mask(scores, torch.ones(2, 4))
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """

    PRUNING_TYPE = "global"

    def __init__(self, n: int, m: int, dim: int = 1) -> None:
        self.n, self.m = check_int(n, "n"), check_int(m, "m")
        self.dim = check_int(dim, "dim")
        if not 1 <= self.n <= self.m:
            raise ValueError(f"expected 1 <= n <= m to keep n of every m, got n={n} and m={m}")

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask with at most n of every m entries left.

        Args:
            t: The scores, integer or floating, of two dimensions or more, without NaN. Of equal
                scores the one that comes first is kept.
            default_mask: The mask so far, of the same shape: zero where pruned.

        Returns:
            A new mask, of the default mask's shape and dtype.

        Raises:
            TypeError: If the scores are not integer or floating.
            IndexError: If the tensor has no dimension `dim`.
            ValueError: If there is a NaN, the tensor has only one dimension, or m does not divide
                its size along `dim`.

        Cost:
            Two sorts of groups of m.
        """
        check_scores(t, "the scores")
        dim = self.check_groups(t)
        groups = t.detach().movedim(dim, -1).unflatten(-1, (-1, self.m))
        alive = (default_mask != 0).to(t.device).movedim(dim, -1).unflatten(-1, (-1, self.m))
        # Two stable sorts, by score and then by mask: unpruned entries come first, whatever their
        # score.
        order = groups.argsort(dim=-1, descending=True, stable=True)
        alive_first = alive.gather(-1, order).byte().argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, alive_first)
        kept = torch.zeros_like(alive).scatter_(-1, order[..., : self.n], True) & alive
        mask = kept.flatten(-2).movedim(-1, dim).contiguous()
        return mask.to(default_mask.device, default_mask.dtype)

    def check_groups(self, t: Tensor) -> int:
        """Return the dimension of the groups, not negative, or raise if m does not divide it."""
        dim = _dimension(t, self.dim)
        if t.shape[dim] % self.m:
            raise ValueError(
                f"expected a size along dimension {dim} that m={self.m} divides, got shape "
                f"{tuple(t.shape)}; choose another m or leave this weight out"
            )
        return dim

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        n: int,
        m: int,
        dim: int | None = None,
        importance_scores: Tensor | None = None,
    ) -> prune.BasePruningMethod:
        """Prune a tensor of a module; see `curvature_nm`. Returns the hook."""
        parameter = check_prunable(module, name)
        if dim is None and parameter.ndim > 1:
            dim = axes_of(module, name).inputs
        dim = cls(n, m, 1 if dim is None else dim).check_groups(parameter)
        check_groups_of_inputs(module, name, parameter, dim, m)
        return cls._apply_checked(module, name, importance_scores, n=n, m=m, dim=dim)


def curvature_unstructured(
    module: Module, name: str, amount: float, importance_scores: Tensor
) -> Module:
    """Prune the entries of lowest score of one tensor, in place.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".
        amount: A float in [0, 1] is a fraction of the entries not yet pruned, an int a number.
        importance_scores: Shape of the tensor, integer or floating, on any device, without NaN;
            ranked as signed. Ties keep the first entry.

    Returns:
        The module: ``name`` is masked, ``name_orig`` the parameter and ``name_mask`` a buffer.

    Raises:
        TypeError: If the scores are missing or not a real tensor, or `amount` is not a number.
        ValueError: If the scores have another shape or NaN, `amount` is out of range, or the
            tensor cannot be pruned; see `find_weights`. The module is left as it was.

    Cost:
        A selection in O(D), and a mask in the weight's dtype.

    Example:
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> scores = torch.arange(8.0).reshape(2, 4)
        >>> _ = hesscurv.pruning.curvature_unstructured(layer, "weight", 3, scores)
        >>> layer.weight_mask
        tensor([[0., 0., 0., 1.],
                [1., 1., 1., 1.]])
    """
    CurvatureUnstructured.apply(module, name, amount, importance_scores)
    return module


def curvature_structured(
    module: Module,
    name: str,
    amount: float,
    dim: int | None = None,
    importance_scores: Tensor | None = None,
) -> Module:
    """Prune the slices of lowest score along one dimension of a tensor, in place.

    ``score of slice i = sum of the scores in it that are not yet pruned``

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".
        amount: A float in [0, 1] is a fraction of the slices not yet pruned, an int a number.
        dim: The dimension along which slices lie; the outputs' by default: 0, and 1 for transposed
            convolutions and transformers' Conv1D.
        importance_scores: Shape of the tensor, integer or floating, on any device, without NaN;
            needed. Of slices of equal score the one that comes first is kept.

    Returns:
        The module: ``name`` is masked, ``name_orig`` the parameter and ``name_mask`` a buffer.

    Raises:
        TypeError: If the scores are missing or not a real tensor, or `amount` is not a number.
        IndexError: If the tensor has no dimension `dim`.
        ValueError: If the scores have another shape or NaN, `amount` is out of range, the tensor
            has one dimension or cannot be pruned, or `dim` is not given and the layer's type is
            unknown. The module is left as it was.

    Cost:
        A sum over the tensor, and a mask in the weight's dtype.

    Example:
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> scores = torch.arange(8.0).reshape(2, 4)
        >>> _ = hesscurv.pruning.curvature_structured(layer, "weight", 1, importance_scores=scores)
        >>> layer.weight_mask
        tensor([[0., 0., 0., 0.],
                [1., 1., 1., 1.]])
    """
    CurvatureStructured.apply(module, name, amount, dim, importance_scores)
    return module


def curvature_nm(
    module: Module,
    name: str,
    n: int,
    m: int,
    importance_scores: Tensor,
    *,
    dim: int | None = None,
) -> Module:
    """Keep n of every m consecutive entries along the inputs of a tensor, in place.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".
        n: How many of each group are kept, 1 <= n <= m; those of highest score.
        m: The size of a group; divides the tensor's size along `dim`.
        importance_scores: Shape of the tensor, integer or floating, on any device, without NaN;
            ranked as signed. Ties keep the first entry.
        dim: The dimension along which groups lie; the inputs' by default: 1, and 0 for transposed
            convolutions and transformers' Conv1D. See `CurvatureNM` for convolutions.

    Returns:
        The module: ``name`` is masked, ``name_orig`` the parameter and ``name_mask`` a buffer.

    Raises:
        TypeError: If the scores are missing or not a real tensor, or n, m or dim is not an int.
        IndexError: If the tensor has no dimension `dim`.
        ValueError: If the scores have another shape or NaN, n or m is out of range, m does not
            divide the inputs (of one group of a grouped convolution), the tensor cannot be pruned,
            or `dim` is not given and the layer's type is unknown; see `register_weight_axes`. The
            module is left as it was.

    Cost:
        Two sorts of groups of m, and a mask in the weight's dtype.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks (2021), arXiv 2104.08378.

    Example:
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> scores = torch.arange(8.0).reshape(2, 4)
        >>> _ = hesscurv.pruning.curvature_nm(layer, "weight", 2, 4, scores)
        >>> layer.weight_mask
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    CurvatureNM.apply(module, name, n, m, dim, importance_scores)
    return module


def apply_mask_(module: nn.Module, name: str, mask: Tensor) -> None:
    """Prune a tensor by a mask in addition to its present one; the module can be copied afterwards.

    Args:
        module: The module that owns the tensor; see `check_prunable`.
        name: The tensor's name when dense.
        mask: Shape of the tensor, bool, True where it is kept; on the tensor's device.
    """
    restore_hook_(module, name)
    prune.custom_from_mask(module, name, mask)
    refresh_(module, name)


def _dimension(t: Tensor, dim: int) -> int:
    if t.ndim < 2:
        raise ValueError(
            f"expected a tensor of at least two dimensions, got shape {tuple(t.shape)}; prune its "
            "entries one by one instead"
        )
    if not -t.ndim <= dim < t.ndim:
        raise IndexError(f"expected a dimension of shape {tuple(t.shape)}, got dim={dim}")
    return dim % t.ndim
