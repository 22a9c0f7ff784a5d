"""Reading one call of a graph: its name, and its arguments by position or keyword."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import fx

#: Values of arguments that a call leaves out.
_DEFAULTS = {
    "bias": None,
    "weight": None,
    "training": False,
    "use_input_stats": True,
    "eps": 1e-5,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
    "groups": 1,
    "running_mean": None,
    "running_var": None,
}


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or keyword; ATen calls its first one `self`."""
    if position < len(node.args):
        return node.args[position]
    if name == "input" and "self" in node.kwargs:
        return node.kwargs["self"]
    return node.kwargs.get(name, default)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of the call of a function by name, with defaults."""
    return _DEFAULTS | given_arguments(node)


def given_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call of a function is given, by position or keyword, by name."""
    named = dict(zip(signature_of(node.target), node.args, strict=False)) | dict(node.kwargs)
    return {"input" if name == "self" else name: value for name, value in named.items()}


@functools.cache
def signature_of(target: Any) -> tuple[str, ...]:
    """Names of a function's arguments in order; the same for all ways to spell it but ATen's own.

    What torch writes in C++ has those of the ATen overload that it calls.
    """
    if inspect.isfunction(target):
        return tuple(inspect.signature(target).parameters)
    if not isinstance(target, torch._ops.OpOverload):
        name = function_name(target)
        packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, name[1:])  # imatmul
        target = getattr(packet, packet.overloads()[0])
    return tuple("input" if a.name == "self" else a.name for a in target._schema.arguments)


def function_name(target: Any) -> str:
    """`F.relu` and `aten.relu.default` -> "relu"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def call_name(node: fx.Node) -> str:
    """Name of the function or method that `node` calls; of anything else, its target's."""
    return str(node.target) if node.op == "call_method" else function_name(node.target)


def base_name(name: str) -> str:
    """An operator's name without marks: "relu_" -> "relu", "__getitem__" -> "getitem"."""
    if name.startswith("__") and name.endswith("__"):
        return name.strip("_")
    return name[:-1] if name.endswith("_") else name


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def all_equal(value: Any, wanted: int) -> bool:
    """Whether an argument such as `padding`, a number or one for each axis, is `wanted`."""
    return all(v == wanted for v in (value if isinstance(value, tuple | list) else (value,)))
