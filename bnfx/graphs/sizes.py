"""Concrete sizes for inputs whose sizes are symbols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

#: How much larger each open size is, the same for all of them; what does not fit is tried less.
_MORE = (32, 16, 2, 1, -1)


def concrete(values: Sequence[Any], ranges: Mapping[Any, Any]) -> list[tuple[Any, ...]]:
    """Fake values with numbers for sizes: those of the example, and then others, if any are open.

    Args:
        values: What torch.export notes of each input: fake tensors, symbols, constants.
        ranges: Its `range_constraints`.
    """
    hints = dict(_hints(values))
    choices = [hints]
    for more in _MORE if hints else ():
        choices.append({s: _within(ranges.get(s), n + more) for s, n in hints.items()})
    with FakeTensorMode():
        return [
            tuple(pytree.tree_map(lambda leaf, known=known: _at(leaf, known), list(values)))
            for known in choices
        ]


def _hints(values: Sequence[Any]) -> Iterator[tuple[sympy.Symbol, int]]:
    """Each symbol, and its number in the example."""
    for leaf in pytree.tree_leaves(list(values)):
        sizes = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
        for size in sizes:
            if not isinstance(size, SymInt) or size.node.hint is None:
                continue
            expression = size.node.expr
            if len(expression.free_symbols) == 1:
                [symbol] = expression.free_symbols
                solved = sympy.solve(expression - int(size.node.hint), symbol)
                yield from ((symbol, int(number)) for number in solved[:1])


def _within(bounds: Any, wanted: int) -> int:
    if bounds is None:
        return wanted
    return int(min(max(wanted, bounds.lower), bounds.upper))


def _at(leaf: Any, known: Mapping[sympy.Symbol, int]) -> Any:
    """`leaf` with numbers in the place of symbols; a symbol without one has its hint."""

    def number(size: Any) -> int:
        if not isinstance(size, SymInt):
            return int(size)
        found = sympy.sympify(size.node.expr.xreplace(dict(known)))
        return int(found if found.is_number else size.node.hint)

    if isinstance(leaf, SymInt):
        return number(leaf)
    if not isinstance(leaf, Tensor):
        return leaf
    shape, stride = ([number(n) for n in sizes] for sizes in (leaf.shape, leaf.stride()))
    return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device)
