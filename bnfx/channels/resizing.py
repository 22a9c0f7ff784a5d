"""What calls must be given when some units leave the tensors, and which units can't leave for that.

Nothing is taken for granted of calls that move elements: each is carried out on numbered elements,
with all of them and with those that stay, and both must give the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnfx.channels.dead import Truths
from bnfx.channels.look import Look
from bnfx.gauges.labels import compact
from bnfx.gauges.rules_elements import called
from bnfx.graphs.shapes import is_tensor
from bnfx.operators.calls import argument, base_name, call_name
from bnfx.operators.table import Passage, passage_of

#: For each axis of a tensor, which places stay.
Kept = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """What a node calls instead."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Resizing:
    """The graph of `look` without the units that are true in `gone`, one for each unit."""

    look: Look
    gone: Truths
    #: Calls that need other arguments.
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    #: Units that cannot leave, as labels.
    stuck: set[int] = field(default_factory=set)
    _numbers: dict[fx.Node, Any] = field(default_factory=dict)
    _origins: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)

    def run(self) -> Resizing:
        """Find `calls` and `stuck`; where anything is stuck, `calls` are of no use."""
        for labels in self._maps():
            self._kept(labels)
        for node in self.look.graph.nodes if not self.stuck else ():
            self._visit(node)
        return self

    def kept(self, node: fx.Node) -> Kept:
        """Which places stay in the tensor that `node` gives."""
        return self._kept(self.look.units.maps[node])

    def _maps(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(list(self.look.units.maps.values()))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _kept(self, labels: Tensor) -> Kept:
        """The smallest box of places that holds all units which stay, and at least one place."""
        small = compact(labels)
        stay = ~torch.from_numpy(np.asarray(self.gone[small.numpy()]))
        if bool(stay.all()):
            return tuple(torch.ones(n, dtype=torch.bool, device="cpu") for n in labels.shape)
        axes, box = [], torch.ones_like(stay)
        for axis in range(stay.dim()):
            others = [a for a in range(stay.dim()) if a != axis]
            line = stay.any(others) if others else stay
            box = box & line.reshape([-1 if a == axis else 1 for a in range(stay.dim())])
            axes.append(line.expand(labels.shape[axis]))
        if not bool(stay.any()):
            box = torch.ones_like(stay)
        self.stuck.update(small[box & ~stay].tolist())
        return tuple(axes)

    def _visit(self, node: fx.Node) -> None:
        leaves = pytree.tree_leaves(self.look.shapes.values.get(node, ()))
        if "call" in node.op and leaves and all(isinstance(n, int | float) for n in leaves):
            self._count(node)
            return
        changed = {n for n in node.all_input_nodes if self._changed(n)}
        if passage_of(node) is Passage.MOVE and node.op != "output":
            if changed or self._touched(node) or any(map(self._touched, node.all_input_nodes)):
                self._move(node)
        elif changed:
            self.refuse(*changed)

    def _touched(self, node: fx.Node) -> bool:
        leaves = pytree.tree_leaves(self.look.units.maps.get(node))
        return any(
            bool(np.any(self.gone[compact(m).numpy()])) for m in leaves if isinstance(m, Tensor)
        )

    def _changed(self, node: fx.Node) -> bool:
        return node in self._numbers and self._numbers[node] != self.look.shapes.values[node]

    def refuse(self, *nodes: fx.Node) -> None:
        """Let all units stay that these tensors have, or those that numbers were asked of."""
        for node in nodes:
            for origin in self._origins.get(node, {node}):
                for leaf in pytree.tree_leaves(self.look.units.maps.get(origin)):
                    if isinstance(leaf, Tensor):
                        small = compact(leaf).numpy()
                        self.stuck.update(
                            np.atleast_1d(small)[np.atleast_1d(self.gone[small])].tolist()
                        )

    def _count(self, node: fx.Node) -> None:
        """Sizes, and what is computed from them."""
        for n in node.all_input_nodes:
            self._origins.setdefault(node, set()).update(self._origins.get(n, {n}))
        try:
            self._numbers[node] = self._called(node, node.args, node.kwargs, self._resized)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, Unsized):
            if any(map(self._touched, self._origins.get(node, ()))):
                self.refuse(node)

    def _called(self, node: fx.Node, args: Any, kwargs: Any, value: Callable[..., Any]) -> Any:
        args, kwargs = fx.map_arg((tuple(args), dict(kwargs)), value)
        return called(node, args, kwargs)

    def _resized(self, node: fx.Node) -> Any:
        """A stand-in for what `node` gives: numbers, or an empty tensor of the new sizes."""
        if node in self._numbers:
            return self._numbers[node]
        fake = self.look.shapes.values.get(node)
        if not is_tensor(fake):
            if node.op == "get_attr" or fake is None or isinstance(fake, tuple | list | dict):
                raise Unsized
            return fake
        known = self.look.values.of(node)
        if known is not None and not fake.is_floating_point():
            return known
        sizes = [int(places.sum()) for places in self.kept(node)]
        return torch.empty(sizes, dtype=fake.dtype, device="meta")

    def _move(self, node: fx.Node) -> None:
        source = argument(node, 0, "input")
        labels = self.look.units.maps.get(source)
        if not isinstance(labels, Tensor):
            if not isinstance(self.look.units.maps.get(source), tuple | list):
                self.refuse(node, *node.all_input_nodes)
            return None  # a member of what another call gave
        ids = torch.arange(labels.numel(), device="cpu").reshape(labels.shape)
        try:
            before = self._called(node, node.args, node.kwargs, self._with(source, ids, old=True))
            after = self._without(self.look.units.maps[node], before)
            rest = self._with(source, boxed(ids, self.kept(source)), old=False)
        except (RuntimeError, TypeError, ValueError, IndexError, Unsized):
            return self.refuse(node, *node.all_input_nodes)
        old = Call(node.op, node.target, node.args, node.kwargs)
        for call in (old, self._other(node)):
            if call is not None and self._fits(node, call, rest, after):
                if call is not old:
                    self.calls[node] = call
                return None
        return self.refuse(node, *node.all_input_nodes)

    def _with(self, source: fx.Node, ids: Tensor, *, old: bool) -> Callable[[fx.Node], Any]:
        def value(n: fx.Node) -> Any:
            if n is source:
                return ids
            fake = self.look.shapes.values.get(n)
            if not old:
                return self._resized(n)
            known = self.look.values.of(n)
            return known if is_tensor(fake) and known is not None else fake

        return value

    def _without(self, labels: Any, moved: Any) -> list[Tensor]:
        maps, leaves = pytree.tree_leaves(labels), pytree.tree_leaves(moved)
        return [boxed(leaf, self._kept(m)) for m, leaf in zip(maps, leaves, strict=True)]

    def _fits(self, node: fx.Node, call: Call, value: Any, wanted: Sequence[Tensor]) -> bool:
        """Whether `call` gives the elements that stay, in their places."""
        args, kwargs = fx.map_arg((call.args, dict(call.kwargs)), value)
        try:
            if call.target is node.target:
                out = called(node, args, kwargs)
            elif call.op == "call_method":
                out = getattr(args[0], str(call.target))(*args[1:], **kwargs)
            else:
                out = call.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        found = pytree.tree_leaves(out)
        return len(found) == len(wanted) and all(map(torch.equal, found, wanted))

    def _other(self, node: fx.Node) -> Call | None:
        """The call with the numbers that it needs now, where it is one that has such."""
        name = base_name(call_name(node))
        args: tuple[Any, ...] = node.args
        old = self.look.units.maps[node]
        if name in ("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "unflatten"):
            return self._shaped(node, name, old)
        if name in ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split"):
            axis = argument(node, 2, "dim", 0)
            sizes = [int(self._kept(m)[axis].sum()) for m in old] if isinstance(axis, int) else []
            target: Any = "split" if node.op == "call_method" else torch.split
            if isinstance(node.target, torch._ops.OpOverload):
                target = torch.ops.aten.split_with_sizes.default
            return Call(node.op, target, (args[0], sizes, axis), {})
        places = self.kept(argument(node, 0, "input"))
        if name == "getitem" and len(args) == 2:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return Call(node.op, node.target, (args[0], _indexed(index, places)), {})
        if name in ("narrow", "slice", "select") and len(args) > 2 and isinstance(args[1], int):
            line = places[args[1]]
            numbers = _ranked(args[2:4], line)
            if name == "narrow" and len(args) == 4 and isinstance(args[3], int):
                start, end = args[2], args[2] + args[3]
                numbers = [_rank(start, line), _rank(end, line) - _rank(start, line)]
            return Call(node.op, node.target, (*args[:2], *numbers, *args[4:]), node.kwargs)
        return None

    def _shaped(self, node: fx.Node, name: str, old: Any) -> Call | None:
        """With the new sizes in place of those that are written out."""
        new = [int(line.sum()) for line in self._kept(old)]
        args: tuple[Any, ...] = node.args
        first, start = 1, 0
        if name == "unflatten":
            if len(args) < 3 or not isinstance(args[1], int):
                return None
            first, start = 2, args[1] % len(self.look.units.maps[args[0]].shape)
        sizes = args[first:]
        packed = len(sizes) == 1 and isinstance(sizes[0], tuple | list)
        given = list(sizes[0] if packed else sizes)
        for axis, size in enumerate(given, start):
            if isinstance(size, int) and axis < len(new) and size == old.shape[axis]:
                given[axis - start] = new[axis]
        rest = (given,) if packed else tuple(given)
        return Call(node.op, node.target, (*args[:first], *rest), node.kwargs)


class Unsized(Exception):
    """No stand-in is known for a value."""


def boxed(values: Tensor, places: Kept) -> Tensor:
    """`values` without the places that go."""
    for axis, line in enumerate(places):
        if not bool(line.all()):
            values = values.index_select(axis, line.nonzero().reshape(-1))
    return values


def _rank(at: int, line: Tensor) -> int:
    """How many places before `at` stay."""
    at = max(at + len(line), 0) if at < 0 else at
    return int(line[:at].sum())


def _ranked(numbers: Sequence[Any], line: Tensor) -> list[Any]:
    return [_rank(n, line) if isinstance(n, int) else n for n in numbers]


def _indexed(index: Sequence[Any], places: Kept) -> Any:
    """An index with its numbers counted among the places that stay."""
    taken = sum(i is not None and i is not Ellipsis for i in index)
    axis = 0
    found: list[Any] = []
    for i in index:
        if i is None:
            found.append(i)
            continue
        if i is Ellipsis:
            axis += len(places) - taken
        elif isinstance(i, slice) and i.step in (None, 1):
            line = places[axis]
            found.append(slice(*_ranked((i.start, i.stop), line)))
            axis += 1
            continue
        elif isinstance(i, int):
            found.append(_rank(i, places[axis]))
            axis += 1
            continue
        else:
            axis += 1
        found.append(i)
    return tuple(found)
