"""A folded graph back into the file that it was read from.

Calls that are left become the nodes that they were, with other names at their inputs where what
they read has gone. A parameter that folding changed replaces the stored tensor if nothing else
reads that, and gets a name of its own otherwise. Names of inputs, outputs, of what subgraphs read
and of all nodes that are left stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from bnfx.errors import FoldError
from bnfx.onnx_files.foreign import captured
from bnfx.onnx_files.importing import Imported
from bnfx.onnx_files.node_call import ORIGIN, PART, RESIZED, VALUE, Origin, Slot, unescaped
from bnfx.onnx_files.reading import graphs_of
from bnfx.onnx_files.tensors import element_type
from bnfx.operators.calls import argument, arguments
from bnfx.operators.geometry import numbers

#: What folding puts in by itself, and the node that it becomes.
_NEW = {torch.add: "Add", torch.maximum: "Max", torch.minimum: "Min"}


@dataclass
class Rebuilt:
    """The new graph, and what became of the old one, by names."""

    model: onnx.ModelProto
    #: Values of the tensors that are new or changed; the model has their names, types and shapes.
    tensors: dict[str, Tensor] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Wish:
    """A new value for an input of a node that was emitted."""

    node: onnx.NodeProto
    at: int
    #: The name that stood there, "" for none.
    old: str
    #: A name for it, where the old one won't do.
    name: str
    value: Tensor


def rebuilt(model: onnx.ModelProto, read: Imported, folded: fx.GraphModule) -> Rebuilt:
    """`model` as `folded` has it, which folding made of `read.module`. It is changed itself."""
    return _Rebuilding(model, read, folded).run()


class _Rebuilding:
    def __init__(self, model: onnx.ModelProto, read: Imported, folded: fx.GraphModule) -> None:
        self.read, self.folded = read, folded
        self.taken, self.graph = _all_names(model), model.graph
        self.done = Rebuilt(model)
        self.old = [_copy(node) for node in model.graph.node]
        #: What nodes did read.
        self.before = set(_read(self.old))
        del model.graph.node[:]
        self.nodes: list[onnx.NodeProto] = []
        #: Identity of a node that was emitted -> its place in the file.
        self.places: dict[int, int] = {}
        self.wishes: list[_Wish] = []
        self.names: dict[fx.Node, str] = {}
        #: Copies of values for subgraphs, by the nodes that have these.
        self.copies: dict[fx.Node, list[onnx.NodeProto]] = {}
        #: Values whose names may not change any more.
        self.held: set[fx.Node] = set()

    def run(self) -> Rebuilt:
        self._name()
        ends = list(self._outputs())
        waiting = [at for at in range(len(self.old)) if at not in self.read.called]
        for node in self.folded.graph.nodes:
            origin = node.meta.get(ORIGIN)
            if isinstance(origin, Origin):
                while waiting and waiting[0] < origin.index:
                    self.nodes.append(self.old[waiting.pop(0)])
                self.nodes += self.copies.get(node, [])
                self._emit(node, origin)
        self.nodes += [self.old[at] for at in waiting]
        self.nodes += [self._node("Identity", [source], name) for source, name in ends]
        self._grant()
        self._sweep()
        left = {self.places.get(id(node)) for node in self.nodes}
        gone = sorted(at for at in self.read.called if at not in left)
        self.done.removed += [unescaped(self.read.titles[at]) for at in gone]
        self.graph.node.extend(self.nodes)
        return self.done

    # -- names ---------------------------------------------------------------------------------

    def _name(self) -> None:
        """Give every value its old name; of several calls with one, the last has it."""
        last = {node.meta[VALUE]: node for node in self.folded.graph.nodes if VALUE in node.meta}
        for node in self.folded.graph.nodes:
            if VALUE in node.meta:
                name = str(node.meta[VALUE])
                self.names[node] = name if last[name] is node else self._fresh(name)
        for node in self.folded.graph.nodes:
            origin = node.meta.get(ORIGIN)
            for position, name in origin.held if isinstance(origin, Origin) else ():
                value = node.args[position]
                assert isinstance(value, fx.Node)
                if not self._hold(value, name):
                    source = self.names[self._value(value)]
                    copied = self._node("Identity", [source], name)
                    self.copies.setdefault(node, []).append(copied)

    def _hold(self, node: fx.Node, name: str) -> bool:
        """Give a value the name that something else refers to; False where it has another."""
        source = self._value(node)
        if self.names[source] == name:
            self.held.add(source)
            return True
        if source in self.held or source.op == "placeholder":
            return False
        self.names[source] = name
        self.held.add(source)
        return True

    def _outputs(self) -> Iterator[tuple[str, str]]:
        """Give outputs their names; where a value has another, a copy has the output's."""
        (end,) = self.folded.graph.find_nodes(op="output")
        values = list(zip(end.args[0], self.read.outputs, strict=True))
        own = [(v, name) for v, name in values if self.names[self._value(v)] == name]
        for value, name in (*own, *(pair for pair in values if pair not in own)):
            if not self._hold(value, name):
                yield self.names[self._value(value)], name

    def _value(self, node: fx.Node) -> fx.Node:
        """The call that gives what `node` is, as a value of the file."""
        while node not in self.names:
            if PART not in node.meta or not isinstance(node.args[0], fx.Node):
                raise FoldError(f"{unescaped(node.name)} is no value of the file; report this")
            node = node.args[0]
        return node

    def _fresh(self, wanted: str) -> str:
        name, at = wanted, 0
        while not name or name in self.taken:
            at += 1
            name = f"{wanted}_{at}"
        self.taken.add(name)
        return name

    # -- nodes ---------------------------------------------------------------------------------

    def _emit(self, node: fx.Node, origin: Origin) -> None:
        if node.target is not origin.target and node.target != origin.target:
            self._emit_new(node)
            return
        made = _copy(self.old[origin.index])
        if origin.index in self.places.values():
            made.name = self._fresh(made.name)
        self.places[id(made)] = origin.index
        for slot in origin.slots:
            self._fill(made, node, slot)
        if node.meta.get(RESIZED):
            _set_window(made, node, _tensor(self.folded, str(arguments(node)["weight"].target)))
        self._rename_outputs(made, node, origin)
        self.nodes.append(made)
        if self.old[origin.index].op_type == "MatMul":
            self._emit_sum(made, node, origin)

    def _emit_new(self, node: fx.Node) -> None:
        """A sum or a bound that folding put in."""
        kind = _NEW.get(node.target)  # type: ignore[arg-type]  # lookup by any key
        if kind is None:
            raise FoldError(f"folding made {node.target} of a node; report this")
        source: Any
        other: Any
        source, other = node.args
        made = self._node(kind, [self.names[self._value(source)], ""], self.names[node])
        if isinstance(other, fx.Node) and other.op == "get_attr":
            self._wish(made, 1, "", str(other.target))
        else:
            made.input[1] = self.names[self._value(other)]
        self.nodes.append(made)

    def _emit_sum(self, product: onnx.NodeProto, node: fx.Node, origin: Origin) -> None:
        """The bias of a MatMul, in the Add behind it or in a new one."""
        bias = argument(node, 2, "bias")
        if not isinstance(bias, fx.Node):
            return
        if origin.sum is None:
            inner = self._fresh(f"{product.output[0]}_product")
            made = self._node("Add", [inner, ""], product.output[0])
            product.output[0], at, old = inner, 1, ""
        else:
            made, inner = _copy(self.old[origin.sum]), product.output[0]
            at = 1 if made.input[0] == inner else 0
            made.output[0], old = self.names[node], made.input[at]
            self.places[id(made)] = origin.sum
        if self._is_new(str(bias.target), old):
            self._wish(made, at, old, str(bias.target))
        self.nodes.append(made)

    def _node(self, kind: str, inputs: list[str], output: str) -> onnx.NodeProto:
        name = self._fresh(f"{output}_{kind}")
        self.done.added.append(name)
        return onnx.helper.make_node(kind, inputs, [output], name=name)

    def _fill(self, made: onnx.NodeProto, node: fx.Node, slot: Slot) -> None:
        value = argument(node, slot.position, slot.name)
        if slot.member is not None:
            value = value[slot.member]
        if value is None:
            return
        old = made.input[slot.at] if slot.at < len(made.input) else ""
        if slot.restore is None:
            made.input[slot.at] = self.names[self._value(value)]
            return
        if value.op != "get_attr":
            raise FoldError(f"a parameter of {made.name!r} is computed; report this")
        name = str(value.target)
        if self._is_new(name, old):
            while len(made.input) <= slot.at:
                made.input.append("")
            self._wish(made, slot.at, old, name, slot)

    def _is_new(self, name: str, old: str) -> bool:
        """Whether a parameter is not what the file has under its name."""
        was = self.read.parameters.get(name)
        if was is None or was[1] != old:
            return True
        now = self.folded.get_parameter(name)
        return now.dtype is not was[0].dtype or now.data_ptr() != was[0].data_ptr()

    def _wish(
        self, made: onnx.NodeProto, at: int, old: str, name: str, slot: Slot | None = None
    ) -> None:
        value = _tensor(self.folded, name)
        restore = slot.restore if slot is not None else None
        value = restore(value) if restore is not None else value
        path, _, leaf = name.rpartition(".")
        self.wishes.append(_Wish(made, at, old, f"{unescaped(path)}.{leaf}", value))

    def _rename_outputs(self, made: onnx.NodeProto, node: fx.Node, origin: Origin) -> None:
        """Outputs have the names of what now gives them."""
        now = {node.meta[VALUE]: self.names[node]} if VALUE in node.meta else {}
        queue = list(node.users)
        while queue:
            user = queue.pop()
            if user.meta.get(PART) == origin.index:
                if VALUE in user.meta:
                    now[user.meta[VALUE]] = self.names[user]
                else:
                    queue += user.users
        if origin.sum is not None:
            return
        for at, name in enumerate(made.output):
            made.output[at] = now.get(name, name)
        if node in self.names and len(made.output) == 1:  # it may give what another node gave
            made.output[0] = self.names[node]

    # -- tensors -------------------------------------------------------------------------------

    def _grant(self) -> None:
        """Store new values: in place of the old one where all its readers want the same."""
        wanted = {(id(wish.node), wish.at) for wish in self.wishes}
        plain = {
            name
            for node in self.nodes
            for at, name in enumerate(node.input)
            if (id(node), at) not in wanted
        }
        plain |= self.read.pinned
        by_old: dict[str, list[_Wish]] = {}
        for wish in self.wishes:
            by_old.setdefault(wish.old, []).append(wish)
        for old, wishes in by_old.items():
            groups = list(_equal(wishes)) if old else [[wish] for wish in wishes]
            for group in groups:
                alone = old and len(groups) == 1 and old not in plain
                name = old if alone and self._replace(old, group[0].value) else ""
                name = name or self._add(group[0])
                for wish in group:
                    wish.node.input[wish.at] = name

    def _add(self, wish: _Wish) -> str:
        reader = wish.node.name or wish.node.output[0]
        name = self._fresh(f"{wish.old}_of_{reader}" if wish.old else wish.name)
        self._store(self._initializer(name, wish.value), name, wish.value)
        self.done.added.append(name)
        return name

    def _initializer(self, name: str, value: Tensor) -> onnx.TensorProto:
        if self.done.model.ir_version < 4:  # initializers had to be inputs too
            self.graph.input.append(_typed(name, value))
        made: onnx.TensorProto = self.graph.initializer.add()
        return made

    def _replace(self, name: str, value: Tensor) -> bool:
        """Store a value under the name that the old one has; False where that cannot be."""
        place = next((t for t in self.graph.initializer if t.name == name), None)
        if place is None:
            maker = next((node for node in self.nodes if name in node.output), None)
            if maker is None or len(maker.output) != 1:
                return False
            if maker.op_type == "Constant":
                del maker.attribute[:]
                place = maker.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
            else:
                self.nodes.remove(maker)
                place = self._initializer(name, value)
        for info in self.graph.input:
            if info.name == name:  # of an old file: its shape may be another now
                info.CopyFrom(_typed(name, value))
        self._store(place, name, value)
        self.done.changed.append(name)
        return True

    def _store(self, place: onnx.TensorProto, name: str, value: Tensor) -> None:
        place.Clear()
        place.name, place.data_type = name, element_type(value.dtype)
        place.dims.extend(value.shape)
        self.done.tensors[name] = value

    # -- what is not needed any more -------------------------------------------------------------

    def _sweep(self) -> None:
        """Erase constants that only what has gone did read, and claims about names that went."""
        before = self.before
        kept = {value.name for value in self.graph.output}
        if self.done.model.ir_version >= 4:  # a caller may override what is an input too
            kept |= {value.name for value in self.graph.input}
        while True:
            read = set(_read(self.nodes))
            dead = [
                node
                for node in self.nodes
                if node.output
                and all(not n or (n in before and n not in read | kept) for n in node.output)
            ]
            if not dead:
                break
            dropped = {id(node) for node in dead}
            self.nodes = [node for node in self.nodes if id(node) not in dropped]
        stale = {t.name for t in self.graph.initializer if t.name in before - read - kept}
        stale |= {t.values.name for t in self.graph.sparse_initializer} & (before - read - kept)
        _keep(self.graph.initializer, lambda t: t.name not in stale)
        _keep(self.graph.sparse_initializer, lambda t: t.values.name not in stale)
        if self.done.model.ir_version < 4:
            _keep(self.graph.input, lambda v: v.name not in stale)
        known = {name for node in self.nodes for name in node.output}
        known |= {t.name for t in self.graph.initializer} | {v.name for v in self.graph.input}
        _keep(self.graph.value_info, lambda v: v.name in known and v.name not in self._resized())
        _keep(self.graph.quantization_annotation, lambda a: a.tensor_name in known)

    def _resized(self) -> set[str]:
        return set(self.done.tensors)


def _set_window(made: onnx.NodeProto, node: fx.Node, weight: Tensor) -> None:
    """The window of a convolution that several became, where a node is one."""
    if made.op_type != "Conv":
        return
    call, spatial = arguments(node), weight.dim() - 2
    window = {
        "kernel_shape": list(weight.shape[2:]),
        "strides": numbers(call["stride"], spatial),
        "pads": numbers(call["padding"], spatial) * 2,
        "dilations": numbers(call["dilation"], spatial),
        "group": call["groups"],
    }
    _keep(made.attribute, lambda a: a.name not in (*window, "auto_pad"))
    made.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in window.items())


def _typed(name: str, value: Tensor) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, element_type(value.dtype), list(value.shape))


def _equal(wishes: Iterable[_Wish]) -> Iterator[list[_Wish]]:
    """Wishes for equal values together."""
    groups: list[list[_Wish]] = []
    for wish in wishes:
        for group in groups:
            value = group[0].value
            if value.dtype is wish.value.dtype and torch.equal(value, wish.value):
                group.append(wish)
                break
        else:
            groups.append([wish])
    yield from groups


def _tensor(module: fx.GraphModule, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Any = getattr(module.get_submodule(path), leaf)
    assert isinstance(value, Tensor)
    return value.detach()


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made


def _keep(entries: Any, wanted: Any) -> None:
    for at in reversed(range(len(entries))):
        if not wanted(entries[at]):
            del entries[at]


def _read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of the values that nodes and their subgraphs read."""
    for node in nodes:
        yield from node.input
        yield from captured(node)


def _all_names(model: onnx.ModelProto) -> set[str]:
    """Names of nodes and values, in all graphs."""
    found: set[str] = set()
    for graph, _ in graphs_of(model):
        found.update(v.name for v in (*graph.input, *graph.output, *graph.value_info))
        found.update(t.name for t in graph.initializer)
        for node in graph.node:
            found.update((node.name, *node.input, *node.output))
    return found
