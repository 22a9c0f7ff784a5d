"""Example inputs from the command line: `name:1x3x224x224[:dtype[:low..high]]`, or an `.npz`."""

from __future__ import annotations

import copy
import inspect
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfx.cli.checks import check_archive
from bnfx.cli.specs import DTYPES, Drawn, parse_dynamic, parse_input
from bnfx.errors import UsageError
from bnfx.graphs.examples import clone
from bnfx.inspection import InspectReport


@dataclass(frozen=True)
class Inputs:
    """Example inputs bound to a model's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    #: Names of the ONNX inputs, in order; None leaves them to the exporter.
    names: tuple[str, ...] | None
    #: All of it by name, in order.
    values: Mapping[str, Tensor]


def parse_inputs(specs: Sequence[str]) -> dict[str, Tensor]:
    """Tensors by name from the values of `--input`; drawn from a fixed seed.

    Raises:
        UsageError: A spec cannot be read, a name stands twice, a file is not an `.npz` of arrays.
    """
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        given = _from_npz(Path(spec)) if spec.endswith(".npz") else _from_spec(spec, generator)
        if twice := sorted(set(found) & set(given)):
            raise UsageError(f"input {twice[0]!r} is given twice")
        found.update(given)
    return found


def _from_spec(spec: str, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = parse_input(spec)
    return {drawn.name: _draw(drawn, generator)}


def _draw(drawn: Drawn, generator: torch.Generator) -> Tensor:
    """Normal floats, uniform ones inside bounds; integers from bounds, or of 0 and 1.

    An embedding of two rows takes 0 and 1.
    """
    shape, bounds, dtype = drawn.shape, drawn.bounds, getattr(torch, drawn.dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if not dtype.is_floating_point:
        low, high = bounds or (0, 1)
        top = min(math.floor(high), 2**63 - 2)  # torch takes the number behind the last one
        return torch.randint(math.ceil(low), top + 1, shape, generator=generator).to(dtype)
    if bounds is None:
        return torch.randn(shape, generator=generator).to(dtype)
    unit = torch.rand(shape, generator=generator).double()
    return (bounds[0] * (1 - unit) + bounds[1] * unit).to(dtype)


def _from_npz(path: Path) -> dict[str, Tensor]:
    check_archive(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable .npz of arrays: {error}") from error
    if not arrays:
        raise UsageError(f"{path} holds no arrays")
    if empty := [name for name, array in arrays.items() if not array.size]:
        raise UsageError(f"{path}: array {empty[0]!r} is empty, which gives nothing to compute")
    try:
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    except TypeError as error:
        raise UsageError(f"{path} holds an array that torch has no dtype for: {error}") from error


def inputs_of(found: InspectReport) -> dict[str, Tensor]:
    """Inputs that fit an ONNX file; a free axis has size 1.

    Raises:
        UsageError: An input is no tensor of known rank and dtype.
    """
    specs = list[Drawn]()
    for name, kind in found.inputs.items():
        match = re.fullmatch(r"(\w+)\[(.*)\]", kind)
        if match is None or match[1] not in DTYPES:
            raise UsageError(f"{found.path}: give input {name!r} ({kind}) with --input")
        sizes = [size for size in match[2].split(",") if size]
        shape = tuple(max(int(size), 1) if size.isdecimal() else 1 for size in sizes)
        specs.append(Drawn(name, shape, match[1], None))
    generator = torch.Generator().manual_seed(0)
    return {drawn.name: _draw(drawn, generator) for drawn in specs}


def in_order(values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """`values` in the order of `names`, those of a file's inputs; other names go by position.

    Raises:
        UsageError: Some names are the file's and some are not, or their number is another.
    """
    wanted = list(names)
    if len(values) != len(wanted) or (set(values) & set(wanted) and set(values) != set(wanted)):
        raise UsageError(
            f"the inputs given are {', '.join(values)}; those of the file are {', '.join(wanted)}"
        )
    return {name: values[name] for name in wanted} if set(values) == set(wanted) else dict(values)


def require_fit(values: Iterable[Tensor], found: InspectReport, *, cast: bool) -> None:
    """Refuse tensors that are none of the inputs that a file declares.

    Args:
        values: The tensors, in order.
        found: The file.
        cast: Whether floats go into it in the dtype that it takes.

    Raises:
        UsageError: The rank, a fixed size or the kind of number of one is another.
    """
    for value, (name, kind) in zip(values, found.inputs.items(), strict=True):
        dtype, _, sizes = kind.rstrip("]").partition("[")
        wanted = [size for size in sizes.split(",") if size]
        declared = getattr(torch, dtype, value.dtype)
        floats = cast and declared.is_floating_point and value.is_floating_point()
        fits = len(wanted) == value.dim() and (floats or declared is value.dtype)
        fits = fits and all(
            not size.isdecimal() or int(size) == own
            for size, own in zip(wanted, value.shape, strict=True)
        )
        if not fits:
            shape = ",".join(map(str, value.shape))
            own = str(value.dtype).removeprefix("torch.")
            raise UsageError(f"{found.path} takes {name!r} as {kind}; given was {own}[{shape}]")


def bind(model: nn.Module, values: Mapping[str, Tensor]) -> Inputs:
    """Give `values` to the arguments of the model's forward.

    Where all names are arguments of the forward, each goes to its own. Where none is, they are
    positional in the order given, and their names become the names of the ONNX inputs.

    Raises:
        UsageError: Some names are arguments and some are not, or an argument is missing.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unknown = [name for name in values if name not in named]
    if unknown and len(unknown) < len(values):
        raise UsageError(
            f"input {unknown[0]!r} is no argument of {type(model).__name__}.forward, which takes "
            f"{', '.join(sorted(named))}; use those names, or other names for all of them"
        )
    if unknown or not values:
        return Inputs(tuple(values.values()), {}, tuple(values) or None, values)
    args: list[Tensor] = []
    kwargs = dict(values)
    for parameter in parameters:
        by_position = parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        )
        if not by_position or parameter.name not in kwargs:
            break
        args.append(kwargs.pop(parameter.name))
    ordered = {p.name: values[p.name] for p in parameters if p.name in values}
    return Inputs(tuple(args), kwargs, None, ordered)


def check_forward(model: nn.Module, inputs: Inputs) -> None:
    """Run a copy of the model once, so that inputs that do not fit are told from later failures.

    Raises:
        UsageError: The forward refuses them.
    """
    trial = clone(model)
    for part in trial.modules():
        part.training = False  # an exported graph refuses eval()
    try:
        with torch.no_grad():
            trial(*copy.deepcopy(inputs.args), **copy.deepcopy(dict(inputs.kwargs)))
    except Exception as error:  # a user's forward raises anything
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{type(model).__name__} does not take these inputs: {type(error).__name__}: {first}"
        ) from error


def dynamic_shapes(inputs: Inputs, specs: Sequence[str], *, batch: bool) -> Any:
    """`dynamic_shapes` of `torch.onnx.export`; None where every axis is fixed.

    Args:
        inputs: The inputs.
        specs: Values of `--dynamic`, NAME:AXIS=SYMBOL.
        batch: Whether axis 0 of every input is free.

    Raises:
        UsageError: A spec cannot be read, or names an input or axis that is not there.
    """
    if (specs or batch) and not inputs.values:
        raise UsageError("the free axes of a .pt2 file are those that it was exported with")
    axes: dict[str, dict[int, str]] = {name: {} for name in inputs.values}
    if batch:
        for name, value in inputs.values.items():
            if value.dim():
                axes[name][0] = "batch"
    for spec in specs:
        name, axis, symbol = parse_dynamic(spec)
        if name not in axes:
            raise UsageError(f"--dynamic {spec!r}: there is no input {name!r} among {list(axes)}")
        if axis >= inputs.values[name].dim():
            raise UsageError(f"--dynamic {spec!r}: {name!r} has {inputs.values[name].dim()} axes")
        axes[name][axis] = symbol
    if not any(axes.values()):
        return None
    if inputs.kwargs:
        return axes
    return tuple(axes[name] for name in inputs.values)
