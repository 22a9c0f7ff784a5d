"""One ONNX node on its way to a call of torch: its inputs, its attributes, the calls it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from bnfx.onnx_files.foreign import Language
from bnfx.onnx_files.tensors import dtype_of

#: node.meta key of the call that stands for an ONNX node: its `Origin`.
ORIGIN = "bnfx_onnx_origin"
#: node.meta key of a call that only helps the one of an ONNX node: the index of that node. Where
#: it gives no value of the file, it passes on what its first argument is.
PART = "bnfx_onnx_part"
#: node.meta key: the name of the ONNX value that a call gives.
VALUE = "bnfx_onnx_value"
#: node.meta key of a layer that several became: its window is no node's of the file.
RESIZED = "bnfx_onnx_resized"
#: node.meta key of calls that give arrays of sizes, no tensors.
SIZES = "bnfx_onnx_sizes"

#: Characters that a path of modules can't hold, and those that stand for them in a graph.
#: They are printable, so that `repr` leaves them, and hardly in use.
_ESCAPES = {".": "\u2024", '"': "\u02ba", "\\": "\u29f5", "\n": "\u2424", "\r": "\u240d"}
_ESCAPES["'"] = "\u02bc"
_MARK = "\u27d0"  # so that no name of a node is one that modules have already

Restore = Callable[[Tensor], Tensor]


class NoFunction(Exception):
    """Torch has no function that computes what a node does."""


def escaped(name: str) -> str:
    """A name of a node as a path of modules."""
    return _MARK + "".join(_ESCAPES.get(c, c) for c in name)


def unescaped(words: str) -> str:
    """Words about a graph with the names as they stand in the file."""
    for theirs, ours in _ESCAPES.items():
        words = words.replace(ours, theirs)
    return words.replace(_MARK, "")


@dataclass(frozen=True)
class Slot:
    """An input of an ONNX node among the arguments of its call."""

    #: Which input.
    at: int
    #: Where the argument stands.
    position: int
    #: Its name, where it is given by name.
    name: str
    #: Which element, where the argument is a list.
    member: int | None = None
    #: How the tensor in the call becomes the one in the file; None for data.
    restore: Restore | None = None


@dataclass(frozen=True)
class Origin:
    """The ONNX node that a call stands for."""

    #: Its place in the file.
    index: int
    #: The function or the method that it was imported as.
    target: Any
    #: Its inputs.
    slots: tuple[Slot, ...]
    #: Place of the Add that holds the bias of a MatMul; None without any.
    sum: int | None = None
    #: Position of an argument -> the name that it must have, since a subgraph reads it.
    held: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Known:
    """What ONNX infers of a value: its element type, and its sizes, None where they are open."""

    elem_type: int
    shape: tuple[int | None, ...] | None


@dataclass
class Scope:
    """What is known of the values of a graph while its nodes are imported."""

    graph: fx.Graph
    root: nn.Module
    nodes: list[onnx.NodeProto]
    language: Language
    titles: dict[int, str]
    #: Values that are computed, by name.
    values: dict[str, fx.Node] = field(default_factory=dict)
    #: Values that never change, by name.
    constants: dict[str, Tensor] = field(default_factory=dict)
    #: Parameter of the graph -> its value, and the name of the value in the file.
    parameters: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    #: Name of a value -> indices of the nodes that read it, once for each time.
    readers: dict[str, list[int]] = field(default_factory=dict)
    #: Name of a value -> index of the node that gives it.
    makers: dict[str, int] = field(default_factory=dict)
    #: Names that something else than an input of a node refers to: outputs, subgraphs.
    pinned: set[str] = field(default_factory=set)
    #: Index of a BatchNormalization that is no affine map -> why.
    refused: dict[int, str] = field(default_factory=dict)

    def is_computed(self, name: str) -> bool:
        """Whether a value depends on the inputs."""
        return name in self.values and name not in self.constants

    def read(self, path: str, value: Tensor, source: str) -> fx.Node:
        """A parameter of the graph at a path of its own."""
        owner, _, leaf = path.rpartition(".")
        if owner not in self.root._modules:
            self.root.add_module(owner, nn.Module().eval())
        module = self.root._modules[owner]
        assert module is not None
        while leaf in module._parameters:
            leaf += "_"
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        self.parameters[f"{owner}.{leaf}"] = value, source
        return self.graph.get_attr(f"{owner}.{leaf}")


class Call:
    """One node to import."""

    def __init__(self, scope: Scope, index: int) -> None:
        self.scope, self.index, self.node = scope, index, scope.nodes[index]
        self.opset = scope.language.version("")
        self.path = escaped(scope.titles[index])
        self.slots: list[Slot] = []
        self.sum: int | None = None
        #: What the node always gives, where that is known though it reads what is computed.
        self.result: Tensor | None = None

    # -- inputs --------------------------------------------------------------------------------

    def name_of(self, at: int) -> str:
        """Name of an input, "" where it is left out."""
        return str(self.node.input[at]) if at < len(self.node.input) else ""

    def constant(self, at: int) -> Tensor | None:
        """The value of an input that never changes."""
        return self.scope.constants.get(self.name_of(at))

    def wanted(self, at: int) -> Tensor:
        """The value of an input that must be constant."""
        value = self.constant(at)
        if value is None:
            raise NoFunction
        return value

    def numbers(self, at: int) -> tuple[int, ...]:
        """The integers of an input that must be constant."""
        return tuple(int(n) for n in self.wanted(at).reshape(-1).tolist())

    def sizes_in(self, at: int) -> Any:
        """An input of integers as a tuple, or as a call that gives one."""
        if self.constant(at) is not None:
            return self.numbers(at)
        source = self._computed(at)
        if SIZES not in source.meta:
            raise NoFunction
        made = self.part(as_tuple, source)
        made.meta[SIZES] = True
        return made

    def data(self, at: int = 0, position: int = 0, name: str = "input") -> fx.Node:
        """An input that is computed, as an argument of the call to come."""
        source = self._computed(at)
        self.slots.append(Slot(at, position, name))
        return self.part(as_tensor, source) if SIZES in source.meta else source

    def operand(self, at: int, position: int, name: str) -> fx.Node:
        """An input that is computed or constant."""
        if self.constant(at) is None:
            return self.data(at, position, name)
        return self.parameter(at, position, name)

    def member(self, at: int, place: int) -> fx.Node:
        """An input that is computed or constant, as an element of the first argument."""
        value = self.constant(at)
        if value is not None:
            return self.scope.read(f"{self.path}.input_{at}", value, self.name_of(at))
        source = self._computed(at)
        self.slots.append(Slot(at, 0, "tensors", member=place))
        return self.part(as_tensor, source) if SIZES in source.meta else source

    def parameter(
        self,
        at: int,
        position: int,
        name: str,
        value: Tensor | None = None,
        restore: Restore | None = None,
    ) -> fx.Node:
        """A constant input as a parameter of the call; `restore` turns `value` into the input's."""
        value = self.wanted(at) if value is None else value
        self.room_for(at, position, name, restore)
        return self.scope.read(f"{self.path}.{name}", value, self.name_of(at))

    def room_for(self, at: int, position: int, name: str, restore: Restore | None = None) -> None:
        """Say where a parameter goes, if only one that the node does not have yet."""
        self.slots.append(Slot(at, position, name, restore=restore or _same))

    def _computed(self, at: int) -> fx.Node:
        if not self.scope.is_computed(self.name_of(at)):
            raise NoFunction
        return self.scope.values[self.name_of(at)]

    # -- attributes and what is known ------------------------------------------------------------

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute; text as text."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def shape(self, at: int = 0) -> tuple[int | None, ...]:
        """The sizes of an input, None where they are open; its rank must be known."""
        known = self.scope.known.get(self.name_of(at))
        if known is None or known.shape is None:
            raise NoFunction
        return known.shape

    def rank(self, at: int = 0) -> int:
        """The number of axes of an input."""
        value = self.constant(at)
        return value.dim() if value is not None else len(self.shape(at))

    def axis(self, axis: int, at: int = 0) -> int:
        """An axis from the front."""
        return axis + self.rank(at) if axis < 0 else axis

    def only_output(self) -> None:
        """Of outputs that may be left out, none but the first is there."""
        if any(self.node.output[1:]):
            raise NoFunction

    # -- calls ---------------------------------------------------------------------------------

    def part(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call that helps the one of the node; its first argument is what it passes on."""
        made = self.scope.graph.call_function(function, args, kwargs)
        return self._marked(made, PART, self.index)

    def part_method(self, name: str, *args: Any) -> fx.Node:
        """Likewise, as a method of the first argument."""
        return self._marked(self.scope.graph.call_method(name, args), PART, self.index)

    def size(self, x: fx.Node) -> fx.Node:
        """The sizes of a tensor, which no gauge touches."""
        return self.part_method("size", x)

    def sizes(self, function: Any, *args: Any) -> fx.Node:
        """A call that computes with sizes."""
        made = self.part(function, *args)
        made.meta[SIZES] = True
        return made

    def main(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The call that stands for the node."""
        made = self.scope.graph.call_function(function, args, kwargs)
        return self._marked(made, ORIGIN, self._origin(function))

    def method(self, name: str, *args: Any) -> fx.Node:
        """Likewise, as a method of the first argument."""
        return self._marked(self.scope.graph.call_method(name, args), ORIGIN, self._origin(name))

    def _origin(self, target: Any) -> Origin:
        return Origin(self.index, target, tuple(self.slots), self.sum)

    def _marked(self, made: fx.Node, key: str, value: Any) -> fx.Node:
        made.meta[key] = value
        made.meta["nn_module_stack"] = {self.path: (self.path, "")}
        return made


def _same(value: Tensor) -> Tensor:
    return value


def as_tuple(sizes: Any) -> tuple[int, ...]:
    """An array of sizes as torch takes them."""
    return tuple(int(n) for n in np.asarray(sizes).reshape(-1))


def as_tensor(sizes: Any) -> Tensor:
    """An array of sizes as a tensor."""
    array = np.asarray(sizes)
    kind = dtype_of(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    return torch.tensor(array.tolist(), dtype=kind)
