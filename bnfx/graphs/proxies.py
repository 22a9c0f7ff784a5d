"""Values under symbolic tracing that say what they are.

A forward may ask `isinstance(x, torch.Tensor)`. A proxy of torch.fx answers no, and the graph holds
the other branch without a word.
"""

from __future__ import annotations

import builtins
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfx.operators.calls import base_name, call_name
from bnfx.operators.table import Passage, operator_of, operator_of_module

#: node.meta key of a placeholder: whether it is a tensor.
IS_TENSOR = "bnfx_is_tensor"

_TENSORS = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})


class TensorProxy(fx.Proxy):
    """A proxy that is an instance of Tensor where the value is one (see `tensors_recognised`).

    It records augmented assignment as what it is; torch.fx takes `y += 1` for `y = y + 1`. It takes
    assignment to elements, too, which torch.fx refuses.
    """

    # what torch.nn asks of a tensor that is assigned to an attribute
    _is_param = False
    _is_buffer = False

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "real", "imag"):
            raise fx.proxy.TraceError(f"it assigns to .{name} of a tensor, which no graph records")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _TENSORS:  # torch.fx's own proxy of an attribute knows nothing of all this
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def is_tensor(self) -> bool:
        """Whether the value certainly is one, and not a size, a tuple or something unknown."""
        assert isinstance(self.tracer, fx.Tracer)
        return _is_tensor(self.node, self.tracer.root)


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand",
              "ior", "ixor", "ilshift", "irshift"):  # fmt: skip
    setattr(TensorProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


@contextmanager
def tensors_recognised() -> Iterator[None]:
    """Inside, Python's `isinstance` takes a proxy of a tensor for a tensor.

    Were `__class__` to say so, torch's code in C would believe it, too, and take the proxy for the
    memory of a tensor.
    """
    before = builtins.isinstance

    def answer(value: Any, kinds: Any, /) -> bool:
        if before(value, kinds):
            return True
        return type(value) is TensorProxy and value.is_tensor() and issubclass(Tensor, kinds)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = before


def _is_tensor(node: fx.Node, root: nn.Module) -> bool:
    """Whether a value certainly is a tensor, and not a size, a tuple or something unknown."""
    if IS_TENSOR not in node.meta:  # asked of each value very often
        node.meta[IS_TENSOR] = _gives_tensor(node, root)
    return node.meta[IS_TENSOR] is True


def _gives_tensor(node: fx.Node, root: nn.Module) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return operator_of_module(module) is not None and not vars(module).get("return_indices")
    if node.kwargs.get("return_indices"):
        return False
    if node.target is getattr:
        return node.args[1] in _TENSORS and _reads_one(node, root)
    name = base_name(call_name(node))
    if node.target is operator.getitem or name == "getitem":
        return isinstance(node.args[0], fx.Node) and _holds(node.args[0], root)
    kinds = _returns(name)
    if kinds == {"Tensor"}:
        return True
    if kinds and "Tensor" not in kinds:
        return False
    many = name in ("max", "min", "median", "mode") and (len(node.args) > 1 or "dim" in node.kwargs)
    row = operator_of(node)
    known = kinds or (row is not None and row.passage is not Passage.SHAPE)
    return bool(known) and not many and _reads_one(node, root)


def _reads_one(node: fx.Node, root: nn.Module) -> bool:
    return any(_is_tensor(read, root) for read in node.all_input_nodes)


def _holds(node: fx.Node, root: nn.Module) -> bool:
    """Whether what an index takes out of a value is a tensor."""
    if _is_tensor(node, root):
        return True
    named = node.op in ("call_function", "call_method") and node.target is not getattr
    kinds = _returns(base_name(call_name(node))) if named else frozenset()
    return bool(kinds) and kinds <= {"Tensor", "List[Tensor]", "Tensor, Tensor"}


@functools.cache
def _returns(name: str) -> frozenset[str]:
    """What the overloads of ATen's operator of this name return."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is None:
        return frozenset()
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())
    return frozenset(
        ", ".join(str(value.type) for value in schema.returns)
        for schema in schemas
        if not any(argument.is_out for argument in schema.arguments)
    )
