"""Example inputs, copies of models, and the state of a model that a look at it must put back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from bnfx.errors import CaptureError
from bnfx.operators.calls import arguments
from bnfx.operators.table import is_batch_norm

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

#: Where a module keeps its tensors and modules.
_TABLES = ("_parameters", "_buffers", "_modules")
#: Attributes of a `torch.fx.GraphModule` that no forward writes.
_OF_GRAPHS = ("_graph", "_code", "_tracer_cls", "meta", "_bnfx_report")


@dataclass(frozen=True)
class Example:
    """Example inputs of a model: positional arguments and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def copied(self) -> Example:
        """The same with tensors of its own, in which a forward may work."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        memo = {id(t): t.detach().clone() for t in leaves if isinstance(t, Tensor)}
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs)), dict[int, Any](memo))
        return Example(args, kwargs)


def example(inputs: Any, kwargs: Mapping[str, Any] | None) -> Example | None:
    """`inputs` as a tuple of positional arguments (a lone tensor is accepted), None without any."""
    if inputs is None and not kwargs:
        return None
    if inputs is None:
        inputs = ()
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list):
        raise CaptureError(
            f"example_inputs is a {type(inputs).__name__}; give a tuple of positional arguments "
            "or a lone tensor"
        )
    return Example(tuple(inputs), dict(kwargs or {}))


def obstacle(model: object, *, wrappers: bool = True) -> str:
    """Why nobody can look into a model, or into a part of it, and what to give instead; or "".

    Args:
        model: Any module; or something else, which is then in the way itself.
        wrappers: Whether those that spread a model over devices or processes are in the way too.
    """
    if isinstance(model, ExportedProgram):
        return (
            "an exported program has its graph and its statistics fixed; give the torch.nn.Module "
            "that it was exported from, and export the result anew"
        )
    if not isinstance(model, nn.Module):
        return f"the model is a {type(model).__name__}, not a torch.nn.Module; give one"
    for path, part in model.named_modules():
        place = f"the part {path!r}, a {type(part).__name__}," if path else type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            there = "in its place" if path else "instead"
            return (
                f"{place} is TorchScript, which has no forward to capture or to change; give the "
                f"module that it was made from {there}"
            )
        if type(part).__module__.startswith("torch.distributed.fsdp") or _is_sharded(part):
            return (
                f"{place} is sharded by FSDP, which nobody can copy; give the model from before "
                "that, and shard what bnfx returns"
            )
        if wrappers and isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            give = (
                "put its .module in its place" if path else "give model.module, and wrap the result"
            )
            return f"{place} is a wrapper; {give}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return (
                f"{name!r} has no shape yet (uninitialized, of a lazy module); run the model once, "
                "so that its lazy modules get theirs"
            )
    return ""


def _is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has made its class; torch.distributed is not imported to ask that."""
    kinds = (f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__)
    return any(k.startswith("torch.distributed.fsdp") and k.endswith("FSDPModule") for k in kinds)


def clone(model: nn.Module) -> nn.Module:
    """A deep copy; what it shares inside, such as tied weights, it goes on sharing."""
    return _copied(model, {})


def skeleton(model: nn.Module, shared: Iterable[Tensor] | None = None) -> nn.Module:
    """A copy of the modules with its own tensors, except that `shared` share their storage.

    These are all parameters by default. Parameters are objects of their own even so: `.half()` or
    `.to()` on the copy, which replace the data behind an object, leave the model alone. Writing
    into them in place does not.
    """
    if shared is None:
        shared = model.parameters() if isinstance(model, nn.Module) else ()
    return _copied(model, {id(tensor): _sharing(tensor) for tensor in shared})


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64, with the tensors that modules keep as plain attributes too."""
    copied = clone(model).double()
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, in_precision(value, torch.float64))
        for table in (module._parameters, module._buffers):
            for value in table.values():
                if value is not None and value.is_complex():  # which `double` leaves as they are
                    value.data = in_precision(value.data, torch.float64)
    return copied


def in_precision(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating numbers in `dtype`, complex ones in the complex dtype of its parts."""
    if value.is_complex():
        return value.to(dtype.to_complex())
    return value.to(dtype) if value.is_floating_point() else value


def twins(model: nn.Module, copied: nn.Module) -> WeakTensorKeyDictionary:
    """For parameters of `copied` the values of `model` that they were copied from."""
    theirs, found = dict(model.named_parameters()), WeakTensorKeyDictionary()
    for name, ours in copied.named_parameters():
        twin = theirs.get(name)
        if twin is not None and twin.layout is torch.strided and _like(twin, ours):
            found[ours] = twin.detach()
    return found


def _like(a: Tensor, b: Tensor) -> bool:
    """Whether one may stand for the other: alike, and not in the same memory."""
    apart = a.is_meta or a.data_ptr() != b.data_ptr()
    return apart and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _held(value: object) -> Iterator[Tensor]:
    """The tensors in containers of containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _held(inner)


def _sharing(tensor: Tensor) -> Tensor:
    if tensor.is_inference():  # made under torch.inference_mode, and no good outside
        return _normal(tensor)
    if type(tensor) is not nn.Parameter:
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def _normal(tensor: Tensor) -> Tensor:
    """A copy of an inference tensor that is none."""
    copied = tensor.detach().clone()
    trained = isinstance(tensor, nn.Parameter)
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if trained else copied


def _copied(model: nn.Module, memo: dict[int, Tensor]) -> nn.Module:
    """A deep copy; tensors that a module keeps from its last forward are copied without gradient.

    The weight of torch.nn.utils.weight_norm (the old form) is one: a deep copy alone refuses it.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(obstacle(model))
    for module in model.modules():
        for value in _held(vars(module)):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_inference():
            memo.setdefault(id(tensor), _normal(tensor))
    known = dict[int, Any](memo)
    try:
        copied = copy.deepcopy(model, known)
        for module in model.modules():
            if isinstance(module, fx.GraphModule) and (has_hooks(module) or trains_hooks(module)):
                take_hooks(known[id(module)], module, known)
        return copied
    except Exception as error:  # copying is up to the classes in it, which raise anything
        said = str(error).rstrip(".")
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {said}. bnfx never changes the model that "
            "it is given; make copy.deepcopy(model) work, or shard and wrap what bnfx returns"
        ) from error


@contextmanager
def untouched(model: nn.Module, twins: Mapping[Tensor, Tensor] | None = None) -> Iterator[None]:
    """Let what runs inside change anything that `model` holds; then all is as it was.

    Its modules themselves stay, with their hooks: what is learned of them is true of `model`. A
    forward may write into parameters, too: their values come back from their twins, and only those
    that have none are copied before.

    Args:
        model: What runs.
        twins: For parameters, a tensor elsewhere with the same values.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    data = [
        (p, p.data, twins.get(p) if twins else None) for p in parameters.values() if not is_lazy(p)
    ]
    before = [(table, dict(table)) for m in modules for table in (vars(m), *_tables(m))]
    memo: dict[int, Any] = {id(m): m for m in model.modules()} | dict(parameters)
    for module in modules:
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    try:
        for module in modules:
            vars(module).update(_working_copies(module, memo))
            module._buffers.update({k: memo.get(id(b), b) for k, b in module._buffers.items()})
        for parameter, values, twin in data:
            parameter.data = values.clone() if twin is None else values
        yield
    finally:
        for parameter, values, twin in data:
            parameter.data = values
            if twin is not None and not values.is_meta and not torch.equal(values, twin):
                values.copy_(twin)
        for table, entries in before:
            table.clear()
            table.update(entries)


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What a module keeps apart from its plain attributes."""
    for key, table in vars(module).items():
        if isinstance(table, dict) and (key in _TABLES or "hooks" in key):
            yield table


def _working_copies(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """Copies of the plain attributes in which a forward may work."""
    own = {k: v for k, v in vars(module).items() if k not in _TABLES and "hooks" not in k}
    if isinstance(module, fx.GraphModule):
        own = {k: v for k, v in own.items() if k not in _OF_GRAPHS}
    copied: dict[str, Any] = copy.deepcopy(own, memo)
    return copied


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put the training flag of every module of `model` back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def has_hooks(module: nn.Module) -> bool:
    """Whether code of the user runs around this module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def trains_hooks(module: nn.Module) -> bool:
    """Whether code of the user runs around this module's backward."""
    return any(getattr(module, name) for name in _BACKWARD_HOOKS)


def take_hooks(made: nn.Module, source: nn.Module, memo: dict[int, Any] | None = None) -> None:
    """Give `made` the hooks of `source`, or their copies where there is a memo of copying.

    The exporter's own, which check the inputs of the module that it made, are none of a copy's.
    """
    for name in (*HOOKS, *_BACKWARD_HOOKS):
        kept = {i: hook for i, hook in getattr(source, name).items() if not _of_exporter(hook)}
        getattr(made, name).update(kept if memo is None else copy.deepcopy(kept, memo))
    made._is_full_backward_hook = source._is_full_backward_hook


def _of_exporter(hook: object) -> bool:
    home = getattr(hook, "__module__", None) or ""
    return home.startswith(("torch.export.", "torch._export."))


def training_modules(model: nn.Module) -> list[str]:
    """Paths of the modules in train mode ("" is the root), and of operators that act like it."""
    found = []
    for path, module in _running(model, ""):
        if not isinstance(module, fx.GraphModule):
            ours = not type(module).__module__.startswith("torch.export")  # checks of inputs
            found += [path] if module.training and ours else []
            continue
        found += [
            f"{path}.{node.name}".lstrip(".")
            for node in module.graph.nodes
            if node.op == "call_function"
            and is_batch_norm(node)
            and arguments(node)["training"] is True
        ]
    return list(dict.fromkeys(found))


def _running(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules with code of their own; in a graph those that it calls, which alone have a mode.

    The module of an exported program is such a graph: it says that it trains, and cannot be told
    otherwise.
    """
    yield path, module
    children: Iterable[tuple[str, nn.Module]] = module.named_children()
    if isinstance(module, fx.GraphModule):
        called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
        children = [(name, module.get_submodule(name)) for name in sorted(called)]
    for name, child in children:
        yield from _running(child, f"{path}.{name}".lstrip("."))
