"""Sums of branches, and the values inside them that may go."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from bnfx.operators.calls import argument
from bnfx.operators.table import Passage, operator_of, passage_of


def asks_rank(user: fx.Node) -> bool:
    """Whether the answer is the same for all tensors of one rank, dtype and device."""
    if user.target is getattr:
        return user.args[1] in ("ndim", "dtype", "device")
    return user.op == "call_method" and user.target == "dim"


def alone(value: fx.Node) -> bool:
    """Whether one call reads the elements of `value`, and none its sizes."""
    return sum(not asks_rank(user) for user in value.users) == 1


def does_nothing(node: fx.Node) -> bool:
    """Whether a call that may drop elements gives those that it reads."""
    row = operator_of(node)
    if row is None or row.pure:
        return True
    return argument(node, 2, "training", node.kwargs.get("train", True)) is False


def is_sum(node: fx.Node) -> bool:
    """Whether the call adds two values as they are."""
    plain = bool(node.kwargs.get("alpha", 1) == 1) and len(node.args) <= 2
    return passage_of(node) is Passage.ADD and plain


def is_inner(node: fx.Node) -> bool:
    """Whether the sum is an operand of another one, and read by nothing else."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)))


def operands_of(root: fx.Node) -> Iterable[object]:
    """The operands of nested sums, left to right."""
    for value in (argument(root, 0, "input"), argument(root, 1, "other")):
        if isinstance(value, fx.Node) and is_sum(value) and len(value.users) == 1:
            yield from operands_of(value)
        else:
            yield value


def sums_in(root: fx.Node) -> Iterable[fx.Node]:
    """The additions of nested sums, the outermost first."""
    yield root
    for value in (argument(root, 0, "input"), argument(root, 1, "other")):
        if isinstance(value, fx.Node) and is_sum(value) and len(value.users) == 1:
            yield from sums_in(value)


def repoint(value: object, source: fx.Node) -> None:
    """Questions for the rank of what goes are asked of the branch's source."""
    while isinstance(value, fx.Node) and value is not source:
        for user in list(value.users):
            if asks_rank(user):
                user.replace_input_with(value, source)
        inputs = [n for n in value.all_input_nodes if n.op != "get_attr"]
        value = inputs[0] if inputs else None
