"""Names and open axes of what torch's exporter made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from onnxscript import ir
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from bnfx.errors import ExportError


def require_open(program: torch.onnx.ONNXProgram, model: nn.Module, dynamic_shapes: Any) -> None:
    """The exporter drops an axis that it was asked for as a `Dim` and that the model fixes."""
    exported = program.exported_program
    assert exported is not None
    names = exported.graph_signature.user_inputs
    args, kwargs = pytree.tree_unflatten(list(names), exported.call_spec.in_spec)
    shapes = {n.name: n.meta["val"].shape for n in exported.graph.nodes if n.name in names}
    bound: Any = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if isinstance(dynamic_shapes, tuple | list):
        bound = list(bound.values())
    for name, axis, asked in _axes_asked_for(bound, dynamic_shapes):
        if name in shapes and isinstance(shapes[name][axis], int):
            raise ExportError(
                f"axis {axis} of input {name!r} was asked for as {asked.__name__!r}, but the model "
                f"fixes it at {shapes[name][axis]}; leave it out of dynamic_shapes, or let the "
                "model take other sizes"
            )


def _axes_asked_for(names: Any, asked: Any) -> Iterator[tuple[str, int, Any]]:
    """Name, axis and `Dim` of each axis for which `asked`, built like `names`, has one."""
    several = isinstance(asked, Mapping | tuple | list)
    pairs = asked.items() if isinstance(asked, Mapping) else enumerate(asked if several else ())
    if isinstance(names, str):
        yield from ((names, axis, dim) for axis, dim in pairs if isinstance(dim, Dim))
        return
    for key, inner in pairs:
        known = key in names if isinstance(names, Mapping) else key < len(names)
        yield from _axes_asked_for(names[key], inner) if known else ()


def name_outputs(program: torch.onnx.ONNXProgram, given: Sequence[str]) -> None:
    """Give outputs the names that they have in what the model returns."""
    exported, graph = program.exported_program, program.model.graph
    assert exported is not None
    for value in graph.inputs:  # one that is returned gave its name to the output
        if str(value.name).removesuffix("_orig") in exported.graph_signature.user_inputs:
            value.name = str(value.name).removesuffix("_orig")
    spec = exported.call_spec.out_spec
    returned = [s for s in exported.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    names = [
        name
        for name, value in zip(_leaf_names(spec, ""), returned, strict=False)
        if not isinstance(value.arg, ConstantArgument)
    ]
    if len(names) != len(graph.outputs):
        return
    _own_outputs(graph)
    taken = {str(value.name) for value in graph.inputs} | set(graph.initializers) | set(given)
    new = dict(zip(graph.outputs, given, strict=False))
    for value, name in zip(graph.outputs[len(given) :], names[len(given) :], strict=True):
        while name in taken:  # an input is called so, say
            name += "_out"
        new[value] = name
        taken.add(name)
    for value in (value for node in graph.all_nodes() for value in node.outputs):
        if value not in new and value.name in new.values():
            value.name = f"{value.name}_inner"
    for value, name in new.items():
        value.name = name


def _own_outputs(graph: ir.Graph) -> None:
    """Let each output be a value of its own: not an input, nor a weight, nor another output."""
    seen = set()
    for i, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        seen.add(value)


def _leaf_names(spec: pytree.TreeSpec, prefix: str) -> Iterator[str]:
    """A name for each leaf of a result: its keys with lines between, or `output` and numbers."""
    if spec.is_leaf():
        yield prefix or "output"
        return
    keys = _keys(spec)
    start = prefix or ("" if keys else "output")
    for key, child in zip(keys or range(spec.num_children), spec.children(), strict=True):
        yield from _leaf_names(child, f"{start}_{key}" if start else str(key))


def _keys(spec: pytree.TreeSpec) -> list[str | int] | None:
    """The keys or fields of a container; None where it has none."""
    known: Any = spec.context  # the class of a named tuple
    known = getattr(known, "_fields", known)
    several = (known, *(known if isinstance(known, list) else ()))  # of a dataclass, a defaultdict
    for keys in several:
        fits = isinstance(keys, list | tuple) and len(keys) == spec.num_children
        if fits and all(isinstance(key, str | int) for key in keys):
            return list(keys)
    return None
