"""Calls of dropout and local response normalisation in the record of a run (`graphs.observed`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnfx.editing.draft import Region
from bnfx.operators.calls import call_name

#: Operators that are noted.
_NOTED = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
        *("alpha_dropout", "feature_alpha_dropout"),
        *("local_response_norm", "scaled_dot_product_attention"),
    )
)
#: Operators behind which a softmax's result is still that.
_SAME_VALUES = frozenset(
    (
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone"),
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
    )
)


@dataclass(frozen=True)
class SeenCall:
    """A call that was seen.

    Attributes:
        function: Name of the operator.
        path: Module in whose forward it was called.
        after_softmax: Whether its input was the result of a softmax: attention, that is.
    """

    function: str
    path: str
    after_softmax: bool


def seen_calls(seen: Region | None) -> tuple[SeenCall, ...]:
    """The noted calls in what was seen of a run, in the order of execution."""
    if seen is None:
        return ()
    return tuple(
        SeenCall(name, seen.caller(node), call_name(source_of(node)) == "softmax")
        for node in seen.graph.nodes
        if (name := call_name(node)) in _NOTED
    )


def source_of(node: fx.Node) -> fx.Node:
    """What made the first input of `node`, seen through casts and views."""
    source = node.all_input_nodes[0]
    while call_name(source) in _SAME_VALUES and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return source
