"""Labels through an inference graph: one rule for each passage of the operator table.

The rules are those of a gauge x' = a (x + d). An operator without a rule, and one whose arguments
do not fit its rule, lets nothing through: its inputs and outputs are ground.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from bnfx.constraints import Bounds, Cause, Constraints, Demand, Kind, Site
from bnfx.evaluation import Values, reads_elements
from bnfx.labels import along, array, compact, concatenated, ground_map, rows_along, settled
from bnfx.linear_system import Ints
from bnfx.norms import affine_map_of, norm_call
from bnfx.operators import (
    BATCH_NORM,
    INSTANCE_NORM,
    Affine,
    Passage,
    affine_of,
    argument,
    arguments,
    base_name,
    function_name,
    passage_of,
)
from bnfx.shapes import UNKNOWN, Shapes, is_tensor
from bnfx.words import describe


class Opaque(Exception):
    """The rule of an operator does not fit this call."""


@dataclass(frozen=True)
class Options:
    """What may carry a gauge though it costs something.

    Attributes:
        thresholds: Bounds of ReLU, ReLU6, Hardtanh and clamp, one for each channel.
        border_maps: A constant map behind a convolution that pads zeros, for one input size.
    """

    thresholds: bool = False
    border_maps: bool = False


class Propagation:
    """Walks the graph once and writes its demands into `found`."""

    def __init__(
        self,
        graph: fx.Graph,
        shapes: Shapes,
        values: Values,
        found: Constraints,
        barred: frozenset[fx.Node],
        options: Options,
    ) -> None:
        self.graph = graph
        self.shapes = shapes
        self.values = values
        self.found = found
        self.barred = barred
        self.options = options
        self.maps: dict[fx.Node, Any] = {}
        self.data: set[fx.Node] = set()

    def run(self) -> None:
        """Visit every node in order."""
        for node in self.graph.nodes:
            if node.op == "placeholder" or any(
                n in self.data and reads_elements(node, n) for n in node.all_input_nodes
            ):
                self.data.add(node)
            if node.op in ("placeholder", "get_attr"):
                self.maps[node] = self._grounded(node)
            elif node.op == "output":
                self._ground_inputs(node, "graph output")
            else:
                self.maps[node] = self._visit(node)
            if node in self.barred:
                self._bar(node)

    def _visit(self, node: fx.Node) -> Any:
        if self.values.is_constant(node) or node not in self.data:
            return self._grounded(node)
        before = len(self.found.batches)
        try:
            return self._rule(node)(node)
        except Opaque:
            del self.found.batches[before:]
            if node in self.found.sites:  # it had gauges at another input size
                for labels in (self.found.sites[node].x, self.found.sites[node].y):
                    self.found.ground(labels, Cause(node, describe(node)))
            self._ground_inputs(node, describe(node))
            return self._grounded(node)

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], Any]:
        if affine_of(node, {}) is not None:
            return self._affine
        if node.target in BATCH_NORM or node.target in INSTANCE_NORM:
            return self._batch_norm
        if node.target is getattr:
            return self._shape if node.args[1] not in ("T", "mT") else self._transposed
        passage = passage_of(node)
        if passage is None:
            raise Opaque
        if passage is not Passage.SHAPE and any(
            self.shapes.values.get(n) is UNKNOWN for n in node.all_input_nodes
        ):
            raise Opaque
        rule = _RULES.get(passage)
        if rule is None:
            raise Opaque
        return functools.partial(rule, self)

    # -- helpers -------------------------------------------------------------------------------

    def _shape_of(self, node: fx.Node) -> tuple[int, ...]:
        value = self.shapes.values.get(node)
        if not is_tensor(value):
            raise Opaque
        return tuple(int(n) for n in value.shape)

    def _grounded(self, node: fx.Node) -> Any:
        value = self.shapes.values.get(node)
        if is_tensor(value):
            return ground_map([int(n) for n in value.shape])
        if isinstance(value, tuple | list | dict):
            return pytree.tree_map(lambda v: ground_map(v.shape) if is_tensor(v) else None, value)
        return None

    def _map(self, value: object) -> Tensor:
        """The labels of a floating-point tensor."""
        if not isinstance(value, fx.Node):
            raise Opaque
        labels, fake = self.maps.get(value), self.shapes.values.get(value)
        if not isinstance(labels, Tensor) or not is_tensor(fake) or not fake.is_floating_point():
            raise Opaque
        return labels

    def _ground_inputs(self, node: fx.Node, words: str) -> None:
        for value in node.all_input_nodes:
            for leaf in pytree.tree_leaves(self.maps.get(value)):
                if isinstance(leaf, Tensor):
                    self.found.ground(array(leaf), Cause(node, words))

    def _bar(self, node: fx.Node) -> None:
        for leaf in pytree.tree_leaves(self.maps.get(node)):
            if isinstance(leaf, Tensor):
                cause = Cause(node, "values that are written in place while others read them")
                self.found.ground(array(leaf), cause)

    def _channels(self, labels: Tensor, axis: int, cause: Cause) -> Ints:
        """One label for each channel; the others of a channel are made equal to it."""
        return self._rows(labels, [axis], cause)

    def _rows(self, labels: Tensor, axes: Sequence[int], cause: Cause) -> Ints:
        rows = rows_along(labels, axes)
        first = np.ascontiguousarray(rows[:, 0])
        if rows.shape[1] > 1:
            differ = rows != first[:, None]
            pairs = np.unique(
                np.stack([np.broadcast_to(first[:, None], rows.shape)[differ], rows[differ]]),
                axis=1,
            )
            self.found.demand(Demand.SAME, pairs[0], pairs[1], cause=cause)
        return first

    def _unshifted(self, labels: Ints, cause: Cause, *, soft: bool = False) -> None:
        used = np.unique(labels)
        self.found.demand(Demand.UNSHIFTED, used[used > 0], cause=cause, soft=soft)

    def _positive(self, labels: Ints, cause: Cause, *, soft: bool = False) -> None:
        used = np.unique(labels)
        self.found.demand(Demand.POSITIVE, used[used > 0], cause=cause, soft=soft)

    # -- layers --------------------------------------------------------------------------------

    def _affine(self, node: fx.Node) -> Tensor:
        row = affine_of(node, {})
        assert row is not None
        call = arguments(node, row.signature)
        weight, bias = self.values.of(call["weight"]), self.values.of(call["bias"])
        unknown = weight is None or (call["bias"] is not None and bias is None)
        if unknown or weight is None or not weight.is_floating_point():
            raise Opaque
        shape = self._shape_of(node)
        groups = int(call["groups"])
        size: tuple[int, ...] = ()
        outputs = weight.shape[1] * groups if row.transposed else weight.shape[0]
        inputs = weight.shape[0] if row.transposed else weight.shape[1] * groups
        axis = len(shape) - 1 - (row.spatial or 0)
        source = self.maps.get(call["input"])
        if not isinstance(source, Tensor):
            x = np.zeros(inputs, np.int64)
        else:
            cause = Cause(node, f"{describe(node)}, whose weights take one gauge for each channel")
            x = self._channels(self._map(call["input"]), axis, cause)
        if len(x) != inputs or shape[axis] != outputs:
            raise Opaque
        if pads_with_zeros(row, call, weight):
            soft = self.options.border_maps and not row.transposed and isinstance(source, Tensor)
            self._unshifted(x, Cause(node, f"the zero padding of {describe(node)}"), soft=soft)
            if soft and isinstance(source, Tensor):
                size = tuple(int(n) for n in source.shape[axis + 1 :])
        y = self.found.fresh(node, "y", outputs)
        self.found.absorbers.append(y)
        self.found.readers[node, 0] = np.unique(x)
        self.found.site(Site(node, Kind.AFFINE, x, y, source=call["input"], like=weight, size=size))
        return along(y, axis, shape)

    def _batch_norm(self, node: fx.Node) -> Tensor:
        affine = affine_map_of(node, self.values)
        shape = self._shape_of(node)
        if isinstance(affine, str) or len(shape) < 2 or shape[1] != len(affine.s):
            raise Opaque
        source = argument(node, 0, "input")
        cause = Cause(node, f"{describe(node)}, which takes one gauge for each channel of axis 1")
        if isinstance(self.maps.get(source), Tensor):
            x = self._channels(self._map(source), 1, cause)
        else:
            x = np.zeros(len(affine.s), np.int64)
        if len(x) != len(affine.s):
            raise Opaque
        y = self.found.fresh(node, "y", len(affine.s))
        self.found.readers[node, 0] = np.unique(x)
        self.found.site(
            Site(
                *(node, Kind.BATCH_NORM, x, y, affine.s, affine.t),
                mean=affine.mean,
                std=affine.std,
                source=source,
                like=self.values.of(norm_call(node)["running_mean"]),
            )
        )
        return along(y, 1, shape)

    def _norm(self, node: fx.Node) -> Tensor:
        weight, bias = self.values.of(argument(node, 2, "weight")), argument(node, 3, "bias")
        if weight is None or (bias is not None and self.values.of(bias) is None):
            raise Opaque
        self._ground_inputs(node, describe(node))
        shape = self._shape_of(node)
        y = self.found.fresh(node, "y", weight.numel())
        self.found.absorbers.append(y)
        self.found.site(Site(node, Kind.NORM, np.zeros_like(y), y, like=weight))
        if base_name(function_name(node.target)) == "group_norm":
            return along(y, 1, shape)
        return torch.from_numpy(y).reshape(weight.shape).expand(shape)

    # -- elementwise ---------------------------------------------------------------------------

    def _identity(self, node: fx.Node) -> Tensor:
        labels = self._map(node.args[0] if node.args else argument(node, 0, "input"))
        value = self.shapes.values.get(node)
        name = base_name(function_name(node.target))
        random = "dropout" in name and argument(
            node, 2, "train" if isinstance(node.target, torch._ops.OpOverload) else "training", True
        )
        if random or not is_tensor(value) or not value.is_floating_point():
            raise Opaque
        source = self.shapes.values[node.all_input_nodes[0]]
        if value.shape != source.shape or value.dtype != source.dtype or _casts(node):
            raise Opaque
        return labels

    def _rectifier(self, node: fx.Node) -> Tensor:
        labels = self._map(argument(node, 0, "input"))
        for other in node.all_input_nodes[1:]:
            self.found.ground(array(self._map(other)), Cause(node, describe(node)))
        name = str(node.target) if node.op == "call_method" else function_name(node.target)
        soft = self.options.thresholds and base_name(name) == "relu"
        if soft:
            self._bounded(node, labels, 0.0, np.inf)
        self._positive(array(labels), Cause(node, describe(node)), soft=soft)
        self._unshifted(array(labels), Cause(node, describe(node)), soft=soft)
        return labels

    def _bounded(self, node: fx.Node, labels: Tensor, lower: float, upper: float) -> None:
        like = self.shapes.values[node]
        self.found.bounds.setdefault(node, Bounds(compact(labels).contiguous(), lower, upper, like))

    def _clamp(self, node: fx.Node) -> Tensor:
        if not self.options.thresholds:
            raise Opaque
        labels, bounds = self._map(argument(node, 0, "input")), _bounds_of(node)
        if bounds is None:
            raise Opaque
        self._bounded(node, labels, *bounds)
        used, cause = np.unique(array(labels)), Cause(node, describe(node))
        zero = np.zeros_like(used)
        self.found.demand(Demand.SAME_SCALE, used, zero, cause=cause, soft=True)
        self._unshifted(used, cause, soft=True)
        return labels

    def _extremum(self, node: fx.Node) -> Tensor:
        first, second, shape = self._pair(node)
        cause = Cause(node, describe(node))
        self.found.demand(Demand.SAME, first, second, cause=cause)
        self._positive(first, cause)
        return torch.from_numpy(first).reshape(shape).expand(self._shape_of(node))

    def _pair(self, node: fx.Node) -> tuple[Ints, Ints, tuple[int, ...]]:
        shape = self._shape_of(node)
        small = []
        for value in (argument(node, 0, "input"), argument(node, 1, "other")):
            known = self.values.of(value)
            if isinstance(value, int | float) or known is not None:
                small.append(ground_map([1] * len(shape)))
            else:
                small.append(compact(self._map(value).expand(shape)))
        first, second = torch.broadcast_tensors(*small)
        return (
            np.ascontiguousarray(first.reshape(-1).numpy()),
            np.ascontiguousarray(second.reshape(-1).numpy()),
            tuple(first.shape),
        )

    def _sum_of_two(self, node: fx.Node) -> Tensor:
        sign = -1.0 if passage_of(node) is Passage.SUBTRACT else 1.0
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            raise Opaque
        known = self.values.operand(b)
        if known is not None:
            return self._shift(node, a, sign * known)
        known = self.values.operand(a)
        if known is not None and sign > 0:
            return self._shift(node, b, known)
        return self._combined(node, Demand.SUM, sign)

    def _product(self, node: fx.Node) -> Tensor:
        divides = passage_of(node) is Passage.DIVIDE
        if node.kwargs.get("rounding_mode") is not None:
            raise Opaque
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        known = self.values.operand(b)
        if known is not None:
            if divides and not bool((known != 0).all()):
                raise Opaque
            return self._scale(node, a, known.reciprocal() if divides else known)
        known = self.values.operand(a)
        if known is not None and not divides:
            return self._scale(node, b, known)
        return self._combined(node, Demand.GATE, -1.0 if divides else 1.0)

    def _combined(self, node: fx.Node, demand: Demand, factor: float) -> Tensor:
        """A sum or a product of two tensors that are both computed."""
        first, second, small = self._pair(node)
        cause = Cause(node, describe(node))
        keys, where = np.unique(np.stack([first, second]), axis=1, return_inverse=True)
        one, two = keys
        y = np.zeros(len(one), np.int64)
        used = (one > 0) | (two > 0)
        y[used] = self.found.fresh(node, "y", int(used.sum()))
        one, two, out = one[used], two[used], y[used]
        if demand is Demand.SUM:
            self.found.demand(Demand.SAME_SCALE, out, one, cause=cause)
            self.found.demand(Demand.SAME_SCALE, out, two, cause=cause)
            self.found.demand(demand, out, one, two, factors=(1.0, factor), cause=cause)
        else:
            self.found.demand(demand, out, one, two, factors=(factor,), cause=cause)
            for labels in (out, one, two):
                self._unshifted(labels, cause)
        self.found.readers[node, 0] = np.unique(one)
        self.found.readers[node, 1] = np.unique(two)
        return torch.from_numpy(y[where.reshape(-1)]).reshape(small).expand(self._shape_of(node))

    def _constant_site(self, node: fx.Node, value: object, k: Tensor) -> tuple[Site, Tensor, bool]:
        """The labels of a call with a constant; whether it is equal where labels are."""
        shape = self._shape_of(node)
        labels = compact(self._map(value).expand(shape))
        keys, where = np.unique(labels.reshape(-1).numpy(), return_inverse=True)
        y = self.found.fresh(node, "y", len(keys))
        out = torch.from_numpy(y[where.reshape(-1)]).reshape(labels.shape)
        if k.dim() > len(shape):
            raise Opaque
        spread, wide = torch.broadcast_tensors(
            torch.from_numpy(where.reshape(-1)).reshape(labels.shape), k
        )
        flat, numbers = spread.reshape(-1).numpy(), wide.reshape(-1).double().numpy()
        first = np.zeros(len(keys))
        first[flat[::-1]] = numbers[::-1]
        uniform = bool(np.array_equal(first[flat], numbers))
        kind = Kind.SHIFT if passage_of(node) in (Passage.ADD, Passage.SUBTRACT) else Kind.SCALE
        one = np.ones_like(first)
        s, t = (one, first) if kind is Kind.SHIFT else (first, np.zeros_like(first))
        if not uniform:
            s = t = np.zeros(0)
        index = torch.from_numpy(where.reshape(-1)).reshape(labels.shape)
        operand = "other" if value is argument(node, 0, "input") else "input"
        site = Site(
            *(node, kind, keys, y, s, t),
            source=value if isinstance(value, fx.Node) else None,
            operand=operand,
            like=self.shapes.values[node],
            where=index,
            constant=k,
        )
        self.found.readers[node, 0] = keys
        self.found.site(site)
        return site, out.expand(shape), uniform

    def _shift(self, node: fx.Node, value: object, k: Tensor) -> Tensor:
        site, out, _ = self._constant_site(node, value, k)
        cause = Cause(node, describe(node))
        self.found.demand(Demand.SAME_SCALE, site.x, site.y, cause=cause)
        self.found.absorbers.append(site.y)
        return out

    def _scale(self, node: fx.Node, value: object, k: Tensor) -> Tensor:
        site, out, uniform = self._constant_site(node, value, k)
        cause = Cause(node, describe(node))
        if uniform:
            zero = np.zeros_like(site.x)
            self.found.demand(Demand.SUM, site.y, site.x, zero, factors=(site.s, 0.0), cause=cause)
        else:
            self._unshifted(site.x, cause)
            self._unshifted(site.y, cause)
        return out

    # -- over axes -----------------------------------------------------------------------------

    def _pool(self, node: fx.Node) -> Any:
        value = argument(node, 0, "input")
        labels, name = self._map(value), base_name(function_name(node.target))
        spatial = int(next(c for c in name if c.isdigit()))
        axis = labels.dim() - 1 - spatial
        cause = Cause(node, describe(node))
        channels = self._channels(labels, axis, cause)
        if passage_of(node) is Passage.MAX_POOL:
            self._positive(channels, cause)
        elif not name.startswith("adaptive") and _counts_padding(node):
            self._unshifted(channels, Cause(node, f"the counted zero padding of {describe(node)}"))
        out = self.shapes.values[node]
        if isinstance(out, tuple | list):
            return (along(channels, axis, out[0].shape), ground_map(out[1].shape))
        return along(channels, axis, self._shape_of(node))

    def _interpolate(self, node: fx.Node) -> Tensor:
        labels = self._map(argument(node, 0, "input"))
        channels = self._channels(labels, 1, Cause(node, describe(node)))
        return along(channels, 1, self._shape_of(node))

    def _reduction(self, node: fx.Node) -> Tensor:
        labels = self._map(argument(node, 0, "input"))
        dims = argument(node, 1, "dim")
        if dims is None or dims == () or dims == [] or isinstance(dims, fx.Node):
            dims = tuple(range(labels.dim()))
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        if not all(isinstance(d, int) for d in dims) or not labels.dim():
            raise Opaque
        reduced = {d % labels.dim() for d in dims}
        cause = Cause(node, describe(node))
        kept = [axis for axis in range(labels.dim()) if axis not in reduced]
        small = compact(labels)
        kept_shape = [small.shape[axis] for axis in kept]
        rows = self._rows(small, kept, cause)
        if passage_of(node) is Passage.SUM:
            self._unshifted(rows, Cause(node, f"the sum {describe(node)}"))
        shape = self._shape_of(node)
        view = (
            [small.shape[axis] if axis in kept else 1 for axis in range(labels.dim())]
            if len(shape) == labels.dim()
            else kept_shape
        )
        return torch.from_numpy(rows).reshape(view).expand(shape)

    def _pad(self, node: fx.Node) -> Tensor:
        labels = self._map(argument(node, 0, "input"))
        widths, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
        fill = argument(node, 3, "value")
        if isinstance(node.target, torch._ops.OpOverload):
            mode, fill = ("constant", mode) if function_name(node.target) != "pad" else (mode, fill)
            fill = None if fill == "constant" else fill
        if not isinstance(widths, tuple | list) or not all(isinstance(w, int) for w in widths):
            raise Opaque
        axes = [labels.dim() - 1 - i // 2 for i, w in enumerate(widths) if w]
        small, shape = compact(settled(labels)), self._shape_of(node)
        if any(small.shape[axis] > 1 for axis in axes):
            if mode != "constant" or fill not in (None, 0):
                raise Opaque
            return self._pad_channels(node, labels, list(widths))
        if mode == "constant":
            if fill not in (None, 0):
                raise Opaque
            self._unshifted(array(small), Cause(node, f"the zeros of {describe(node)}"))
        return small.expand([shape[i] if n == 1 else n for i, n in enumerate(small.shape)])

    def _pad_channels(self, node: fx.Node, labels: Tensor, widths: list[int]) -> Tensor:
        """Zeros beside channels have gauges of their own."""
        padded = torch.nn.functional.pad(labels.double(), widths, value=-1.0).long()
        new = padded < 0
        small = compact(settled(torch.where(new, torch.full_like(padded, -1), padded)))
        holes = small < 0
        y = self.found.fresh(node, "y", int(holes.sum()))
        self._unshifted(y, Cause(node, f"the zeros of {describe(node)}"))
        self._unshifted(array(labels), Cause(node, f"the zeros of {describe(node)}"))
        filled = small.clone()
        filled[holes] = torch.from_numpy(y)
        return filled.expand(self._shape_of(node))

    # -- moves ---------------------------------------------------------------------------------

    def _move(self, node: fx.Node) -> Any:
        def value(n: fx.Node) -> Any:
            labels, fake = self.maps.get(n), self.shapes.values.get(n)
            if is_tensor(fake) and not fake.is_floating_point():
                known = self.values.of(n)
                if known is None:
                    raise Opaque
                return known
            if labels is not None:
                return labels
            return fake

        first = argument(node, 0, "input")
        if isinstance(first, fx.Node) and isinstance(self.maps.get(first), Tensor):
            self._map(first)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
        try:
            moved = _moved(node, args, kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError) as error:
            raise Opaque from error
        if any(isinstance(m, FakeTensor) for m in pytree.tree_leaves(moved)):
            raise Opaque  # a member of an input's container, which has no labels
        return pytree.tree_map(lambda m: settled(m) if isinstance(m, Tensor) else m, moved)

    def _transposed(self, node: fx.Node) -> Tensor:
        labels = self._map(node.args[0])
        return labels.T if node.args[1] == "T" else labels.mT

    def _concatenate(self, node: fx.Node) -> Tensor:
        axis = argument(node, 1, "dim", 0)
        parts = argument(node, 0, "tensors")
        if not isinstance(axis, int) or not isinstance(parts, tuple | list):
            raise Opaque
        shape = self._shape_of(node)
        maps = [self._map(part) for part in parts]
        return concatenated([m for m in maps if m.dim() == len(shape)], axis)

    def _stack(self, node: fx.Node) -> Tensor:
        axis = argument(node, 1, "dim", 0)
        parts = argument(node, 0, "tensors")
        if not isinstance(axis, int) or not isinstance(parts, tuple | list):
            raise Opaque
        maps = [self._map(part) for part in parts]
        if len({m.shape for m in maps}) > 1:  # of assumed ranks: torch takes equal shapes only
            raise Opaque
        return concatenated([m.unsqueeze(axis) for m in maps], axis)

    def _shape(self, node: fx.Node) -> Any:
        return self._grounded(node)

    # -- contractions --------------------------------------------------------------------------

    def _matmul(self, node: fx.Node) -> Tensor:
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        if isinstance(node.target, torch._ops.OpOverload):
            right = argument(node, 1, "mat2" if "bmm" in str(node.target) else "other")
        weights, values = self._map(left), self._map(right)
        if values.dim() < 2 or weights.dim() < 2 or self.values.of(right) is not None:
            raise Opaque
        cause = Cause(node, describe(node))
        self.found.ground(array(weights), cause)
        return self._contracted(node, values, cause, sums_to_one=self._rows_sum_to_one(left))

    def _attention(self, node: fx.Node) -> Tensor:
        parts = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
        mask, rate = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
        cause = Cause(node, describe(node))
        for part in (*parts[:2], mask):
            if isinstance(part, fx.Node):
                self.found.ground(array(self.maps[part]), cause)
        if rate != 0.0:
            raise Opaque
        values = self._map(parts[2])
        # a row that is masked throughout sums to zero
        return self._contracted(node, values, cause, sums_to_one=mask is None)

    def _contracted(
        self, node: fx.Node, values: Tensor, cause: Cause, *, sums_to_one: bool
    ) -> Tensor:
        small = compact(values)
        kept = [axis for axis in range(values.dim()) if axis != values.dim() - 2]
        rows = self._rows(small, kept, cause)
        if not sums_to_one:
            self._unshifted(rows, cause)
        shape = self._shape_of(node)
        view = [n if axis in kept else 1 for axis, n in enumerate(small.shape)]
        return torch.from_numpy(rows).reshape(view).expand(shape)

    def _rows_sum_to_one(self, value: object) -> bool:
        while isinstance(value, fx.Node) and passage_of(value) is Passage.IDENTITY:
            value = argument(value, 0, "input")
        if not isinstance(value, fx.Node) or passage_of(value) is not Passage.SOFTMAX:
            return False
        axis = argument(value, 1, "dim")
        return axis in (-1, len(self._shape_of(value)) - 1)


_RULES: dict[Passage, Callable[[Propagation, fx.Node], Any]] = {
    Passage.MOVE: Propagation._move,
    Passage.IDENTITY: Propagation._identity,
    Passage.SHAPE: Propagation._shape,
    Passage.RECTIFIER: Propagation._rectifier,
    Passage.MAX_POOL: Propagation._pool,
    Passage.AVERAGE_POOL: Propagation._pool,
    Passage.INTERPOLATE: Propagation._interpolate,
    Passage.MEAN: Propagation._reduction,
    Passage.SUM: Propagation._reduction,
    Passage.PAD: Propagation._pad,
    Passage.CONCAT: Propagation._concatenate,
    Passage.STACK: Propagation._stack,
    Passage.ADD: Propagation._sum_of_two,
    Passage.SUBTRACT: Propagation._sum_of_two,
    Passage.MULTIPLY: Propagation._product,
    Passage.DIVIDE: Propagation._product,
    Passage.MATMUL: Propagation._matmul,
    Passage.ATTENTION: Propagation._attention,
    Passage.EXTREMUM: Propagation._extremum,
    Passage.NORM: Propagation._norm,
    Passage.CLAMP: Propagation._clamp,
}


def _moved(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = base_name(str(node.target) if node.op == "call_method" else function_name(node.target))
    if name in ("view", "_unsafe_view"):  # maps are not contiguous, the tensors they stand for are
        return args[0].reshape(*args[1:], **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a function


def _bounds_of(node: fx.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a clamp; None where they are computed."""
    name = base_name(str(node.target) if node.op == "call_method" else function_name(node.target))
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
    return (-np.inf if lower is None else lower, np.inf if upper is None else upper)


def _casts(node: fx.Node) -> bool:
    """Whether the call names a dtype: rounding to it would come out otherwise under a gauge.

    In a copy of the model at another dtype it may round, and both copies must fold alike.
    """
    named = [*node.args, *node.kwargs.values()]
    return function_name(node.target) in ("float", "half", "bfloat16", "double") or any(
        isinstance(value, torch.dtype) for value in named
    )


def pads_with_zeros(row: Affine, call: dict[str, Any], weight: Tensor) -> bool:
    """Whether the layer maps a constant image to something that is not constant."""
    if row.spatial is None:
        return False
    kernel = weight.shape[2:]
    if row.transposed:
        return any(k != 1 for k in kernel) or not (
            _all(call["stride"], 1) and _all(call["padding"], 0) and _all(call["output_padding"], 0)
        )
    padding = call["padding"]
    if padding == "valid":
        return False
    if padding == "same":
        return any(k != 1 for k in kernel)
    return not _all(padding, 0)


def _all(value: Any, wanted: int) -> bool:
    return all(v == wanted for v in (value if isinstance(value, tuple | list) else (value,)))


def _counts_padding(node: fx.Node) -> bool:
    padding = argument(node, 3, "padding", 0)
    counted = argument(node, 5, "count_include_pad", True)
    return (not _all(padding, 0) and counted is not False) or argument(
        node, 6, "divisor_override"
    ) is not None
