"""Products of matrices of which one factor is constant: linear layers, written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from bnfx.operators.calls import base_name, call_name
from bnfx.operators.table import layer_call


@dataclass(frozen=True)
class Product:
    """y = sum over one axis of x * W, W of rank 2; axes are counted from the end."""

    input: fx.Node
    weight: Any
    #: What addmm adds, times `beta`.
    bias: Any
    #: Whether W is (in, out), not (out, in).
    transposed: bool
    #: The axis of x over which is summed.
    x_axis: int
    #: The axis of y that it becomes.
    y_axis: int
    #: Factor of the product.
    alpha: float = 1.0
    #: Factor of the bias.
    beta: float = 1.0

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as (out, in); a view."""
        return weight.T if self.transposed else weight


def products(node: fx.Node) -> list[Product]:
    """How the call could be read, for each factor that might be the constant one."""
    name = base_name(call_name(node))
    if name == "einsum":
        return _einsum(node)
    call = layer_call(node)
    first, second = call["input"], call["weight"]
    if name == "addmm":
        numbers = (call.get("alpha", 1), call.get("beta", 1))
        if not all(isinstance(number, int | float) for number in numbers) or not all(numbers):
            return []
        alpha, beta = map(float, numbers)
        return _of(first, second, call["bias"], alpha=alpha, beta=beta)
    return _of(first, second, None)


def _of(first: Any, second: Any, bias: Any, **factors: float) -> list[Product]:
    found = []
    if isinstance(first, fx.Node):
        found.append(Product(first, second, bias, True, -1, -1, **factors))
    if isinstance(second, fx.Node) and bias is None:
        found.append(Product(second, first, None, False, -2, -2, **factors))
    return found


def _einsum(node: fx.Node) -> list[Product]:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return []
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len({*t}) < len(t) for t in (*terms, out)):
        return []
    found = []
    for x, w in ((0, 1), (1, 0)):
        value = operands[x]
        summed = {*terms[x]} & {*terms[w]} - {*out}
        made = {*terms[w]} & {*out} - {*terms[x]}
        kept = {*terms[x]} - summed == {*out} - made
        fits = len(terms[w]) == 2 and len(summed) == len(made) == 1 and kept
        if fits and isinstance(value, fx.Node):
            (i,), (o,) = summed, made
            axes = terms[x].index(i) - len(terms[x]), out.index(o) - len(out)
            found.append(Product(value, operands[w], None, terms[w][0] == i, *axes))
    return found
