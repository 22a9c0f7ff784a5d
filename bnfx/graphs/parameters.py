"""Parameters of an inference graph: who reads them, who may write them, how one is replaced."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from bnfx.graphs.mapped import unfilled
from bnfx.operators.effects import overwrites
from bnfx.operators.table import affine_of, is_batch_norm


@dataclass(frozen=True)
class Constants:
    """The tensors that a graph reads by name, and those that it may change while it runs."""

    tensors: dict[str, Tensor]
    readers: dict[str, tuple[fx.Node, ...]]
    written: frozenset[str]

    def value(self, node: object) -> Tensor | None:
        """The tensor behind a `get_attr` node that nothing writes; None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        name = str(node.target)
        return None if name in self.written else self.tensors.get(name)


@dataclass(frozen=True)
class Written:
    """New parameters and buffers of a graph: they may be in float64 until all are written."""

    #: Name -> names in the source that it was computed from.
    provenance: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Name -> the dtype to store it in.
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def copy(self) -> Written:
        """An independent copy."""
        return Written(dict(self.provenance), dict(self.dtypes))

    def add(self, new: Written) -> None:
        """Add what was written after: sources that were written before stand for their own."""
        if not self.dtypes:
            self.provenance.update(new.provenance)
            self.dtypes.update(new.dtypes)
            return
        before, stored = dict(self.provenance), dict(self.dtypes)
        for name, dtype in new.dtypes.items():
            known = (stored[s] for s in new.provenance.get(name, ()) if s in stored)
            self.dtypes[name] = next(known, dtype)
        for name, sources in new.provenance.items():
            traced = (s for source in sources for s in before.get(source, (source,)))
            self.provenance[name] = tuple(dict.fromkeys(traced))

    def round(self, module: nn.Module) -> None:
        """Store what is still in float64 in the dtype that it has."""
        for name in self.dtypes.keys() & module.state_dict().keys():
            value = attribute(module, name)
            assert isinstance(value, Tensor)
            if value.dtype is not self.dtypes[name]:
                stored = value.detach()
                if stored.device.type == "cpu":
                    stored = unfilled(stored.shape, self.dtypes[name]).copy_(stored)
                stored = stored.to(self.dtypes[name])
                buffer = not isinstance(value, nn.Parameter)
                set_tensor(module, name, stored, trained=value.requires_grad, buffer=buffer)


def constants(module: fx.GraphModule) -> Constants:
    """What the graph of `module` reads by name.

    A tensor counts as written if anything computed from it without a fresh result, or any name
    that shares its storage, is changed in place, or if a module that is kept whole owns it.
    """
    tensors: dict[str, Tensor] = {}
    readers: dict[str, tuple[fx.Node, ...]] = {}
    unsafe: set[int] = set()
    changed = _changed(module.graph)
    modules = dict(module.named_modules(remove_duplicate=False))
    for node in module.graph.nodes:
        if node.op == "call_module":
            unsafe.update(_storage(t) for t in _owned(modules[str(node.target)]))
        if node.op != "get_attr":
            continue
        value = attribute(module, str(node.target))
        if not isinstance(value, Tensor):
            continue
        tensors[str(node.target)] = value
        readers[str(node.target)] = (*readers.get(str(node.target), ()), *node.users)
        if node in changed:
            unsafe.add(_storage(value))
    written = frozenset(name for name, value in tensors.items() if _storage(value) in unsafe)
    return Constants(tensors, readers, written)


def _owned(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _changed(graph: fx.Graph) -> set[fx.Node]:
    """Values that a call may change, themselves or in whatever may be a view of them."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        views = (u for u in node.users if u in found and u.target is not operator.setitem)
        seen_through = any(affine_of(u) is None and not is_batch_norm(u) for u in views)
        if seen_through or any(overwrites(user, node) for user in node.users):
            found.add(node)
    return found


def attribute(module: nn.Module, name: str) -> object:
    """`module.a.b` for "a.b"."""
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def set_tensor(
    module: nn.Module, name: str, value: Tensor, *, trained: bool, buffer: bool = False
) -> None:
    """Put a parameter or buffer at `name`, making the modules on the way; an old one goes."""
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else ():
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            child.training = module.training
            owner.add_module(part, child)
        owner = child
    owner._buffers.pop(leaf, None)
    owner._parameters.pop(leaf, None)
    if leaf in owner.__dict__:
        delattr(owner, leaf)
    if buffer:
        owner.register_buffer(leaf, value)
    else:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=trained))


def free_name(module: nn.Module, wanted: str) -> str:
    """`wanted`, or with the first numbers behind its parts at which something else is."""
    owner: nn.Module | None = module
    *path, leaf = wanted.split(".")
    found = []
    for part in path:
        if owner is not None and part not in owner._modules:
            part = _free(owner, part)
        owner = owner._modules.get(part) if owner is not None else None
        found.append(part)
    return ".".join([*found, leaf if owner is None else _free(owner, leaf)])


def _free(owner: nn.Module, wanted: str) -> str:
    taken = set(dir(owner))
    names = [wanted, *(f"{wanted}_{i}" for i in range(1, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def sweep(nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nobody uses, and what only they used."""
    queue = list(dict.fromkeys(nodes))
    while queue:
        node = queue.pop()
        if node.users or node._erased or node.op in ("placeholder", "output"):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        queue.extend(inputs)


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nobody uses; never an operator with an effect of its own."""
    for node in nodes:
        if not node.users and node.graph is graph:
            graph.erase_node(node)
