"""Search for the operation that autograd fails on, and for its module, by running it again.

Autograd's messages name at most a kernel of the backward pass. Here each node of the graph is noted
with the module that was running when it was made; nodes made by the backward pass belong to the
node whose derivative they are part of.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesscurv.objective.tasks import tensors_of

# Nodes that stand for a missing derivative: their error says of what.
_NAMELESS = ("NotImplemented", "Error")
_MOST_TRIES = 32
CUT = "a function that is marked with @once_differentiable is differentiated twice"


@dataclass(frozen=True)
class FailingOperation:
    """An operation that cannot be run, or cannot be differentiated as often as needed.

    Args:
        name: The operation's, as in "EmbeddingBag" or "cdist".
        module: The dotted name of the innermost module that it runs in, "" for the whole model.
        kind: That module's class; "" if it runs in no module.
        order: The derivative that fails; 0 where the operation itself does.
        is_custom: Whether it is an `autograd.Function` of the model's own.
        upstream: The numbers of the leaves that it depends on.
        error: What was raised.
        names: The names of parameters by id, where modules were found as they ran.
    """

    name: str
    module: str
    kind: str
    order: int
    is_custom: bool
    upstream: frozenset[int]
    error: Exception
    names: Mapping[int, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Name the operation and its module."""
        return f"{self.name} {describe_place(self.module, self.kind)}"


def find_unaffected(
    find: Callable[[list[int]], FailingOperation | None], found: FailingOperation, count: int
) -> tuple[list[int], FailingOperation]:
    """Return leaves with which alone nothing fails, tried out; none where there are none.

    Args:
        find: Returns what fails where only the leaves of these numbers are differentiated.
        found: What fails with all of them.
        count: How many there are.

    Returns:
        The numbers, and what failed last.
    """
    left = list(range(count))
    for _ in range(_MOST_TRIES):
        left = [i for i in left if i not in found.upstream]
        if not left or not found.upstream:
            break
        again = find(left)
        if again is None:
            return left, found
        found = replace(again, upstream=frozenset(left[i] for i in again.upstream))
    return [], found


def describe_place(module: str, kind: str) -> str:
    """Say where in a model something runs; see `FailingOperation`."""
    if not kind:
        return "in the loss"
    return f"in {f'module {module!r}' if module else 'the model'} ({kind})"


def find_failing_operation(
    model: nn.Module | Sequence[nn.Parameter],
    fn: Callable[[tuple[Tensor, ...]], Tensor],
    leaves: Sequence[Tensor],
    order: int,
) -> FailingOperation | None:
    """Run a function and differentiate it; return what fails, or None if nothing does.

    To be run where the function is differentiable, see `Objective.run`.

    Args:
        model: Whose modules are named; or some parameters, of which modules are looked for as they
            run.
        fn: A function of the leaves; of its outputs random combinations are differentiated.
        leaves: Tensors that require grad.
        order: How often to differentiate, 1 or 2.
    """
    recorder = _Recorder()
    try:
        watched = (
            following(model, recorder)
            if isinstance(model, nn.Module)
            else _following_owners(model, recorder)
        )
        with recorder, watched:
            out = fn(tuple(leaves))
            recorder.note(out)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return replace(recorder.failed_in_forward(error, leaves), names=recorder.names)
    if not out.requires_grad:
        return None
    watch = _Watch(recorder)
    done = 0
    try:
        found = [out]
        for done in range(order):
            watch.follow(found)
            slopes = torch.autograd.grad(
                found,
                leaves,
                [torch.ones_like(t) for t in found],
                create_graph=done + 1 < order,
                allow_unused=True,
            )
            found = [s for s in slopes if s is not None and s.requires_grad]
            if not found:
                return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failed = recorder.failed_in_backward(watch.current, error, done + 1, leaves)
        return None if failed is None else replace(failed, names=recorder.names)
    finally:
        watch.remove()
    return None


class _Recorder(TorchFunctionMode):
    """Notes for each node of a graph which module and function it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}
        self._made: dict[Any, tuple[str, str, str]] = {}  # function, module, its class
        self._origin: dict[Any, Any] = {}  # a node of the backward pass -> of the forward pass
        self._last: tuple[str, Any] = ("", ())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            self._last = name, (args, kwargs)
        out = func(*args, **(kwargs or {}))
        if name != "__get__":
            self.note(out, name)
        return out

    def note(self, value: Any, function: str = "") -> None:
        """Note the nodes that were made since the last call, in a function if that is known."""
        module, kind = self.modules[-1] if self.modules else ("", "")
        for node in new_nodes(value, self._made):
            self._made[node] = function, module, kind

    def note_backward(self, value: Any, node: Any) -> None:
        """Note the nodes that a node has made when it ran."""
        for new in new_nodes(value, self._made | self._origin):
            self._origin[new] = self._origin.get(node, node)

    def failed_in_forward(self, error: Exception, leaves: Sequence[Tensor]) -> FailingOperation:
        module, kind = self.modules[-1] if self.modules else ("", "")
        name, arguments = self._last
        nodes = [n for t in tensors_of(arguments) if (n := _node_of(t)) is not None]
        return FailingOperation(
            name or kind, module, kind, 0, False, _leaves_below(nodes, leaves), error
        )

    def failed_in_backward(
        self, node: Any, error: Exception, order: int, leaves: Sequence[Tensor]
    ) -> FailingOperation | None:
        first = self._origin.get(node, node)
        if first is None:
            return None
        function, module, kind = self._made.get(first, ("", "", ""))
        is_custom = isinstance(first, torch.autograd.function.BackwardCFunction)
        name = _operation_of(first.name())
        kernel = re.search(r"derivative for aten::(\w+) is not", str(error))
        if name in _NAMELESS and kernel:
            name = kernel[1]
        if function and not is_custom:
            name = function if _is_like(function, name) else f"{function} ({name})"
        return FailingOperation(
            name, module, kind, order, is_custom, _leaves_below([first], leaves), error
        )


class _Watch:
    """Knows which node of a graph is running."""

    def __init__(self, recorder: _Recorder) -> None:
        self.current: Any = None
        self._recorder = recorder
        self._handles: list[Any] = []
        self._seen: set[Any] = set()

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Watch the nodes of the tensors' graphs."""
        for node in new_nodes(tensors, self._seen):
            self._seen.add(node)
            if is_cut(node):
                self.current = node
                raise RuntimeError(CUT)

            def before(_: Any, node: Any = node) -> None:
                self.current = node

            def after(inputs: Any, _: Any, node: Any = node) -> None:
                self._recorder.note_backward(inputs, node)

            self._handles.append(node.register_prehook(before))
            self._handles.append(node.register_hook(after))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def following(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Tell the recorder which modules run; after an error, those stay in which it was raised.

    Args:
        model: Whose modules are named.
        recorder: Its `modules` has the name and class of each that is running; its `note` is called
            with inputs and outputs.
    """
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            recorder.note((args, kwargs))  # what was made before
            recorder.modules.append((name, type(module).__name__))

        return hook

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        recorder.note(out)
        recorder.modules.pop()

    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _following_owners(params: Sequence[nn.Parameter], recorder: _Recorder) -> Iterator[None]:
    """As `following`, of the models that own some parameters, which are found as they run.

    Modules without any, such as losses, count as no module.
    """
    own = {id(p) for p in params}
    running: list[nn.Module] = []
    names: dict[int, str] = {}

    def enter(module: nn.Module, args: Any) -> None:
        if not running:
            named = list(module.named_parameters())
            if not any(id(p) in own for _, p in named):
                return
            recorder.names.update((id(p), name) for name, p in named)
            names.update((id(m), name) for name, m in module.named_modules())
        recorder.note(args)  # what was made before
        running.append(module)
        recorder.modules.append((names.get(id(module), ""), type(module).__name__))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        recorder.note(out)
        if running and running[-1] is module:
            running.pop()
            recorder.modules.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def new_nodes(value: Any, known: Any) -> Iterator[Any]:
    """Yield the nodes of some tensors' graphs that are not known, nor behind known ones."""
    waiting = [n for t in tensors_of(value) if (n := _node_of(t)) is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in known or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [n for n, _ in node.next_functions if n is not None]


def is_cut(node: Any) -> bool:
    """Whether a node stands for a derivative that a function refuses to have.

    What is upstream of it is not reached: autograd leaves it out, and says nothing.
    """
    return bool(node.name() == "torch::autograd::Error")


def _node_of(tensor: Tensor) -> Any:
    with contextlib.suppress(RuntimeError):  # of a view that a custom function has written to
        return tensor.grad_fn
    return None


def _leaves_below(nodes: Sequence[Any], leaves: Sequence[Tensor]) -> frozenset[int]:
    number = {id(leaf): i for i, leaf in enumerate(leaves)}
    found, seen, waiting = set(), set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = number.get(id(getattr(node, "variable", None)))
        if leaf is not None:
            found.add(leaf)
        waiting += [n for n, _ in node.next_functions if n is not None]
    return frozenset(found)


def _operation_of(node_name: str) -> str:
    """Return "Cdist" for "CdistBackward0", "mysin" for "GeneratedBackwardFor_a_mysin_default"."""
    name = node_name.split("::")[-1]
    generated = re.match(r"GeneratedBackwardFor_(.+?)_default", name)
    if generated:
        return generated[1]
    return re.sub(r"(Compiled)?Backward\d*$", "", name) or name


def _is_like(function: str, operation: str) -> bool:
    """Whether these are the same: "embedding_bag" and "EmbeddingBag", "grid_sample" and its 2D."""
    short, long = sorted((_letters(function), _letters(operation)), key=len)
    return short in long


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
