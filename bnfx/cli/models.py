"""Models from the command line: `package.module:factory`, with a checkpoint, or a `.pt2` file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bnfx.cli.files import replacing
from bnfx.cli.inputs import Inputs
from bnfx.errors import CaptureError, ExportError, MissingPackageError, UsageError

#: Keys under which training scripts keep the state dict in a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model")
#: Endings of checkpoints.
CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Loaded:
    """A model, and what its file says about its inputs.

    Attributes:
        model: The model.
        exported: Whether it comes from a `.pt2` file, whose graph has no modes.
        inputs: The inputs that it was exported with; None for a factory.
        dynamic_shapes: The free axes that it was exported with.
    """

    model: nn.Module
    exported: bool = False
    inputs: Inputs | None = None
    dynamic_shapes: Any = None


def load_model(spec: str, checkpoint: Path | None = None) -> Loaded:
    """The model that `spec` names.

    Args:
        spec: `package.module:factory`, with literal arguments if wanted, such as
            `nets:resnet(depth=18)`; or a `.pt2` file of `torch.export.save`.
        checkpoint: A state dict, read with `weights_only=True`, or a `.safetensors` file.

    Raises:
        UsageError: The spec, the file or the checkpoint does not fit.
        MissingPackageError: The module needs a package that is missing.
        CaptureError: The `.pt2` file cannot be read.
    """
    exported = spec.endswith(".pt2")
    loaded = _load_exported(Path(spec)) if exported else Loaded(_from_factory(spec))
    if checkpoint is not None:
        _load_checkpoint(loaded.model, checkpoint)
    return loaded


def _from_factory(spec: str) -> nn.Module:
    module_name, colon, call = spec.partition(":")
    if not colon or not module_name or not call or module_name.endswith((".py", "/")):
        raise UsageError(
            f"model {spec!r} is neither PACKAGE.MODULE:FACTORY (such as nets:small, for small() in "
            "nets.py of the current directory) nor a .pt2 file"
        )
    path, args, kwargs = _parse_call(call, spec)
    made: Any = _import(module_name, spec)
    for part in path:
        try:
            made = getattr(made, part)
        except AttributeError as error:
            raise UsageError(f"model {spec!r}: {error}") from error
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"model {spec!r} is a {type(made).__name__}, not a factory of models")
        try:
            made = made(*args, **kwargs)
        except Exception as error:  # a user's factory raises anything
            raise UsageError(
                f"model {spec!r}: the factory failed with {type(error).__name__}: {error}"
            ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model {spec!r} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _parse_call(call: str, spec: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """`"a.b(1, c=2)"` -> (["a", "b"], [1], {"c": 2}); arguments are literals."""
    try:
        parsed = ast.parse(call, mode="eval").body
        args, kwargs = [], {}
        if isinstance(parsed, ast.Call):
            args = [ast.literal_eval(arg) for arg in parsed.args]
            kwargs = {str(word.arg): ast.literal_eval(word.value) for word in parsed.keywords}
            parsed = parsed.func
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"model {spec!r}: {call!r} is no name, nor a call with literal arguments such as "
            "resnet(depth=18)"
        ) from error
    path: list[str] = []
    while isinstance(parsed, ast.Attribute):
        path.insert(0, parsed.attr)
        parsed = parsed.value
    if not isinstance(parsed, ast.Name):
        raise UsageError(f"model {spec!r}: {call!r} is no name of a factory")
    return [parsed.id, *path], args, kwargs


def _import(name: str, spec: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` puts it there, the console script does not
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"model {spec!r}: there is no module {error.name!r} in the current directory nor "
                "among the installed packages"
            ) from error
        raise MissingPackageError(
            f"model {spec!r} needs the package {error.name!r}, which is not installed; install it "
            "into the environment that runs bnfx"
        ) from error
    except Exception as error:  # a module's own code raises anything
        raise UsageError(
            f"model {spec!r}: importing {name} failed with {type(error).__name__}: {error}"
        ) from error


def _load_exported(path: Path) -> Loaded:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; torch.export.save writes one")
    try:
        program = torch.export.load(str(path))
        module = program.module()
    except Exception as error:  # the loader raises anything on a damaged file
        raise CaptureError(
            f"{path} is not a readable file of torch.export.save: {_first(error)}"
        ) from error
    for part in module.modules():
        part.training = False  # the modes of a BatchNorm are arguments of its calls
    example = program.example_inputs
    inputs = None if example is None else Inputs(example[0], example[1], None, {})
    return Loaded(module, True, inputs, _symbolic_axes(program, module))


def _symbolic_axes(program: torch.export.ExportedProgram, module: nn.Module) -> Any:
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


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    state = read_state(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = " ".join(lines)[:600]
        raise UsageError(
            f"checkpoint {path} does not fit {type(model).__name__}: {shown}"
        ) from error


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, read without running code from it.

    Raises:
        UsageError: There is no such file, it cannot be read, or holds no state dict.
        MissingPackageError: A `.safetensors` file, and safetensors is not installed.
    """
    if path.suffix not in CHECKPOINTS:
        raise UsageError(f"checkpoint {path}: its name must end in {', '.join(CHECKPOINTS)}")
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(_safetensors().load_file(str(path)))
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MissingPackageError:
        raise
    except Exception as error:  # both readers raise anything on a damaged file
        refused = isinstance(error, pickle.UnpicklingError)
        hint = "; save model.state_dict(), which holds tensors alone" if refused else ""
        raise UsageError(f"checkpoint {path} cannot be read: {_first(error)}{hint}") from error
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        raise UsageError(
            f"checkpoint {path} holds a {type(found).__name__}, no state dict nor one under "
            f"{', '.join(_NESTED)}"
        )
    return dict(found)


def _safetensors() -> Any:
    if importlib.util.find_spec("safetensors") is None:
        raise MissingPackageError("safetensors is not installed; run: pip install safetensors")
    return importlib.import_module("safetensors.torch")


def save_state(model: nn.Module, target: Path) -> None:
    """Write the state dict as `.pt`, `.pth` or `.safetensors`; an older file stays until then."""
    state = model.state_dict()
    with replacing(target) as written:
        if target.suffix == ".safetensors":
            # That format has no storage under two names; here each name gets its own.
            own = {name: value.detach().cpu().clone() for name, value in state.items()}
            _safetensors().save_file(own, str(written))
        else:
            torch.save(state, written)


def save_exported(model: fx.GraphModule, inputs: Inputs, shapes: Any, target: Path) -> None:
    """Write an inference graph as `.pt2`; an older file stays until then.

    Raises:
        ExportError: `torch.export.export` failed.
    """
    try:
        with replacing(target) as written:
            args, kwargs = _two_of_each(inputs, shapes)
            program = torch.export.export(
                model, args, kwargs, dynamic_shapes=_dims(shapes), strict=False
            )
            torch.export.save(program, written)
    except Exception as error:  # the exporter and the user's forward raise anything
        raise ExportError(f"torch.export failed on the folded model: {_first(error)}") from error


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
