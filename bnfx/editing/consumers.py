"""Where the output of a layer goes: what it meets first, on every way through the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from bnfx.operators.table import Passage, Role, operator_of, passage_of, reads_elements, role_of


@dataclass(frozen=True)
class Ends:
    """What the output of a layer meets first, nearest first.

    Attributes:
        nonlinearities: Elementwise nonlinearities.
        norms: Normalisations, and operators that compute the statistics of one.
        past_add: Which of these lie behind a residual add.
        past_move: Which of these lie behind operators that may move the channels to another axis.
        others: Everything else: products of activations, softmax, the model's output, ...
    """

    nonlinearities: list[fx.Node]
    norms: list[fx.Node]
    past_add: set[fx.Node]
    past_move: set[fx.Node]
    others: list[fx.Node]


def ends_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Ends:
    """Follow the output of `node` through operators that keep the statistics of its channels.

    These are data movement, dropout, pooling, residual adds, and products with constants.
    """
    ends = Ends([], [], set(), set(), [])
    seen: set[fx.Node] = set()
    queue = [(node, user, False, False) for user in node.users]
    while queue:
        value, user, past_add, past_move = queue.pop(0)
        if user in seen or not reads_elements(user, value):
            continue
        seen.add(user)
        role = _role(user, modules)
        if role is Role.SCALE and _scales_by_constant(user, value):
            role = Role.MOVE
        if past_add:
            ends.past_add.add(user)
        if past_move:
            ends.past_move.add(user)
        if role in (Role.NONLINEARITY, Role.SQUASHING):
            ends.nonlinearities.append(user)
        elif role is Role.NORM:
            ends.norms.append(user)
        elif role in (Role.MOVE, Role.ADD):
            add = past_add or role is Role.ADD
            move = past_move or (role is Role.MOVE and not _keeps_channels(user, modules))
            queue.extend((user, after, add, move) for after in user.users)
        else:
            ends.others.append(user)
    return ends


def reaches(node: fx.Node, targets: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> bool:
    """Whether `node` leads to one of `targets`, or into a module kept whole with parameters."""
    wanted, seen, queue = set(targets), set(), list(node.users)
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        if user in wanted:
            return True
        if (
            user.op == "call_module"
            and _role(user, modules) is Role.OTHER
            and any(True for _ in modules[str(user.target)].parameters())
        ):
            return True
        queue.extend(user.users)
    return False


def depends_on_input(node: fx.Node) -> bool:
    """Whether what `node` computes depends on the model's input."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        value = queue.pop()
        if value.op == "placeholder":
            return True
        seen.add(value)
        queue.extend(n for n in value.all_input_nodes if n not in seen)
    return False


def describe(node: fx.Node) -> str:
    """A node in a user's words."""
    return str(node.target) if node.op in ("call_module", "call_method") else node.name


def _role(node: fx.Node, modules: Mapping[str, nn.Module]) -> Role:
    """The operator's role; a square that is averaged belongs to a normalisation."""
    role = role_of(node, modules)
    if role is not Role.MOMENT:
        return role
    averaged = all(passage_of(user) in (Passage.MEAN, Passage.SUM) for user in node.users)
    return Role.NORM if averaged and node.users else Role.NONLINEARITY


def _scales_by_constant(node: fx.Node, value: fx.Node) -> bool:
    """Whether `value` is multiplied with (or divided by) a number or a parameter."""
    others = [arg for arg in node.all_input_nodes if arg is not value]
    divided = node.args[:1] == (value,) or passage_of(node) is Passage.MULTIPLY
    return divided and all(other.op == "get_attr" for other in others)


def _keeps_channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    row = operator_of(node, modules)
    return row is not None and row.keeps_channels
