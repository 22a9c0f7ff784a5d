"""Rules of operators that take elements as they are: data movement, identities, clamps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from bnfx.gauges.constraints import Bounds, Cause, Demand
from bnfx.gauges.labels import array, compact, concatenated, settled
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.graphs.shapes import is_tensor
from bnfx.operators.calls import argument, base_name, call_name


def move(walk: Walk, node: fx.Node) -> Any:
    """The call itself, carried out on the labels."""
    name = base_name(call_name(node))
    if name == "copy":
        return _copied(walk, node)
    if name in ("index", "_unsafe_index", "index_select") and not _indices_known(walk, node):
        return _gathered(walk, node)

    def value(n: fx.Node) -> Any:
        labels, fake = walk.maps.get(n), walk.shapes.values.get(n)
        if is_tensor(fake) and not fake.is_floating_point():
            known = walk.values.of(n)
            if known is None:
                raise Opaque
            return known
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(labels)):
            return labels
        return fake  # sizes, say

    first = argument(node, 0, "input")
    if isinstance(first, fx.Node) and isinstance(walk.maps.get(first), Tensor):
        walk.labels_of(first)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    try:
        moved = called(node, args, kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError) as error:
        raise Opaque from error
    if any(isinstance(m, FakeTensor) for m in pytree.tree_leaves(moved)):
        raise Opaque  # a member of an input's container, which has no labels
    return pytree.tree_map(lambda m: settled(m) if isinstance(m, Tensor) else m, moved)


def _copied(walk: Walk, node: fx.Node) -> Tensor:
    """Of `copy(target, source)`: the source, in the shape of the target."""
    target, source = node.args[:2]
    if not isinstance(node.target, torch._ops.OpOverload):
        raise Opaque
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node):
        raise Opaque
    labels = walk.labels_of(source)
    mine, theirs = walk.shapes.values.get(target), walk.shapes.values.get(source)
    if not is_tensor(mine) or not is_tensor(theirs) or mine.dtype != theirs.dtype:
        raise Opaque
    return labels.expand(walk.shape_of(target))


def _indices(node: fx.Node) -> list[Any]:
    """For each axis what it is indexed with; None where it is not."""
    if base_name(call_name(node)) == "index_select":
        axis, index = argument(node, 1, "dim"), argument(node, 2, "index")
        if not isinstance(axis, int) or axis < 0:
            raise Opaque
        return [*[None] * axis, index]
    indices = argument(node, 1, "indices")
    if not isinstance(indices, tuple | list):
        raise Opaque
    return list(indices)


def _indices_known(walk: Walk, node: fx.Node) -> bool:
    return all(walk.values.of(i) is not None for i in _indices(node) if isinstance(i, fx.Node))


def _gathered(walk: Walk, node: fx.Node) -> Tensor:
    """Elements from anywhere along axes that lie side by side: one gauge along these axes.

    Whatever the indices are; core ATen writes reflected padding and upsampling so.
    """
    labels, indices = walk.labels_of(argument(node, 0, "input")), _indices(node)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    fakes = [walk.shapes.values.get(indices[axis]) for axis in axes]
    if axes != list(range(axes[0], axes[-1] + 1)) or not all(
        is_tensor(fake) and fake.dtype in (torch.int32, torch.int64) for fake in fakes
    ):
        raise Opaque
    kept = [axis for axis in range(labels.dim()) if axis not in axes]
    small = compact(labels)
    rows = walk.rows(small, kept, Cause(node, describe(node)))
    shape = walk.shape_of(node)
    sizes = [small.shape[axis] for axis in kept]
    sizes[axes[0] : axes[0]] = [1] * (len(shape) - len(kept))
    return torch.from_numpy(rows).reshape(sizes).expand(shape)


def concatenate(walk: Walk, node: fx.Node) -> Tensor:
    """Labels side by side."""
    axis = argument(node, 1, "dim", 0)
    if not isinstance(axis, int):
        raise Opaque
    shape = walk.shape_of(node)
    maps = _parts(walk, argument(node, 0, "tensors"))
    return concatenated([m for m in maps if m.dim() == len(shape)], axis)


def stack(walk: Walk, node: fx.Node) -> Tensor:
    """Labels side by side along a new axis."""
    axis = argument(node, 1, "dim", 0)
    if not isinstance(axis, int):
        raise Opaque
    maps = _parts(walk, argument(node, 0, "tensors"))
    if len({m.shape for m in maps}) > 1:  # of assumed ranks: torch takes equal shapes only
        raise Opaque
    return concatenated([m.unsqueeze(axis) for m in maps], axis)


def shape(walk: Walk, node: fx.Node) -> Any:
    """What depends on shapes alone has no gauge."""
    return walk.grounded(node)


def _parts(walk: Walk, parts: object) -> list[Tensor]:
    """The labels of each of several tensors, which may be what one call gave, a chunk say."""
    if not isinstance(parts, fx.Node):
        if not isinstance(parts, tuple | list):
            raise Opaque
        return [walk.labels_of(part) for part in parts]
    maps, fakes = walk.maps.get(parts), walk.shapes.values.get(parts)
    if not isinstance(maps, tuple | list) or not isinstance(fakes, tuple | list):
        raise Opaque
    found = []
    for labels, fake in zip(maps, fakes, strict=True):
        if not isinstance(labels, Tensor) or not is_tensor(fake) or not fake.is_floating_point():
            raise Opaque
        found.append(labels)
    return found


def called(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call with these arguments."""
    name = base_name(call_name(node))
    if name in ("view", "_unsafe_view"):  # maps are not contiguous, the tensors they stand for are
        return args[0].reshape(*args[1:], **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a function


def identity(walk: Walk, node: fx.Node) -> Tensor:
    """The same gauge."""
    labels = walk.labels_of(node.args[0] if node.args else argument(node, 0, "input"))
    value = walk.shapes.values.get(node)
    name = base_name(call_name(node))
    random = "dropout" in name and argument(
        node, 2, "train" if isinstance(node.target, torch._ops.OpOverload) else "training", True
    )
    if random or not is_tensor(value) or not value.is_floating_point():
        raise Opaque
    source = walk.shapes.values[node.all_input_nodes[0]]
    if value.shape != source.shape or value.dtype != source.dtype:
        raise Opaque
    return labels


def rectifier(walk: Walk, node: fx.Node) -> Tensor:
    """f(a x) = a f(x) for a > 0, and d = 0; with thresholds any gauge."""
    labels = walk.labels_of(argument(node, 0, "input"))
    for other in node.all_input_nodes[1:]:
        walk.found.ground(array(walk.labels_of(other)), Cause(node, describe(node)))
    name = call_name(node)
    soft = walk.options.thresholds and base_name(name) == "relu"
    if soft:
        _bounded(walk, node, labels, 0.0, np.inf)
    walk.positive(array(labels), Cause(node, describe(node)), soft=soft)
    walk.unshifted(array(labels), Cause(node, describe(node)), soft=soft)
    return labels


def clamp(walk: Walk, node: fx.Node) -> Tensor:
    """With thresholds any gauge, otherwise none."""
    if not walk.options.thresholds:
        raise Opaque
    labels, bounds = walk.labels_of(argument(node, 0, "input")), _bounds_of(node)
    if bounds is None:
        raise Opaque
    _bounded(walk, node, labels, *bounds)
    used, cause = np.unique(array(labels)), Cause(node, describe(node))
    zero = np.zeros_like(used)
    walk.found.demand(Demand.SAME_SCALE, used, zero, cause=cause, soft=True)
    walk.unshifted(used, cause, soft=True)
    return labels


def _bounded(walk: Walk, node: fx.Node, labels: Tensor, lower: float, upper: float) -> None:
    like = walk.shapes.values[node]
    walk.found.bounds.setdefault(node, Bounds(compact(labels).contiguous(), lower, upper, like))


def _bounds_of(node: fx.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a clamp; None where they are computed."""
    name = base_name(call_name(node))
    lower: Any = None
    upper: Any = None
    if name == "relu6":
        lower, upper = 0.0, 6.0
    elif name == "hardtanh":
        lower, upper = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    elif name in ("clamp", "clip"):
        lower, upper = argument(node, 1, "min"), argument(node, 2, "max")
    elif name == "clamp_min":
        lower = argument(node, 1, "min")
    elif name == "clamp_max":
        upper = argument(node, 1, "max")
    if not all(bound is None or isinstance(bound, int | float) for bound in (lower, upper)):
        return None
    lower, upper = -np.inf if lower is None else lower, np.inf if upper is None else upper
    if np.isnan(lower) or np.isnan(upper):
        return None
    return min(lower, upper), upper  # where they cross, torch gives the upper one
