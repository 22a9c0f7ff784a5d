"""An exported program as an inference graph, and the edited graph as a program again.

A `torch.export.ExportedProgram` takes its parameters as inputs, and returns the new values of the
buffers that it changes. The graph that folding edits reads parameters by name. `opened` turns one
into the other: inputs that hold a tensor of the program become attributes, except those that it
changes; and every result, such new values too, is an output, so that none may differ. `closed` goes
back, and keeps what was not edited: names, sizes, guards, trees, metadata.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)

from bnfx.errors import CaptureError
from bnfx.graphs.baked import bake_weights
from bnfx.graphs.grad_modes import inline_grad_modes
from bnfx.graphs.inference import Captured
from bnfx.graphs.parameters import attribute, set_tensor
from bnfx.graphs.sizes import concrete
from bnfx.graphs.spelling import spell_linear, spell_natively, spell_products

_aten = torch.ops.aten
_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_CHANGED = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
#: What passes write as functions of torch, as programs have it.
_OVERLOADS: dict[Any, Any] = {
    torch.add: _aten.add.Tensor,
    torch.maximum: _aten.maximum.default,
    torch.minimum: _aten.minimum.default,
}


@dataclass(frozen=True)
class Opened:
    """A program as a graph to fold."""

    program: ExportedProgram
    captured: Captured
    #: What it holds, by the name that its signature has for it: parameters share their storage
    #: with the program's, what a run may change is a copy.
    tensors: dict[str, Any]
    #: Values at the borders of modules whose call signature the program preserves; the graph
    #: returns them behind its outputs.
    borders: tuple[fx.Node, ...]


def opened(program: ExportedProgram) -> Opened:
    """The graph of `program`, which stays as it is.

    Raises:
        CaptureError: Its operators are not ATen's.
    """
    if program.dialect not in ("ATEN", "TRAINING"):
        raise CaptureError(
            f"this exported program is in the dialect {program.dialect}, whose operators are not "
            "ATen's; give the program that it was lowered from, and lower the result"
        )
    root, graph = nn.Module(), fx.Graph()
    for name, part in program.graph_module.named_children():
        root.add_module(name, copy.deepcopy(part))
    values: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in _held_only(program)}
    tensors = _copied({**program.constants, **program.state_dict})
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None:
            values[node] = graph.node_copy(node, values.__getitem__)
            continue
        assert spec.target is not None
        value = tensors[spec.target]
        trained = isinstance(value, nn.Parameter)
        set_tensor(root, spec.target, value, trained=value.requires_grad, buffer=not trained)
        values[node] = graph.create_node("get_attr", spec.target, name=node.name)
        values[node].meta = dict(node.meta)
    borders = _borders(program)
    [out] = graph.find_nodes(op="output")
    results: Any = out.args[0]
    out.args = ((*results, *(values[node] for node in borders)),)
    module = fx.GraphModule(root, graph)
    for part in module.modules():
        part.training = False  # modes are arguments of calls
    inline_grad_modes(module)
    spell_linear(module)
    bake_weights(module)
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    first, *others = concrete(inputs, program.range_constraints)
    return Opened(program, Captured(module, first, tuple(others)), tensors, borders)


def closed(source: Opened, edited: fx.GraphModule) -> ExportedProgram:
    """`edited` as a program that is as the source otherwise."""
    program, signature = source.program, source.program.graph_signature
    read = _read(edited)
    specs = _specs(source, edited, read)
    graph = _lifted(program, edited, specs, read)
    [out] = graph.find_nodes(op="output")
    results: Any = out.args[0]
    count = len(signature.output_specs)
    out.args = (results[:count],)
    outputs = [
        replace(spec, arg=TensorArgument(value.name))
        if isinstance(spec.arg, TensorArgument)
        else spec
        for spec, value in zip(signature.output_specs, results, strict=False)
    ]
    calls = copy.deepcopy(program.module_call_graph)
    names = {a.name: b.name for a, b in zip(source.borders, results[count:], strict=True)}
    for argument in _arguments(calls):
        argument.name = names.get(argument.name, argument.name)
    module = fx.GraphModule(edited, graph)
    module.meta.update(program.graph_module.meta)
    state, constants = _stored(source, specs, read)
    done = ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )
    done._guards_code = list(program._guards_code)  # those of a file are nowhere else
    return done


def _copied(held: dict[str, Any]) -> dict[str, Any]:
    """The same with copies of buffers and constants; those that share memory go on sharing it."""
    memo: dict[int, Any] = {}
    return {
        name: copy.deepcopy(value, memo) if type(value) is Tensor else value
        for name, value in held.items()
    }


def _held_only(program: ExportedProgram) -> Iterator[InputSpec]:
    """The inputs that are tensors of the program and that stay as they are."""
    signature = program.graph_signature
    changed = {spec.target for spec in signature.output_specs if spec.kind in _CHANGED}
    for spec in signature.input_specs:
        if spec.kind in _HELD and spec.target not in changed:
            yield spec


def _arguments(calls: Sequence[Any]) -> Iterator[Any]:
    """What goes into and comes out of the modules whose call signature is preserved."""
    for entry in calls:
        if entry.signature is not None:
            yield from (*entry.signature.inputs, *entry.signature.outputs)


def _borders(program: ExportedProgram) -> tuple[fx.Node, ...]:
    names = {argument.name for argument in _arguments(program.module_call_graph)}
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return tuple(node for node in calls if node.name in names)


def _read(edited: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that the graph reads, by name."""
    names = (str(node.target) for node in edited.graph.nodes if node.op == "get_attr")
    values = ((name, attribute(edited, name)) for name in names)
    return {name: value for name, value in values if isinstance(value, Tensor)}


def _specs(source: Opened, edited: fx.GraphModule, read: Mapping[str, Tensor]) -> list[InputSpec]:
    """The inputs that are left, and those that are new behind the last of their kind."""
    program = source.program
    held = {str(spec.target): spec for spec in _held_only(program)}
    gone = _unread(source, held, read)
    specs = [spec for spec in program.graph_signature.input_specs if spec.target not in gone]
    taken = {node.name for node in (*program.graph.nodes, *edited.graph.nodes)}
    for name, value in read.items():
        if name in held:
            continue
        trained = isinstance(value, nn.Parameter)
        kind = InputKind.PARAMETER if trained else InputKind.BUFFER
        wanted = re.sub(r"\W", "_", f"{'p' if trained else 'b'}_{name}")  # paths may hold dashes
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        at = max((i + 1 for i, spec in enumerate(specs) if spec.kind is kind), default=0)
        specs.insert(at, InputSpec(kind, TensorArgument(wanted), name, None if trained else True))
    return specs


def _unread(
    source: Opened, held: Mapping[str, InputSpec], read: Mapping[str, Tensor]
) -> set[str | None]:
    """Names that lost their last reader, and what nobody read beside them.

    That is another name of the same tensor, or what a BatchNorm counted whose statistics are gone.
    """
    inputs = (node for node in source.program.graph.nodes if node.op == "placeholder")
    before = {node.name for node in inputs if node.users}
    gone = {name for name, s in held.items() if s.arg.name in before and name not in read}
    paths = (name.rpartition("running_mean") for name in gone)
    counts = {f"{path}num_batches_tracked" for path, leaf, rest in paths if leaf and not rest}
    lost = {id(source.tensors[name]) for name in held if name in gone or name in counts}
    beside = (name for name in held if id(source.tensors[name]) in lost)
    return {*gone, *(name for name in beside if held[name].arg.name not in before)}


def _stored(
    source: Opened, specs: Sequence[InputSpec], read: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and constants, edited: a tensor that has several names has them still."""
    program, before, left = source.program, source.tensors, {spec.target for spec in specs}
    gone = {str(spec.target) for spec in _held_only(program) if spec.target not in left}
    first = {id(before[name]): name for name in (*gone, *read) if name in before}
    found: list[dict[str, Any]] = []
    for names in (program.state_dict, program.constants):
        own = {n: n if n in read else first.get(id(before[n]), n) for n in names}
        stays = {n: o for n, o in own.items() if n in left or o not in gone}
        found.append({n: read.get(o, before[n]) for n, o in stays.items()})
    state, constants = found
    state |= {name: value for name, value in read.items() if name not in before}
    return state, constants


def _lifted(
    program: ExportedProgram,
    edited: fx.GraphModule,
    specs: Sequence[InputSpec],
    read: Mapping[str, Tensor],
) -> fx.Graph:
    """The graph with an input for each spec, spelled as programs are, with fake values."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    old = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    theirs = iter([node for node in edited.graph.nodes if node.op == "placeholder"])
    mode = detect_fake_mode([n.meta.get("val") for n in program.graph.nodes]) or FakeTensorMode()
    held: dict[str | None, fx.Node] = {}
    own = [spec.arg.name for spec in _held_only(program)]
    for spec in specs:
        name, value = spec.arg.name, read.get(str(spec.target))
        node = held[spec.target] = graph.create_node("placeholder", name, name=name)
        node.name = name  # torch.fx would number `input`
        node.meta = dict(old[name].meta) if name in old else {}
        if value is not None and not _like(node.meta.get("val"), value):
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        elif value is None and name not in own:
            values[next(theirs)] = node
    for node in edited.graph.nodes:
        if node.op == "get_attr" and node.target in read:
            values[node] = held[node.target]
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, values.__getitem__)
    spell_natively(graph)
    spell_products(graph)
    for node in graph.nodes:
        _spell(node, mode)
    return graph


def _like(old: Any, new: Tensor) -> bool:
    return isinstance(old, Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype)


def _spell(node: fx.Node, mode: FakeTensorMode) -> None:
    """A call as programs have it: an overload, arguments in their place, and its fake value."""
    node.meta = {key: value for key, value in node.meta.items() if not key.startswith("bnfx_")}
    if node.op != "call_function":
        return
    target: Any = _OVERLOADS.get(node.target, node.target)
    node.target = target
    if isinstance(target, OpOverload):
        names = [a for a in target._schema.arguments if not a.kwarg_only][len(node.args) :]
        given = [at for at, a in enumerate(names, 1) if a.name in node.kwargs]
        kwargs = dict(node.kwargs)
        moved = [kwargs.pop(a.name, a.default_value) for a in names[: max(given, default=0)]]
        node.args, node.kwargs = (*node.args, *moved), kwargs
    if "val" not in node.meta:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        quiet = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
        with mode, quiet:
            node.meta["val"] = target(*args, **kwargs)
