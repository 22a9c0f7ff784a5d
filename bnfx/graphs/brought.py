"""What an exported program brings along where a module and its example inputs are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfx.errors import CaptureError


@dataclass(frozen=True)
class Brought:
    """A program as a module, with inputs to run it on."""

    #: It shares its tensors with the program.
    module: nn.Module
    #: Positional arguments; None where neither the program nor the caller has any.
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]
    #: Names of the free axes, as for `torch.onnx.export`; None where all are fixed.
    dynamic_shapes: Any


def brought(
    program: ExportedProgram, args: Any = None, kwargs: Mapping[str, Any] | None = None
) -> Brought:
    """`program`, with the inputs given or else with those that it was exported with."""
    module = program.module()
    for part in module.modules():
        part.training = False  # the modes of a BatchNorm are arguments of its calls
    if args is None and not kwargs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    if args is not None or kwargs:
        args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    return Brought(module, args, dict(kwargs or {}), _free_axes(program, module))


def needed(found: Brought) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Its arguments, and an error where there are none.

    Raises:
        CaptureError: There are none.
    """
    if found.args is None:
        raise CaptureError("this exported program holds no example inputs; give args")
    return found.args, found.kwargs


def _free_axes(program: ExportedProgram, module: nn.Module) -> Any:
    """The free axes of the program's inputs, one symbol one name; None if all are fixed."""
    names: dict[str, str] = {}
    axes: list[dict[int, str] | None] = []
    wanted = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in wanted:
            continue
        value = node.meta.get("val")
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        free = {axis: str(n) for axis, n in enumerate(sizes) if isinstance(n, torch.SymInt)}
        for axis, symbol in free.items():
            first = axis == 0 and "batch" not in names.values()
            names.setdefault(symbol, "batch" if first else f"dim_{len(names)}")
        named = {axis: names[symbol] for axis, symbol in free.items()}
        axes.append(named if isinstance(value, Tensor) else None)
    if not any(axes) or program.call_spec.in_spec is None:
        return None
    args, kwargs = pytree.tree_unflatten(axes, program.call_spec.in_spec)
    if not kwargs:
        return tuple(args)
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
