"""Values under symbolic tracing that say what they are.

A forward may ask `isinstance(x, torch.Tensor)`. A proxy of torch.fx answers no, and the graph holds
the other branch without a word.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, _functorch, fx, nn
from torch.utils import _pytree as pytree

from bnfx.operators.calls import base_name, call_name
from bnfx.operators.table import Passage, operator_of, operator_of_module

#: node.meta key of a placeholder: whether it is a tensor.
IS_TENSOR = "bnfx_is_tensor"

_TENSORS = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})


class TensorProxy(fx.Proxy):
    """A proxy that is an instance of Tensor where the value is one.

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

    @property
    def __class__(self) -> type:
        assert isinstance(self.tracer, fx.Tracer)
        return Tensor if _is_tensor(self.node, self.tracer.root) else type(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError(f"a value under tracing cannot become a {kind.__name__}")


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand",
              "ior", "ixor", "ilshift", "irshift"):  # fmt: skip
    setattr(TensorProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


#: What torch carries out in C without a look at `__torch_function__`: it would take a proxy, which
#: says that it is a tensor, for the memory of one. The last is what `Function.apply` calls first,
#: under whatever name a model has it.
_IN_C: Mapping[str, tuple[Any, str]] = {
    **{
        f"torch.{name}": (torch, name)
        for name in ("tensor", "as_tensor", "asarray", "full", "full_like", "arange")
    },
    "Tensor.new_tensor": (Tensor, "new_tensor"),
    "an autograd.Function": (_functorch.utils, "unwrap_dead_wrappers"),
}


@contextmanager
def proxies_refused() -> Iterator[None]:
    """Inside, what cannot be given a proxy says so, instead of ending the process."""
    with ExitStack() as undone:
        for said, (owner, name) in _IN_C.items():
            before = vars(owner).get(name)
            setattr(owner, name, _guarded(said, before or getattr(owner, name)))
            undone.callback(_put_back, owner, name, before)
        yield


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is None:  # it was inherited
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def _guarded(said: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first = 1 if said == "torch.full_like" else 0  # which may be one
        leaves = pytree.tree_leaves((args[first:], kwargs))
        if not any(issubclass(type(v), fx.Proxy) and isinstance(v, Tensor) for v in leaves):
            return function(*args, **kwargs)  # sizes may be recorded
        if said == "torch.as_tensor" and len(leaves) == 1 and isinstance(leaves[0], Tensor):
            return leaves[0]
        raise fx.proxy.TraceError(f"{said} is given a value of the network, which no graph records")

    return guarded


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
