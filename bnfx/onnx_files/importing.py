"""An ONNX graph as the graph of torch functions that folding reads.

Every node becomes one call of the function that computes it, its constants become parameters, and
where torch's function wants another form (a pad of its own, a transposed weight), the call says how
each of its arguments goes back into the node. What torch has no function for is a call that lets
nothing through (`bnfx.onnx_files.foreign`). Sizes that the graph computes stay computed: they are
arrays, and only tensors carry gauges.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from bnfx.onnx_files import element_functions, layer_functions, move_functions
from bnfx.onnx_files.expected import improve, inferred
from bnfx.onnx_files.foreign import Arithmetic, Foreign, Language, captured, same_domain
from bnfx.onnx_files.node_call import (
    ORIGIN,
    PART,
    SIZES,
    VALUE,
    Call,
    NoFunction,
    Origin,
    Scope,
    Slot,
    escaped,
)
from bnfx.onnx_files.tensors import of_array, tensor_of
from bnfx.operators.calls import words

#: Operators of the standard set that torch has a function for: how a call becomes one.
FUNCTIONS = {
    **layer_functions.FUNCTIONS,
    **element_functions.FUNCTIONS,
    **move_functions.FUNCTIONS,
}
_RANDOM = words(
    "RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli"
)


@dataclass(frozen=True)
class Imported:
    """The graph, and what of the file it stands for."""

    #: Its outputs are those of the file that are no constants, each once.
    module: fx.GraphModule
    #: The file's inputs, one for each placeholder.
    inputs: tuple[onnx.ValueInfoProto, ...]
    #: Names of the outputs.
    outputs: tuple[str, ...]
    #: Parameter -> its value, and the name of the value in the file.
    parameters: dict[str, tuple[Tensor, str]]
    #: Index of a node -> what it is called in reports.
    titles: dict[int, str]
    #: Index of a BatchNormalization that is no affine map -> why.
    refused: dict[int, str]
    #: Names that something else than an input of a node refers to.
    pinned: frozenset[str]
    #: Indices of the nodes that calls stand for; the others compute from constants alone.
    called: frozenset[int]


def imported(model: onnx.ModelProto, folder: Path) -> Imported:
    """The graph of a model whose external data lies in `folder`."""
    scope = _scope(model)
    inputs = _inputs(scope, model, folder)
    sums: set[int] = set()
    for index in range(len(scope.nodes)):
        if index not in sums and not _constant(scope, index, folder):
            sums |= {made} if (made := _call(scope, index)) is not None else set()
        improve(scope, index)
    outputs = tuple(dict.fromkeys(v.name for v in model.graph.output if v.name in scope.values))
    scope.graph.output(tuple(scope.values[name] for name in outputs))
    module = fx.GraphModule(scope.root, scope.graph, class_name="OnnxGraph").eval()
    return Imported(
        module=module,
        inputs=inputs,
        outputs=outputs,
        parameters=scope.parameters,
        titles=scope.titles,
        refused=scope.refused,
        pinned=frozenset(scope.pinned),
        called=frozenset(called_in(scope.graph)),
    )


def called_in(graph: fx.Graph) -> Iterator[int]:
    """The nodes of the file that the calls of a graph stand for."""
    for node in graph.nodes:
        origin = node.meta.get(ORIGIN)
        if isinstance(origin, Origin):
            yield from (origin.index,) if origin.sum is None else (origin.index, origin.sum)


def _scope(model: onnx.ModelProto) -> Scope:
    graph = model.graph
    scope = Scope(
        graph=fx.Graph(),
        root=nn.Module().eval(),
        nodes=list(graph.node),
        language=Language(tuple(model.opset_import), tuple(model.functions), model.ir_version),
        titles=titles_of(graph),
        known=inferred(model),
        pinned={value.name for value in graph.output},
    )
    for index, node in enumerate(scope.nodes):
        held = captured(node)
        scope.pinned.update(held)
        scope.makers.update((name, index) for name in node.output if name)
        for name in (*node.input, *held):
            scope.readers.setdefault(name, []).append(index)
    return scope


def titles_of(graph: onnx.GraphProto) -> dict[int, str]:
    """What nodes are called: by their names, or by their first output where those are no use."""
    seen: dict[str, int] = {}
    for node in graph.node:
        seen[node.name] = seen.get(node.name, 0) + 1
    found: dict[int, str] = {}
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        output = next((name for name in node.output if name), "")
        title = node.name if node.name and seen[node.name] == 1 else output or node.op_type
        while title in taken:
            title += "'"
        taken.add(title)
        found[index] = title
    return found


def _inputs(scope: Scope, model: onnx.ModelProto, folder: Path) -> tuple[onnx.ValueInfoProto, ...]:
    """Placeholders. An initializer that is an input too may be overridden since IR version 4."""
    stored = {t.name: t for t in model.graph.initializer}
    sparse = {t.values.name for t in model.graph.sparse_initializer}
    fixed = model.ir_version < 4
    inputs = [v for v in model.graph.input if not (fixed and v.name in stored)]
    for at, value in enumerate(inputs):
        readable = re.sub(r"\W", "_", value.name, flags=re.ASCII)
        scope.values[value.name] = scope.graph.placeholder(f"input_{at}_{readable}")
        scope.values[value.name].meta[VALUE] = value.name
    for name in (*stored, *sparse):
        values = tensor_of(stored[name], folder) if name in stored else None
        if name not in scope.values:
            _know(scope, name, values)
    return tuple(inputs)


def _know(scope: Scope, name: str, values: Tensor | None) -> None:
    """Note a constant. Where torch does not have its type, whatever reads it is foreign."""
    if values is not None:
        scope.constants[name] = values
        return
    scope.values[name] = scope.graph.call_function(_unreadable, ())
    scope.values[name].meta[VALUE] = name


def _unreadable() -> Any:
    raise ValueError("its type is none of torch's")


# -- constants -------------------------------------------------------------------------------------


def _constant(scope: Scope, index: int, folder: Path) -> bool:
    """Whether the node computes from constants alone; its results are constants then."""
    node = scope.nodes[index]
    ours = same_domain(node.domain, "")
    if node.op_type == "Constant" and ours:
        _know(scope, node.output[0], _value_of(node.attribute[0], folder))
        return True
    read = [name for name in (*node.input, *captured(node)) if name]
    if not read or any(name not in scope.constants for name in read) or node.op_type in _RANDOM:
        return False
    if ours and (moved := _moved(scope, node)) is not None:
        scope.constants[node.output[0]] = moved
        return True
    known = {name: scope.constants[name] for name in read}
    try:
        arrays = Foreign(node, scope.language, known, ()).compute(())
    except Exception:  # noqa: BLE001  # onnx's reference raises anything; the node stays a call
        return False
    made = [of_array(array) for array in arrays]
    if any(value is None for value in made):
        return False
    for name, value in zip([name for name in node.output if name], made, strict=True):
        _know(scope, name, value)
    return True


def _value_of(attribute: onnx.AttributeProto, folder: Path) -> Tensor | None:
    """What a node Constant holds."""
    if attribute.name == "value":
        return tensor_of(attribute.t, folder)
    kinds = {"value_float": torch.float32, "value_floats": torch.float32}
    kinds |= {"value_int": torch.int64, "value_ints": torch.int64}
    if attribute.name not in kinds:
        return None
    return torch.tensor(onnx.helper.get_attribute_value(attribute), dtype=kinds[attribute.name])


def _moved(scope: Scope, node: onnx.NodeProto) -> Tensor | None:
    """What onnx's reference would copy, or does not compute for all versions."""
    value = scope.constants[node.input[0]]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Identity":
        return value
    if node.op_type == "Transpose":
        return value.permute(attributes.get("perm") or tuple(reversed(range(value.dim()))))
    if node.op_type != "DequantizeLinear" or attributes.get("block_size"):
        return None
    scale = scope.constants[node.input[1]]
    zero = scope.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
    if scale.numel() > 1:
        view = [1] * value.dim()
        view[attributes.get("axis", 1)] = -1
        scale, zero = scale.reshape(view), zero.reshape(view) if zero is not None else None
    wide = value.to(scale.dtype) if zero is None else (value.int() - zero.int()).to(scale.dtype)
    return wide * scale


# -- calls -----------------------------------------------------------------------------------------


#: A node is what no rule knows, or it lacks what its operator needs, or sizes do not fit, which
#: nobody can run: it stays as it is.
_NOT_MADE = (NoFunction, IndexError, RuntimeError, TypeError, ValueError)


def _call(scope: Scope, index: int) -> int | None:
    """Import a node; the place of another one that went into the same call."""
    node, call = scope.nodes[index], Call(scope, index)
    read = [scope.values[name] for name in node.input if scope.is_computed(name)]
    plain = same_domain(node.domain, "") and node.op_type in FUNCTIONS
    sizes = bool(read) and all(SIZES in value.meta for value in read)
    if not plain or sizes:
        made = _foreign(call)
    else:
        try:
            made = FUNCTIONS[node.op_type](call)
        except _NOT_MADE:
            _forget(scope, index)
            call = Call(scope, index)
            made = _foreign(call)
    names = node.output if call.sum is None else scope.nodes[call.sum].output
    for name, value in zip(names, made if isinstance(made, list) else [made], strict=False):
        if name:
            scope.values[name] = value
            value.meta[VALUE] = name
    if call.result is not None:
        scope.constants[names[0]] = call.result
    return call.sum


def _forget(scope: Scope, index: int) -> None:
    """Erase what was made of a node that turned out to have no function."""
    path = escaped(scope.titles[index])
    for node in reversed(scope.graph.nodes):
        origin = node.meta.get(ORIGIN)
        own = node.op == "get_attr" and str(node.target).startswith(f"{path}.")
        if own or node.meta.get(PART) == index or (origin is not None and origin.index == index):
            scope.graph.erase_node(node)
    for name in [name for name in scope.parameters if name.startswith(f"{path}.")]:
        del scope.parameters[name]
    scope.root._modules.pop(path, None)


def _foreign(call: Call) -> fx.Node | list[fx.Node]:
    """A call that lets nothing through, or that computes with sizes."""
    node, scope, held = call.node, call.scope, captured(call.node)
    read = [n for n in dict.fromkeys((*node.input, *held)) if scope.is_computed(n)]
    names = [n for n in dict.fromkeys((*node.input, *held)) if n in scope.constants]
    constants = {name: scope.constants[name] for name in names}
    sizes = bool(read) and all(SIZES in scope.values[name].meta for name in read)
    kind = Arithmetic if sizes and node.op_type not in _RANDOM else Foreign
    made = call.main(
        kind(node, scope.language, constants, read), *(scope.values[name] for name in read)
    )
    place = {name: at for at, name in enumerate(read)}
    made.meta[ORIGIN] = replace(
        made.meta[ORIGIN],
        slots=tuple(Slot(at, place[n], "") for at, n in enumerate(node.input) if n in place),
        held=tuple((place[name], name) for name in held if name in place),
    )
    outputs = [name for name in node.output if name]
    if len(outputs) == 1:
        results = {outputs[0]: made}
    else:
        results = {n: call.part(operator.getitem, made, at) for at, n in enumerate(outputs)}
    if kind is Arithmetic:
        for result in (made, *results.values()):
            result.meta[SIZES] = True
    return [results.get(name, made) for name in node.output]
