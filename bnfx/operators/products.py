"""Products of tensors of which one factor is constant: linear layers, written out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from bnfx.operators.calls import base_name, call_name
from bnfx.operators.table import layer_call


@dataclass(frozen=True)
class Product:
    """y[.., g, o] = sum over i of x[.., g, i] * W[g, o, i], each of g, o and i some axes, or none.

    Axes of x and y are counted from the end.
    """

    input: fx.Node
    weight: Any
    #: What addmm adds, times `beta`.
    bias: Any
    #: The axes of W that are g, o and i.
    parts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    #: The axes of x that are g and i, in this order.
    x_axes: tuple[int, ...]
    #: The axes of y that are g and o, in this order.
    y_axes: tuple[int, ...]
    #: Factor of the product.
    alpha: float = 1.0
    #: Factor of the bias.
    beta: float = 1.0

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as (g, o, i)."""
        ordered = weight.permute([axis for part in self.parts for axis in part])
        sizes = [math.prod(weight.shape[axis] for axis in part) for part in self.parts]
        return ordered.reshape(sizes)

    def weight_of(self, rows: Tensor, like: Tensor) -> Tensor:
        """(g, o, i) as a weight of the shape of `like`."""
        order = [axis for part in self.parts for axis in part]
        placed = rows.reshape([like.shape[axis] for axis in order])
        return placed.permute([order.index(axis) for axis in range(len(order))]).contiguous()

    def sizes(self, like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of `x_axes`, and of `y_axes`."""
        g, o, i = (tuple(like.shape[axis] for axis in part) for part in self.parts)
        return (*g, *i), (*g, *o)

    def over_outputs(self, values: Tensor, like: Tensor) -> Tensor:
        """Values for each g and o in a shape that broadcasts to y."""
        _, sizes = self.sizes(like)
        at = sorted(range(len(sizes)), key=self.y_axes.__getitem__)
        shape = [1] * -min(self.y_axes, default=0)
        for place in at:
            shape[self.y_axes[place]] = sizes[place]
        return values.reshape(sizes).permute(at).reshape(shape)


def products(node: fx.Node, ranks: tuple[int, int] = (2, 2)) -> list[Product]:
    """How the call could be read, for each factor that might be the constant one.

    Args:
        node: A product.
        ranks: The ranks of its factors.
    """
    name = base_name(call_name(node))
    if name == "einsum":
        return _einsum(node)
    call = layer_call(node)
    factors = (call["input"], call["weight"])
    if name == "addmm":
        numbers = (call.get("alpha", 1), call.get("beta", 1))
        if not all(isinstance(number, int | float) for number in numbers) or not all(numbers):
            return []
        alpha, beta = map(float, numbers)
        return _read(factors, ("ai", "io"), "ao", call["bias"], alpha=alpha, beta=beta)
    if min(ranks) < 2:
        return []
    batch = [chr(ord("A") + axis) for axis in range(max(ranks) - 2)]
    first, second = ("".join(batch[len(batch) + 2 - rank :]) for rank in ranks)
    return _read(factors, (f"{first}mi", f"{second}io"), f"{''.join(batch)}mo", None)


def _einsum(node: fx.Node) -> list[Product]:
    equation, *factors = node.args
    if len(factors) == 1 and isinstance(factors[0], list | tuple):
        factors = list(factors[0])
    if not isinstance(equation, str) or len(factors) != 2:
        return []
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2:
        return []
    return _read((factors[0], factors[1]), (terms[0], terms[1]), out, None)


def _read(
    factors: tuple[Any, Any], terms: tuple[str, str], out: str, bias: Any, **numbers: float
) -> list[Product]:
    """The readings of a product whose axes have names, as those of einsum."""
    found = []
    for x, w in ((0, 1), (1, 0)):
        value, weight = factors[x], factors[w]
        inner, outer = terms[x].removeprefix("..."), out.removeprefix("...")
        held = {*terms[w]}
        if (terms[x] == inner) != (out == outer) or "." in f"{inner}{outer}{terms[w]}":
            continue
        once = all(len({*t}) == len(t) for t in (inner, outer, terms[w]))
        used = {*inner} <= {*outer} | held and held <= {*outer} | {*inner}
        if not once or not used or not isinstance(value, fx.Node) or (bias is not None and x):
            continue
        g = [axis for axis in terms[w] if axis in inner and axis in outer]
        o = [axis for axis in terms[w] if axis in outer and axis not in inner]
        i = [axis for axis in terms[w] if axis in inner and axis not in outer]
        parts = tuple(tuple(map(terms[w].index, part)) for part in (g, o, i))
        found.append(
            Product(
                value,
                weight,
                bias,
                (parts[0], parts[1], parts[2]),
                tuple(inner.index(axis) - len(inner) for axis in (*g, *i)),
                tuple(outer.index(axis) - len(outer) for axis in (*g, *o)),
                **numbers,
            )
        )
    return found
