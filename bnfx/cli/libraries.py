"""Models by name from timm, torchvision and transformers.

Their weights are random, the same each time, unless the call asks for others (`pretrained=True`,
`weights="DEFAULT"`), which the library then loads.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bnfx.cli.specs import Factory
from bnfx.version import version_of

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def named(wanted: Factory) -> Callable[..., Any] | None:
    """What makes the model that a library knows by this name; None where it knows none."""
    found: Callable[..., Any] | None = _NAMED[wanted.module](".".join(wanted.path))
    return None if found is None else functools.partial(_seeded, found)


def names(module: str) -> Iterable[str]:
    """The names that a library knows."""
    library = open_library(module)
    if module == "timm":
        return [str(name) for name in library.list_models()]
    if module == "torchvision":
        return [str(name) for name in open_torchvision().list_models()]
    return [*map(str, library.CONFIG_MAPPING), *dir(library)]


def open_library(name: str) -> Any:
    """A module of a library that imports torchvision where that is installed."""
    if version_of("torchvision") is not None:
        open_torchvision()
    return importlib.import_module(name)


def open_torchvision() -> Any:
    """The module `torchvision.models`, beside any torch.

    Its wheel is built against a torch for CUDA. Beside one for the CPU its C++ operators do not
    load, and the import fails where it describes operators that then do not exist. Networks for
    classification never call them, so it is enough to declare their schemas.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared()
        return importlib.import_module("torchvision.models")


@functools.cache
def _declared() -> torch.library.Library:
    """Declares what is missing; kept for the life of the process, or torch would forget it."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def _seeded(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Weights that are drawn are the same in the next command, which may have to verify them."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make(*args, **kwargs)


def _timm(name: str) -> Callable[..., Any] | None:
    library = open_library("timm")
    return functools.partial(library.create_model, name) if library.is_model(name) else None


def _torchvision(name: str) -> Callable[..., Any] | None:
    models = open_torchvision()
    return functools.partial(models.get_model, name) if name in models.list_models() else None


def _transformers(name: str) -> Callable[..., Any] | None:
    """A class of a model, a kind of model such as "resnet", a folder, or a name of the hub."""
    library = open_library("transformers")
    if name in library.CONFIG_MAPPING:
        return lambda **options: library.AutoModel.from_config(
            library.AutoConfig.for_model(name, **options)
        )
    if "/" in name or Path(name).is_dir():
        return functools.partial(library.AutoModel.from_pretrained, name)
    kind: Any = getattr(library, name, None)
    if inspect.isclass(kind) and library.PreTrainedModel in kind.__mro__:
        return functools.partial(_configured, kind)
    return None


def _configured(kind: Any, **options: Any) -> Any:
    return kind(kind.config_class(**options))


_NAMED: dict[str, Callable[[str], Callable[..., Any] | None]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
