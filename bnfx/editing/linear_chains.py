"""Linear maps behind each other in an inference graph, read backward from a value.

A step is a convolution or linear layer, a BatchNorm or another map of each channel, an average
pool that counts its padding, zero padding, or a sum of such chains of one tensor. A chain is the
steps from a tensor to the value: as long as only the next step reads what is between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from bnfx.editing.inference_draft import InferenceDraft
from bnfx.editing.sums import alone, does_nothing, is_inner, is_sum, operands_of, sums_in
from bnfx.graphs.norms import affine_map_of, is_norm
from bnfx.graphs.shapes import is_tensor
from bnfx.onnx_files.node_call import ORIGIN, PART, VALUE
from bnfx.operators.calls import argument, base_name, call_name
from bnfx.operators.convolution import Branch, followed, laid
from bnfx.operators.geometry import Geometry, numbers
from bnfx.operators.products import Product, products
from bnfx.operators.table import (
    Passage,
    affine_of,
    layer_call,
    passage_of,
    product_of,
)

#: A chain of more steps is cut: what is before it is merged in another round.
_LONGEST = 8
_OF_TWO = (Passage.MULTIPLY, Passage.DIVIDE, Passage.ADD, Passage.SUBTRACT)


@dataclass(frozen=True, eq=False)
class Chain:
    """A value as one linear map of `source`."""

    source: fx.Node
    geometry: Geometry
    #: The calls that compute it, the last one first.
    nodes: tuple[fx.Node, ...]
    #: Its weight and bias, float64.
    build: Callable[[], Branch]
    #: Parameters and buffers that go in.
    names: tuple[str, ...] = ()

    #: How many of its calls are more than a map of each channel.
    steps: int = 0

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """The convolutions and linear layers in it."""
        return tuple(n for n in self.nodes if affine_of(n) is not None or product_of(n) is not None)

    def then(self, node: fx.Node, step: Step) -> Chain | None:
        """The chain with a step more; None where that is no convolution."""
        geometry = self.geometry.then(step.geometry)
        if geometry is None:
            return None
        return replace(
            self,
            geometry=geometry,
            nodes=(node, *self.nodes),
            build=partial(_behind, self.build, step.build, geometry),
            names=(*self.names, *step.names),
            steps=self.steps + step.counts,
        )

    def beside(self, other: Chain) -> Chain | None:
        """The sum of two chains of one source; None where that is no convolution."""
        geometry = self.geometry.beside(other.geometry)
        if geometry is None:
            return None
        return replace(
            self,
            geometry=geometry,
            nodes=tuple(dict.fromkeys((*self.nodes, *other.nodes))),
            build=partial(_sum_of, self.build, other.build, geometry),
            names=(*self.names, *other.names),
            steps=self.steps + other.steps + 1,
        )


@dataclass(frozen=True)
class Step:
    """The map of one call."""

    input: fx.Node
    geometry: Geometry
    build: Callable[[], Branch]
    names: tuple[str, ...] = ()
    #: Whether it is more than a map of each channel.
    counts: bool = True


class Chains:
    """The chains of a graph's values, in images of `spatial` axes; of none: in rows of channels."""

    def __init__(
        self,
        draft: InferenceDraft,
        spatial: int,
        *,
        sums: bool,
        barred: frozenset[fx.Node] | None = None,
    ) -> None:
        """`sums`: whether chains beside each other are one; `barred`: other nodes that stay."""
        self.shapes, self.values = draft.shapes, draft.values
        self.barred = draft.barred if barred is None else barred
        self.graph, self.spatial, self.sums = draft.graph, spatial, sums
        self._known: dict[fx.Node, list[Chain]] = {}
        self._steps: dict[fx.Node, Step | None] = {}

    def of(self, value: fx.Node) -> list[Chain]:
        """All chains to `value`, the shortest first: that of no step is the identity."""
        if not self._known:  # one after the other: recursion would go as deep as the network
            for node in self.graph.nodes:
                self._known[node] = list(self._found(node))
        return self._known[value]

    def _found(self, value: fx.Node) -> Iterator[Chain]:
        identity = self._identity(value)
        if identity is None or value in self.barred:  # it may be another one where it is read later
            return
        yield identity
        if not self.values.is_constant(value):
            yield from self._longer(value)

    def before(self, value: fx.Node) -> list[Chain]:
        """Chains to what a step reads: if another one reads it too, that of no step alone."""
        found = self._known[value]
        return found if alone(value) else found[:1]

    def is_value(self, node: fx.Node) -> bool:
        """Whether a file that the graph was read from has this value, if it was read from one."""
        return VALUE in node.meta or not {PART, ORIGIN} & node.meta.keys()

    def shape(self, value: object) -> tuple[int, ...] | None:
        """The shape of a floating-point tensor."""
        fake = self.shapes.values.get(value) if isinstance(value, fx.Node) else None
        if not is_tensor(fake) or not fake.is_floating_point():
            return None
        return tuple(int(n) for n in fake.shape)

    def per_channel(self, value: object, shape: Sequence[int]) -> Tensor | None:
        """(channels,): a constant that is broadcast to a tensor of that shape by its channels."""
        known = self.values.operand(value)
        if known is None or known.is_meta or known.dim() > len(shape):
            return None
        axis = 1 if self.spatial else len(shape) - 1
        sizes = [1] * (len(shape) - known.dim()) + list(known.shape)
        if any(n != 1 for at, n in enumerate(sizes) if at != axis):
            return None
        return known.reshape(-1).expand(shape[axis]) if sizes[axis] in (1, shape[axis]) else None

    def _longer(self, value: fx.Node) -> Iterator[Chain]:
        if is_sum(value) and self.sums and not is_inner(value):
            yield from self._sum(value)
        step = self.step(value)
        if step is None:
            return
        for chain in self.before(step.input) or self._unseen(step):
            longer = chain.then(value, step)
            if longer is not None and len(longer.nodes) <= _LONGEST:
                yield longer

    def _unseen(self, step: Step) -> list[Chain]:
        """No step at all, from an input of which only the layer that reads it tells anything."""
        seen = is_tensor(self.shapes.values.get(step.input)) or step.input in self.barred
        if seen or step.input.op != "placeholder":
            return []
        geometry = Geometry.window(step.geometry.inputs, (1,) * self.spatial)
        return [Chain(step.input, geometry, (), partial(_windows, geometry, 1.0))]

    def _sum(self, value: fx.Node) -> Iterator[Chain]:
        """The sum, where all of its operands are chains of one tensor."""
        operands, shape = list(operands_of(value)), self.shape(value)
        if any(self.shape(node) != shape or self.values.is_constant(node) for node in operands):  # type: ignore[arg-type]
            return
        if not self.barred.isdisjoint(sums_in(value)):
            return
        found = [{c.source: c for c in self.before(node)} for node in operands]  # type: ignore[arg-type]
        for source, first in found[0].items():
            whole: Chain | None = first
            for chains in found[1:]:
                other = chains.get(source)
                whole = whole.beside(other) if whole and other else None
            if whole is not None and whole.nodes:
                yield replace(whole, nodes=(*sums_in(value), *whole.nodes))

    def _identity(self, value: fx.Node) -> Chain | None:
        shape = self.shape(value) if self.is_value(value) else None
        if any(user.op == "call_module" for user in value.users):  # what is kept whole may write
            return None
        if shape is None or len(shape) < 2 or (self.spatial and len(shape) != self.spatial + 2):
            return None
        geometry = Geometry.window(shape[1 if self.spatial else -1], (1,) * self.spatial)
        return Chain(value, geometry, (), partial(_windows, geometry, 1.0))

    def step(self, value: fx.Node) -> Step | None:
        """The map of one call; None where it is none, or not of these axes."""
        if value not in self._steps:
            self._steps[value] = self._step(value)
        return self._steps[value]

    def _step(self, value: fx.Node) -> Step | None:
        if affine_of(value) is not None:
            return self._layer(value)
        if product_of(value) is not None:
            return self._product(value)
        if is_norm(value):
            return self._norm(value)
        passage = passage_of(value)
        source = argument(value, 0, "input")
        if passage is Passage.AVERAGE_POOL:
            return self._pool(value)
        if passage is Passage.PAD:
            return self._padding(value)
        if passage in _OF_TWO:
            return self._of_two(value)
        if passage is Passage.NEGATE:
            return self._pointwise(value, source, factor=-1)
        if passage is Passage.IDENTITY and does_nothing(value):
            return self._pointwise(value, source)
        return None

    def _layer(self, value: fx.Node) -> Step | None:
        """A layer whose weight and bias are constant."""
        row, call = affine_of(value), layer_call(value)
        weight, bias = self.values.of(call["weight"]), self.values.of(call["bias"])
        if row is None or row.transposed or (row.spatial or 0) != self.spatial:
            return None
        if weight is None or (bias is None and call["bias"] is not None) or weight.is_meta:
            return None
        if weight.dim() != 2 + self.spatial or (
            bias is not None and bias.shape != weight.shape[:1]
        ):
            return None
        shifted = bias is not None and bool(bias.any())
        geometry = Geometry.of_layer(row, call, weight, shifted=shifted)
        if geometry is None:
            return None
        names = self.values.sources(call["weight"]) + self.values.sources(call["bias"])
        return Step(call["input"], geometry, partial(Branch.of, geometry, weight, bias), names)

    def _product(self, value: fx.Node) -> Step | None:
        """A product with a matrix, which is a linear layer."""
        for product in products(value) if not self.spatial else ():
            weight, bias = self.values.of(product.weight), self.values.of(product.bias)
            if weight is None or weight.is_meta or weight.dim() != 2 or not weight.numel():
                continue
            if product.x_axes != (-1,) or product.y_axes != (-1,):
                continue
            outputs, inputs = product.rows(weight)[0].shape
            if product.bias is not None and (bias is None or bias.shape != (outputs,)):
                continue
            shifted = bias is not None and bool(bias.any())
            geometry = Geometry.rows(outputs, inputs, shifted=shifted)
            names = self.values.sources(product.weight) + self.values.sources(product.bias)
            build = partial(_rows, geometry, product, weight, bias)
            return Step(product.input, geometry, build, names)
        return None

    def _norm(self, value: fx.Node) -> Step | None:
        affine, shape = affine_map_of(value, self.values), self.shape(value)
        if isinstance(affine, str) or shape is None or (not self.spatial and len(shape) != 2):
            return None
        s, t = torch.from_numpy(affine.s), torch.from_numpy(affine.t)
        names = (name for n in value.all_input_nodes for name in self.values.sources(n))
        return self._pointwise(value, argument(value, 0, "input"), s, t, tuple(names))

    def _of_two(self, value: fx.Node) -> Step | None:
        """A sum or product with a constant for each channel."""
        a, b = argument(value, 0, "input"), argument(value, 1, "other")
        shape, passage = self.shape(value), passage_of(value)
        if shape is None or len(value.args) + len(value.kwargs) != 2:
            return None
        left = self.per_channel(a, shape)
        constant = left if left is not None else self.per_channel(b, shape)
        source, other = (b, a) if left is not None else (a, b)
        if constant is None or not isinstance(source, fx.Node):
            return None
        names = self.values.sources(other)
        if passage is Passage.MULTIPLY:
            return self._pointwise(value, source, constant, names=names)
        if passage is Passage.DIVIDE:
            if left is not None or not bool(constant.all()):
                return None
            return self._pointwise(value, source, 1 / constant, names=names)
        first, second = (1, 1) if passage is Passage.ADD else (1, -1)
        if _kind(value) == "rsub":
            first, second = second, first
        mine, own = (first, second) if left is not None else (second, first)
        factor = own * torch.ones_like(constant)
        return self._pointwise(value, source, factor, mine * constant, names)

    def _pointwise(
        self,
        value: fx.Node,
        source: object,
        factor: Tensor | float = 1.0,
        shift: Tensor | float = 0.0,
        names: tuple[str, ...] = (),
    ) -> Step | None:
        """Y = factor x + shift for each channel."""
        shape = self.shape(value)
        if shape is None or not isinstance(source, fx.Node) or self.shape(source) != shape:
            return None
        geometry = Geometry.window(shape[1 if self.spatial else -1], (1,) * self.spatial)
        wide = torch.as_tensor(shift, dtype=torch.float64, device="cpu")
        geometry = replace(geometry, shifted=bool(wide.any()))
        return Step(
            source, geometry, partial(_windows, geometry, factor, wide), names, counts=False
        )

    def _pool(self, value: fx.Node) -> Step | None:
        """An average pool whose windows all have one size, and one weight everywhere."""
        pool, shape = Pool.of(value), self.shape(value)
        if pool is None or shape is None or len(pool.kernel) != self.spatial:
            return None
        if pool.ceil_mode or not (pool.counts or not any(pool.padding)):
            return None
        geometry = Geometry.window(shape[1], pool.kernel, stride=pool.stride, padding=pool.padding)
        weight = 1.0 / (pool.divisor or geometry.taps)
        return Step(pool.input, geometry, partial(_windows, geometry, weight))

    def _padding(self, value: fx.Node) -> Step | None:
        """Zeros, as many on both sides of each spatial axis."""
        widths, shape = zeros_added(value), self.shape(value)
        source = argument(value, 0, "input")
        if widths is None or shape is None or not isinstance(source, fx.Node):
            return None
        padding = tuple(low for low, _ in reversed(widths))
        if any(low != high for low, high in widths) or len(padding) > self.spatial:
            return None
        padding = (0,) * (self.spatial - len(padding)) + padding
        geometry = Geometry.window(shape[1], (1,) * self.spatial, padding=padding)
        return Step(source, geometry, partial(_windows, geometry, 1.0))


@dataclass(frozen=True)
class Pool:
    """The call of an average pool with windows of a fixed size."""

    input: fx.Node
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    #: Whether padded zeros count.
    counts: bool
    #: What sums are divided by, where not by the size of the window.
    divisor: int | None

    @staticmethod
    def of(node: fx.Node) -> Pool | None:
        """What the call says; None where it is no such call, or computes its sizes."""
        name = _kind(node)
        if not name.startswith("avg_pool"):
            return None
        spatial = int(name[-2])
        kernel = argument(node, 1, "kernel_size")
        stride = argument(node, 2, "stride") or kernel
        padding = argument(node, 3, "padding", 0)
        ceil = argument(node, 4, "ceil_mode", False)
        counts = argument(node, 5, "count_include_pad", True)
        divisor = argument(node, 6, "divisor_override") if spatial > 1 else None
        source = argument(node, 0, "input")
        asked = _flat((kernel, stride, padding, ceil, counts, divisor or 0))
        if not isinstance(source, fx.Node) or not all(isinstance(n, int) for n in asked):
            return None
        sizes = [numbers(value, spatial) for value in (kernel, stride, padding)]
        return Pool(source, sizes[0], sizes[1], sizes[2], bool(ceil), bool(counts), divisor)


def averaged(node: fx.Node, *, spatial: int) -> bool | None:
    """Whether a call averages each channel over space with weights that sum to one everywhere.

    None where it is no linear map of that kind: then nothing commutes with it.
    """
    pool = Pool.of(node)
    if pool is not None:
        sums = pool.divisor is None and not (pool.counts and any(pool.padding))
        return sums if len(pool.kernel) == spatial else None
    if _kind(node).lstrip("_") == f"adaptive_avg_pool{spatial}d":
        return True
    axes = argument(node, 1, "dim")
    kept = argument(node, 2, "keepdim", False) is True and node.kwargs.get("dtype") is None
    if passage_of(node) is not Passage.MEAN or not kept or not isinstance(axes, tuple | list):
        return None
    inside = {*range(2, spatial + 2), *range(-spatial, 0)}
    return True if axes and all(axis in inside for axis in axes) else None


def zeros_added(node: fx.Node) -> list[tuple[int, int]] | None:
    """How many zeros a pad brings in below and above, the last axis first; None for other pads."""
    widths, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    fill = argument(node, 3, "value")
    if isinstance(node.target, torch._ops.OpOverload) and call_name(node) != "pad":
        mode, fill = "constant", argument(node, 2, "value")
    if mode != "constant" or fill not in (None, 0) or not isinstance(widths, tuple | list):
        return None
    if not all(isinstance(n, int) and n >= 0 for n in widths):
        return None
    return list(zip(widths[::2], widths[1::2], strict=True))


def _kind(node: fx.Node) -> str:
    return base_name(call_name(node))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, tuple | list) else (value,)


def _rows(geometry: Geometry, product: Product, weight: Tensor, bias: Tensor | None) -> Branch:
    """A product as a linear layer."""
    rows = product.rows(weight.detach().cpu().double())[0] * product.alpha
    wide = None if bias is None else bias.detach().cpu().double() * product.beta
    return Branch.of(geometry, rows, wide)


def _windows(geometry: Geometry, weight: Tensor | float, shift: Tensor | float = 0.0) -> Branch:
    """One weight for each channel, throughout its window."""
    sizes = (geometry.outputs, 1, *geometry.kernel)
    factor = torch.as_tensor(weight, dtype=torch.float64, device="cpu")
    column = factor.reshape(-1, *[1] * (len(sizes) - 1)).expand(sizes)
    bias = torch.as_tensor(shift, dtype=torch.float64, device="cpu").expand(geometry.outputs)
    return Branch.of(geometry, column, bias)


def _behind(
    first: Callable[[], Branch], second: Callable[[], Branch], geometry: Geometry
) -> Branch:
    return followed(first(), second(), geometry)


def _sum_of(one: Callable[[], Branch], other: Callable[[], Branch], geometry: Geometry) -> Branch:
    a, b = laid(one(), geometry), laid(other(), geometry)
    return replace(a, weight=a.weight + b.weight, bias=a.bias + b.bias)
