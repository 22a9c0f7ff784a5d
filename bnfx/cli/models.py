"""Models from the command line: `package.module:factory`, with a checkpoint, or a `.pt2` file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfx.cli import libraries
from bnfx.cli.checkpoints import load_checkpoint
from bnfx.cli.checks import no_module
from bnfx.cli.inputs import Inputs
from bnfx.cli.results import place
from bnfx.cli.specs import LIBRARIES, Factory, parse_factory
from bnfx.errors import CaptureError, ExportError, MissingPackageError, UsageError
from bnfx.graphs.brought import brought
from bnfx.text import meant


@dataclass(frozen=True)
class Loaded:
    """A model, and what its file says about its inputs."""

    model: nn.Module
    #: The program whose module it is, and whose graph has no modes; None for a factory.
    program: ExportedProgram | None = None
    #: The inputs that it was exported with; None for a factory.
    inputs: Inputs | None = None
    #: The free axes that it was exported with.
    dynamic_shapes: Any = None
    #: What was done to its checkpoint so that it fits.
    note: str = ""


def load_model(spec: str, checkpoint: Path | None = None, key: str | None = None) -> Loaded:
    """The model that `spec` names.

    Args:
        spec: `package.module:factory`, with literal arguments if wanted, such as
            `nets:resnet(depth=18)`; a name of a library, such as `timm:resnet18`; or a
            `.pt2` file of `torch.export.save`.
        checkpoint: A state dict, read with `weights_only=True`, or a `.safetensors` file.
        key: Where in the checkpoint the state dict lies; None looks for it.

    Raises:
        UsageError: The spec, the file or the checkpoint does not fit.
        MissingPackageError: The module needs a package that is missing.
        CaptureError: The `.pt2` file cannot be read.
    """
    exported = spec.endswith(".pt2")
    loaded = _load_exported(Path(spec)) if exported else Loaded(_from_factory(spec))
    if checkpoint is None:
        return loaded
    return replace(loaded, note=load_checkpoint(loaded.model, checkpoint, key))


def _from_factory(spec: str) -> nn.Module:
    wanted = parse_factory(spec)
    place = _import(wanted.module, spec)
    made = libraries.named(wanted) if wanted.module in LIBRARIES else None
    made = made or _found(place, wanted, spec)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"model {spec!r} is a {type(made).__name__}, not a factory of models")
        try:
            made = made(*wanted.args, **wanted.kwargs)
        except Exception as error:  # a user's factory raises anything
            raise UsageError(
                f"model {spec!r}: the factory failed with {type(error).__name__}: {error}"
            ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model {spec!r} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _found(place: Any, wanted: Factory, spec: str) -> Any:
    """What lies at the path of a factory."""
    found, known = place, libraries.names(wanted.module) if wanted.module in LIBRARIES else ()
    for part in wanted.path:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            near = meant(part, [*dir(found), *known])
            raise UsageError(f"model {spec!r}: {error}{near}") from error
    return found


def _import(name: str, spec: str) -> Any:
    opened = libraries.open_library if name.partition(".")[0] in LIBRARIES else import_module
    try:
        return opened(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise no_module(error.name, spec) from error
        raise MissingPackageError(
            f"model {spec!r} needs the package {error.name!r}, which is not installed; install it "
            "into the environment that runs bnfx"
        ) from error
    except Exception as error:  # a module's own code raises anything
        raise UsageError(
            f"model {spec!r}: importing {name} failed with {type(error).__name__}: {error}"
        ) from error


def _load_exported(path: Path) -> Loaded:
    try:
        program = torch.export.load(str(path))
        found = brought(program)
    except Exception as error:  # the loader raises anything on a damaged file
        raise CaptureError(
            f"{path} is not a readable file of torch.export.save: {_first(error)}"
        ) from error
    inputs = None if found.args is None else Inputs(found.args, found.kwargs, None, {})
    return Loaded(found.module, program, inputs, found.dynamic_shapes)


def save_exported(model: fx.GraphModule, inputs: Inputs, shapes: Any, target: Path) -> None:
    """Write an inference graph as `.pt2`; an older file stays until then.

    Raises:
        ExportError: `torch.export.export` failed.
    """
    try:
        args, kwargs = _two_of_each(inputs, shapes)
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=_dims(shapes), strict=False
        )
    except Exception as error:  # the exporter and the user's forward raise anything
        raise ExportError(f"torch.export failed on the folded model: {_first(error)}") from error
    save_program(program, target)


def save_program(program: ExportedProgram, target: Path) -> None:
    """Write a program as `.pt2`; an older file stays until then."""
    content = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.export.save(program, content)
    place(target, content.getbuffer())


def _two_of_each(inputs: Inputs, shapes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with free axes of size 1 doubled: torch.export would take that 1 for fixed."""

    def grow(value: Any, axes: Mapping[int, str] | None) -> Any:
        ones = [axis for axis in axes or {} if value.shape[axis] == 1]
        for axis in ones:
            value = torch.cat([value, value], axis)
        return value

    if shapes is None or not inputs.values:  # those of a .pt2 file were large enough for it
        return inputs.args, dict(inputs.kwargs)
    if isinstance(shapes, Mapping):
        named = {name: grow(value, shapes[name]) for name, value in inputs.values.items()}
        return tuple(named.values())[: len(inputs.args)], {k: named[k] for k in inputs.kwargs}
    return tuple(grow(v, axes) for v, axes in zip(inputs.args, shapes, strict=True)), {}


def _dims(shapes: Any) -> Any:
    """Axis names as the `torch.export.Dim` of that name."""
    return pytree.tree_map(lambda name: name and torch.export.Dim(name), shapes)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
