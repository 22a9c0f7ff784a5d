"""Which calls write into their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.operators.calls import arguments, call_name, function_name
from bnfx.operators.layers import BATCH_NORM, INSTANCE_NORM

#: Position of the flag `inplace` in functions of torch.nn.functional.
_INPLACE = {
    **dict.fromkeys(("relu", "relu6", "selu", "silu", "mish", "hardswish", "hardsigmoid"), 1),
    **dict.fromkeys(("elu", "celu", "leaky_relu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), 3),
    "rrelu": 4,
}


def name_inplace_flag(node: fx.Node) -> None:
    """Turn a positional `inplace` into a keyword, where `writes` looks for it."""
    name = function_name(node.target)
    at = _INPLACE.get(name)
    if node.op != "call_function" or at is None or getattr(F, name, None) is not node.target:
        return
    if len(node.args) > at:
        node.kwargs = {**node.kwargs, "inplace": node.args[at]}
        node.args = node.args[:at]


def writes(node: fx.Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_module":
        return False
    if _updates_statistics(node):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.target in (setattr, operator.setitem) or node.target is operator.delitem:
        return True
    name = call_name(node)
    if name.startswith("i") and getattr(operator, name, None) is node.target:
        return name not in ("is_", "is_not", "index", "indexOf", "inv", "invert", "itemgetter")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "set_")


def _updates_statistics(node: fx.Node) -> bool:
    """Whether a norm writes its running statistics, which no schema of ATen's says."""
    target: Any = node.target
    if node.op != "call_function":
        return False
    if target in BATCH_NORM:
        call = arguments(node, BATCH_NORM[target])
        return call["training"] is not False
    if target in INSTANCE_NORM:
        call = arguments(node, INSTANCE_NORM[target])
        tracked = call["running_mean"] is not None or call["running_var"] is not None
        return tracked and call["use_input_stats"] is not False
    name = function_name(target)
    if "no_training" in name or "no_update" in name or "no_stats" in name:
        return False
    return "batch_norm" in name or "instance_norm" in name
