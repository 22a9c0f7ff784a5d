"""Rules of operators that move elements: they are carried out on the labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from bnfx.gauges.labels import concatenated, settled
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.shapes import is_tensor
from bnfx.operators.calls import argument, base_name, call_name


def move(walk: Walk, node: fx.Node) -> Any:
    """The call itself, carried out on the labels."""

    def value(n: fx.Node) -> Any:
        labels, fake = walk.maps.get(n), walk.shapes.values.get(n)
        if is_tensor(fake) and not fake.is_floating_point():
            known = walk.values.of(n)
            if known is None:
                raise Opaque
            return known
        if labels is not None:
            return labels
        return fake

    first = argument(node, 0, "input")
    if isinstance(first, fx.Node) and isinstance(walk.maps.get(first), Tensor):
        walk.labels_of(first)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    try:
        moved = _moved(node, args, kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError) as error:
        raise Opaque from error
    if any(isinstance(m, FakeTensor) for m in pytree.tree_leaves(moved)):
        raise Opaque  # a member of an input's container, which has no labels
    return pytree.tree_map(lambda m: settled(m) if isinstance(m, Tensor) else m, moved)


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


def _moved(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = base_name(call_name(node))
    if name in ("view", "_unsafe_view"):  # maps are not contiguous, the tensors they stand for are
        return args[0].reshape(*args[1:], **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a function
