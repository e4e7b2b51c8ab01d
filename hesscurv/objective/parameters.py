"""Selection of parameters and their layout in a flat vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.interface.descriptions import brief
from hesscurv.linalg.precision import require_float64

ParamSelection = (
    str | Iterable[str] | Iterable[nn.Parameter] | Callable[[str, nn.Parameter], bool] | None
)


_SHOWN = 4  # names of a layout that are printed


@dataclass(frozen=True, repr=False)
class ParameterLayout:
    """Layout of named parameters in a flat vector of length D.

    Parameter ``names[i]`` with shape ``shapes[i]`` fills the entries ``slices()[names[i]]``, in
    row-major order. The layout is plain data, stored with eigenpairs, so a row of an eigenvector
    can be traced back to its weight.

    Args:
        names: Dotted parameter names as in ``model.named_parameters()``, in the vector's order.
        shapes: One shape for each name.

    Raises:
        ValueError: If the numbers of names and shapes differ, or a name occurs twice.

    Example:
        >>> layout = hesscurv.ParameterLayout(("weight", "bias"), ((2, 3), (2,)))
        >>> layout.numel
        8
        >>> layout.split(torch.arange(8.0))["bias"]
        tensor([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Validate the two tuples against each other."""
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f"expected one shape for each name, got {len(self.names)} names and "
                f"{len(self.shapes)} shapes"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"expected distinct parameter names, got {self.names}")

    @property
    def numel(self) -> int:
        """The length D of the flat vector."""
        return sum(prod(shape) for shape in self.shapes)

    def __repr__(self) -> str:
        """Return the first names and the number of others."""
        shown = ", ".join(
            f"{brief(name)}: {shape}"
            for name, shape in zip(self.names[:_SHOWN], self.shapes[:_SHOWN], strict=True)
        )
        more = len(self.names) - _SHOWN
        rest = f", and {more:,} more" if more > 0 else ""
        return f"ParameterLayout(D={self.numel:,}, {{{shown}{rest}}})"

    def slices(self) -> dict[str, slice]:
        """Map each name to its slice of the flat vector."""
        out, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            out[name] = slice(start, start + prod(shape))
            start += prod(shape)
        return out

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector (D,) into parameter-shaped pieces; views where strides allow.

        Args:
            vector: Shape (D,), or (D, b): then each piece has shape ``(*shape, b)``.

        Returns:
            A dict from name to piece.

        Raises:
            ValueError: If the first dimension is not D.
        """
        if vector.ndim not in (1, 2) or vector.shape[0] != self.numel:
            raise ValueError(
                f"expected a vector of shape ({self.numel},) or ({self.numel}, b) for this "
                f"layout, got {tuple(vector.shape)}"
            )
        shapes = dict(zip(self.names, self.shapes, strict=True))
        return {
            name: vector[part].reshape((*shapes[name], *vector.shape[1:]))
            for name, part in self.slices().items()
        }

    def flatten(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Concatenate parameter-shaped pieces into a flat vector (D,), the inverse of `split`.

        Args:
            pieces: A mapping that has every name of the layout, each with its shape.

        Returns:
            Shape (D,), on the pieces' device, in their promoted dtype.

        Raises:
            ValueError: If a name is missing or a shape differs.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in pieces:
                raise ValueError(f"expected a piece for parameter {name!r}, got {list(pieces)}")
            if tuple(pieces[name].shape) != shape:
                raise ValueError(
                    f"expected shape {shape} for parameter {name!r}, "
                    f"got {tuple(pieces[name].shape)}"
                )
        return torch.cat([pieces[name].reshape(-1) for name in self.names])

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain lists, for storage."""
        return {"names": list(self.names), "shapes": [list(s) for s in self.shapes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParameterLayout:
        """Rebuild a layout from `to_dict`'s output.

        Raises:
            ValueError: If it is not such an output.
        """
        try:
            names, shapes = tuple(data["names"]), tuple(tuple(s) for s in data["shapes"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a layout's names and shapes, got {data!r:.80}") from error
        sizes = [size for shape in shapes for size in shape]
        if not all(isinstance(name, str) for name in names) or not all(
            type(size) is int and size >= 0 for size in sizes
        ):
            raise ValueError(f"expected names and sizes of at least 0, got {data!r:.80}")
        return cls(names, shapes)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module behind torch.compile, DDP and DataParallel wrappers.

    A compiled module cannot be differentiated twice, and a DDP wrapper's hooks do not see
    `torch.autograd.grad`; the modules behind them share the same parameters.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def broadcasts_buffers(model: nn.Module) -> bool:
    """Whether a model is wrapped in DDP that broadcasts rank 0's buffers."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return False
        model = inner
    return bool(model.broadcast_buffers)


def select_parameters(model: nn.Module, params: ParamSelection = None) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, tied ones once, in the model's order.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        params: None for all that require grad; a name or names, each a full dotted name or that of
            a submodule, which selects all its parameters; parameters of the model; or a predicate
            ``(name, parameter) -> bool`` over those that require grad.

    Returns:
        A dict from dotted name to parameter. The name of a tied parameter is its first one.

    Raises:
        ValueError: If a name or parameter is not the model's, nothing is selected, or a selected
            parameter does not require grad.
        TypeError: If `params` is none of the above, or a parameter is not of a real floating type.

    Example:
        >>> list(hesscurv.operators.select_parameters(model, lambda name, p: p.ndim > 1))
        ['0.weight', '2.weight']
    """
    model = unwrap(model)
    by_alias = dict(model.named_parameters(remove_duplicate=False))
    first_name: dict[int, str] = {}
    for name, p in by_alias.items():
        first_name.setdefault(id(p), name)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not by_alias:
        raise ValueError("expected a model with parameters, got one without any")

    if params is None:
        chosen = trainable
    elif callable(params) and not isinstance(params, nn.Module):
        chosen = {n: p for n, p in trainable.items() if params(n, p)}
        if trainable and not chosen:
            raise ValueError(
                "the predicate `params` selected none of the parameters that require grad; "
                f"it was asked about {_shorten(trainable)}"
            )
    else:
        chosen = dict(_chosen_explicitly(params, by_alias, first_name))
        if not chosen:
            raise ValueError("expected at least one name or parameter in `params`, got none")
        order = {name: i for i, name in enumerate(by_alias)}
        chosen = dict(sorted(chosen.items(), key=lambda item: order[item[0]]))
        _require_floating(chosen)
        frozen = [n for n, p in chosen.items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"expected parameters that require grad, got frozen {_shorten(frozen)}; call "
                "requires_grad_(True) on them or leave them out of `params`"
            )
    if not chosen:
        if not any(p.is_floating_point() for p in by_alias.values()):
            _require_floating(by_alias)
        raise ValueError(
            f"no parameter requires grad: all of {_shorten(by_alias)} are frozen; "
            "call requires_grad_(True) on those whose curvature you want"
        )
    _require_floating(chosen)
    for name, p in chosen.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is not initialised yet; run the lazy model on one batch first"
            )
    if not sum(p.numel() for p in chosen.values()):
        raise ValueError(f"the selected parameters {_shorten(chosen)} have no entries")
    return chosen


def layout_of(params: Mapping[str, Tensor]) -> ParameterLayout:
    """Return the layout of named tensors in their order."""
    return ParameterLayout(tuple(params), tuple(tuple(p.shape) for p in params.values()))


def _require_floating(params: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        if not p.is_floating_point():
            raise TypeError(
                f"expected parameters of a real floating dtype, got {p.dtype} for {name!r}; "
                "convert the model, or leave the parameter out through `params`"
            )


def _chosen_explicitly(
    params: Any, by_alias: Mapping[str, nn.Parameter], first_name: Mapping[int, str]
) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(params, (str, nn.Parameter)):
        params = [params]
    if not isinstance(params, Iterable):
        raise TypeError(
            "expected `params` to be None, names, parameters or a predicate (name, parameter) -> "
            f"bool, got {type(params).__name__}"
        )
    for item in params:
        if isinstance(item, str):
            prefix = item.rstrip(".") + "."
            found = [p for n, p in by_alias.items() if n == item or n.startswith(prefix)]
            if not found:
                raise ValueError(
                    f"the model has no parameter or submodule {item!r}; it has {_shorten(by_alias)}"
                )
        elif isinstance(item, Tensor):
            if id(item) not in first_name:
                raise ValueError(
                    f"a parameter of shape {tuple(item.shape)} in `params` is not one of the "
                    "model's; pass names, or parameters of this very model"
                )
            found = [by_alias[first_name[id(item)]]]
        else:
            raise TypeError(
                f"expected names or parameters in `params`, got a {type(item).__name__}"
            )
        for p in found:
            yield first_name[id(p)], p


def _shorten(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return "[" + ", ".join(repr(n) for n in names[:limit]) + rest + "]"


def signature_of(p: Tensor) -> tuple[Any, ...]:
    """Return the properties of a parameter that must not change under an operator."""
    return tuple(p.shape), p.dtype, p.device


def common_device(model: nn.Module, params: dict[str, nn.Parameter]) -> torch.device:
    """Return the device of the selected parameters.

    Raises:
        ValueError: If there are several, it lacks float64, or parameters are on the meta device.
    """
    spread = getattr(model, "hf_device_map", None) or {}
    places = sorted({str(device) for device in spread.values()})
    how = f" (loaded with device_map, over {places})" if places else ""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"expected a model with values, got parameters on the meta device{how}; load it whole, "
            "without offloading any part"
        )
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise ValueError(
            f"expected the selected parameters on one device, got {sorted(map(str, devices))}"
            f"{how}; move the model to one device, or select parameters of one with params="
        )
    device = devices.pop()
    require_float64(device)
    return device


def resolve_compute_dtype(
    params: dict[str, nn.Parameter], wanted: torch.dtype | None
) -> torch.dtype:
    """Return the compute dtype: the given one, or the widest of the parameters, at least float32.

    Raises:
        TypeError: If the given one is not a floating dtype.
    """
    if wanted is not None:
        if not wanted.is_floating_point:
            raise TypeError(f"expected a floating compute_dtype, got {wanted}")
        return wanted
    dtypes = {torch.float32 if p.itemsize < 4 else p.dtype for p in params.values()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
