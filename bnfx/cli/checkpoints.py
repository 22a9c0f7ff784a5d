"""State dicts as people keep them: read without running code, fitted to a model, and written."""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfx.cli.results import place
from bnfx.errors import MissingPackageError, UsageError

#: Keys under which training scripts keep the state dict in a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
#: What DistributedDataParallel, AveragedModel and Lightning put before names, and torch.compile.
_PREFIXES, _COMPILED = ("module.", "model.", "net."), "_orig_mod."


def load_checkpoint(model: nn.Module, path: Path, key: str | None = None) -> str:
    """Load the state dict in `path` into `model`, strictly.

    Args:
        model: Whose parameters and buffers are wanted.
        path: The checkpoint.
        key: Where in it the state dict lies, with dots for deeper places; None looks for it.

    Returns:
        What was taken off or left out for it to fit, in words; "" where nothing was.

    Raises:
        UsageError: It cannot be read, or does not fit.
        MissingPackageError: A `.safetensors` file, and safetensors is not installed.
    """
    found, where = _state_in(read_checkpoint(path), path, key)
    wanted = model.state_dict()
    name = type(model).__name__
    fits = ((state, done) for state, done in _fittings(found) if set(state) == set(wanted))
    fitted, done = next(fits, (None, ""))
    if fitted is None:
        raise UsageError(
            f"checkpoint {path} does not fit {name}: {_first_difference(found, wanted)}"
        )
    for entry, value in fitted.items():
        own = wanted[entry]
        if isinstance(value, Tensor) and isinstance(own, Tensor) and value.shape != own.shape:
            raise UsageError(
                f"checkpoint {path} does not fit {name}: {entry!r} is {_shape(value)} in it and "
                f"{_shape(own)} in the model; make the model as it was made for the checkpoint"
            )
    try:
        model.load_state_dict(fitted)
    except (RuntimeError, AttributeError, TypeError) as error:
        first = str(error).strip().replace("\n", " ")[:300]
        raise UsageError(f"checkpoint {path} does not fit {name}: {first}") from error
    return "; ".join(filter(None, (where, done)))


def read_checkpoint(path: Path) -> Any:
    """What lies in a checkpoint, read without running code from it.

    Raises:
        UsageError: It cannot be read.
        MissingPackageError: A `.safetensors` file, and safetensors is not installed.
    """
    reader = _safetensors().load_file if path.suffix == ".safetensors" else _torch_load
    try:
        return reader(str(path))
    except Exception as error:  # both readers raise anything on a damaged file
        refused = isinstance(error, pickle.UnpicklingError)
        hint = "; save model.state_dict(), which holds tensors alone" if refused else ""
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"checkpoint {path} cannot be read: {type(error).__name__}: {first}{hint}"
        ) from error


def _torch_load(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_in(found: Any, path: Path, key: str | None) -> tuple[dict[str, Any], str]:
    """The state dict in what a checkpoint holds, and where that was."""
    places = []
    if key is not None:
        for part in [key] if isinstance(found, Mapping) and key in found else key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                has = f"; it has {_some(found)}" if isinstance(found, Mapping) else ""
                raise UsageError(f"checkpoint {path} has no {part!r}{has}")
            found = found[part]
    while key is None and isinstance(found, Mapping):
        inner = next((k for k in _NESTED if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        places.append(inner)
        found = found[inner]
    if isinstance(found, nn.Module) or not isinstance(found, Mapping):
        raise UsageError(
            f"checkpoint {path} holds a {type(found).__name__}, no state dict nor one under "
            f"{', '.join(_NESTED)}; --checkpoint-key KEY says where it is"
        )
    if not any(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(
            f"checkpoint {path} holds no tensors but {_some(found)}; --checkpoint-key KEY says "
            "where the state dict is"
        )
    state = {k: v for k, v in found.items() if isinstance(k, str)}
    return state, f"read from its {'.'.join(places)!r}" if places else ""


def _fittings(found: Mapping[str, Any]) -> Iterable[tuple[dict[str, Any], str]]:
    """The state dict as it is, and without what wrappers put into the names of a model."""
    state, taken, left = dict(found), list[str](), list[str]()
    yield state, ""
    if any(_COMPILED in name for name in state):  # of the whole, or of a part of it
        state = {name.replace(_COMPILED, ""): value for name, value in state.items()}
        taken.append(_COMPILED)
        yield state, f"{_COMPILED!r} taken out of its names"
    while prefix := next((p for p in _PREFIXES if any(n.startswith(p) for n in state)), None):
        taken.append(prefix)
        left += [name for name in state if not name.startswith(prefix)]
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        said = f"{', '.join(map(repr, taken))} taken off its names"
        yield state, f"{said}; left out: {_some(left)}" if left else said


def _first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    said = []
    if missing:
        said.append(f"it has no {missing[0]!r} ({len(missing)} of {len(wanted)} names are missing)")
    if surplus:
        said.append(f"the model has no {surplus[0]!r} ({len(surplus)} of {len(found)} are unknown)")
    return f"{', and '.join(said)}; make the model as it was, or say --checkpoint-key KEY"


def _some(names: Iterable[Any]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"


def _safetensors() -> Any:
    if importlib.util.find_spec("safetensors") is None:
        raise MissingPackageError("safetensors is not installed; run: pip install safetensors")
    return importlib.import_module("safetensors.torch")


def save_state(model: nn.Module, target: Path) -> None:
    """Write the state dict as `.pt`, `.pth` or `.safetensors`; an older file stays until then."""
    state = model.state_dict()
    if target.suffix == ".safetensors":
        # That format has no storage under two names; here each name gets its own.
        own = {name: value.detach().cpu().clone() for name, value in state.items()}
        place(target, _safetensors().save(own))
        return
    # Into memory first: on a full disk torch's own writer ends the process.
    content = io.BytesIO()
    torch.save(state, content)
    place(target, content.getbuffer())
