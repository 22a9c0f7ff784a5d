"""Whether a graph computes what its model does: both run once on the example."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bnfx.errors import CaptureError
from bnfx.graphs.examples import Example
from bnfx.graphs.observed import undisturbed_random_state


def outputs(model: nn.Module, given: Example) -> Any:
    """What `model` returns, without gradients; the example and the random state stay as they are.

    A forward may write into the model, so callers that want it as it is pass a copy.

    Raises:
        CaptureError: It does not run; the message names the module.
    """
    mine = given.copied()
    try:
        with torch.no_grad(), undisturbed_random_state(model):
            return model(*mine.args, **mine.kwargs)
    except Exception as error:  # a user's forward raises anything
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs ({_shown(given)})"
            f"{_where(model, error.__traceback__)}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}. Give inputs that its forward takes"
        ) from error


def bound(model: nn.Module, graph: fx.Graph, given: Example) -> dict[str, Any]:
    """The example's arguments that are placeholders of a trace of `model`, in its order."""
    known = inspect.signature(model.forward).bind(*given.args, **given.kwargs).arguments
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    return {name: known[name] for name in names if name in known}


def alike(a: Any, b: Any, close: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether two results have the same containers, shapes and dtypes, and tensors that are close.

    Args:
        a: One result.
        b: The other.
        close: Compares two tensors of one shape and dtype.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = bool(a.shape == b.shape and a.dtype == b.dtype)
        return same and (a.is_meta or b.is_meta or close(a, b))  # on meta there are no values
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(alike(a[key], b[key], close) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(x, y, close) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [f.name for f in dataclasses.fields(a)]
        return all(alike(getattr(a, name), getattr(b, name), close) for name in names)
    return True


def nearly(a: Tensor, b: Tensor) -> bool:
    """Equal but for a wrong turn: 0.1 %."""
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True))


def reordered(a: Tensor, b: Tensor) -> bool:
    """The same operators on the same numbers: equal up to the order of a threaded sum."""
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or not a.numel():
        return bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    unit = 64 * torch.finfo(a.dtype).eps
    largest = float(torch.nan_to_num(a.abs(), nan=0.0, posinf=0.0).max())
    return bool(torch.allclose(a, b, rtol=unit, atol=unit * largest, equal_nan=True))


def _shown(given: Example) -> str:
    """Shapes and dtypes of the tensors in an example."""
    leaves = pytree.tree_leaves((given.args, dict(given.kwargs)))
    parts = [
        f"{'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')}"
        for t in leaves
        if isinstance(t, Tensor)
    ]
    return ", ".join(parts) or "no tensors"


def _where(model: nn.Module, trace: TracebackType | None) -> str:
    """The innermost module of `model` in whose forward an error was raised, in words."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        path = paths.get(id(owner), "")
        found = f", in {type(owner).__name__} {path!r}" if path else found
        trace = trace.tb_next
    return found
