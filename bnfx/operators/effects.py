"""Which calls write into their arguments."""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.operators.calls import arguments, function_name, signature_of
from bnfx.operators.table import is_batch_norm, is_instance_norm

#: What changes a tensor in place, its elements aside: programs hold the first for each literal.
_WRITING_NO_ELEMENTS = frozenset({"detach_", "requires_grad_"})


def name_inplace_flag(node: fx.Node) -> None:
    """Turn a positional `inplace` into a keyword, where `writes` looks for it."""
    target = node.target
    ours = inspect.isfunction(target) and getattr(F, function_name(target), None) is target
    names = signature_of(target) if node.op == "call_function" and ours else ()
    if "inplace" in names[: len(node.args)]:
        at = names.index("inplace")
        node.kwargs = {**node.kwargs, **dict(zip(names[at:], node.args[at:], strict=False))}
        node.args = node.args[:at]


def writes(node: fx.Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_module":
        return False
    if _updates_statistics(node):
        return True
    if is_batch_norm(node):
        return False
    if function_name(node.target) in _WRITING_NO_ELEMENTS:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.target in (setattr, operator.setitem) or node.target is operator.delitem:
        return True
    name = str(node.target) if node.op == "call_method" else function_name(node.target)
    if name.startswith("i") and getattr(operator, name, None) is node.target:
        return name not in ("is_", "is_not", "index", "indexOf", "inv", "invert", "itemgetter")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "set_")


def assigns(node: fx.Node) -> bool:
    """Whether the call puts elements of one tensor into another, and computes none."""
    return node.target is operator.setitem or function_name(node.target) == "copy_"


def overwrites(node: fx.Node, value: fx.Node) -> bool:
    """Whether the call may change `value`, and not only read it for what it changes."""
    if not writes(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        given = {a.name: v for a, v in zip(schema, node.args, strict=False)} | node.kwargs
        changed = [given.get(a.name) for a in schema if a.alias_info and a.alias_info.is_write]
        known = all(isinstance(v, fx.Node) for v in changed) and bool(changed)
        return not known or value in changed
    if node.target is operator.setitem or node.op == "call_method":
        return node.args[0] is value
    return True


def _updates_statistics(node: fx.Node) -> bool:
    """Whether a norm writes its running statistics, which not all schemas of ATen's say."""
    name = function_name(node.target)
    fresh = any(part in name for part in ("no_training", "no_update", "functional"))
    if node.op != "call_function" or fresh:
        return False
    if is_batch_norm(node) or is_instance_norm(node):
        call = arguments(node)
        tracked = call["running_mean"] is not None or call["running_var"] is not None
        mode = "training" if is_batch_norm(node) else "use_input_stats"
        return tracked and ("with_update" in name or call[mode] is not False)
    return "no_stats" not in name and ("batch_norm" in name or "instance_norm" in name)
