"""Modules that keep their class and get another forward.

A layer runs its own forward and then the BatchNorm that it holds. Where a BatchNorm stands between
calls of one forward, the code of the edited graph takes the forward's place. The new class is made
when it is needed, also by pickle: a subclass of the old one, with its name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfx.graphs.origins import Origin, name_the_layer, translate


@dataclass(frozen=True)
class Behind:
    """The module's own forward, then the module `norm` that it holds."""

    norm: str
    #: Whether the leading axes are flattened around it: (N, ..., C) of a linear layer.
    per_row: bool

    def forward(self, kind: type[nn.Module]) -> Callable[..., Any]:
        """The forward of a subclass of `kind`."""
        norm, per_row = self.norm, self.per_row

        @functools.wraps(kind.forward)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = kind.forward(module, *args, **kwargs)
            normalise = module.get_submodule(norm)
            if not per_row:
                return normalise(out)  # type: ignore[no-any-return]  # modules are untyped
            return normalise(torch.flatten(out, 0, -2)).view_as(out)  # type: ignore[no-any-return]

        return forward


@dataclass(frozen=True)
class Code:
    """The code of a graph."""

    source: str
    #: What it calls by name: functions and constants, and modules by their own names.
    names: Mapping[str, Any]
    modules: Mapping[str, str]

    @staticmethod
    def of(graph: fx.Graph) -> Code:
        """The code of `graph`, whose modules and tensors are those of `self`."""
        written = graph.python_code("self")
        modules = {k: v.__name__ for k, v in written.globals.items() if isinstance(v, ModuleType)}
        names = {k: v for k, v in written.globals.items() if k not in modules}
        return Code(written.src, names, modules)

    def forward(self, _kind: type[nn.Module]) -> Callable[..., Any]:
        """The forward of a subclass."""
        imported = {k: importlib.import_module(name) for k, name in self.modules.items()}
        scope: dict[str, Any] = {**self.names, **imported}
        exec(compile(self.source, "<bnfx.insert_bn>", "exec"), scope)
        made: Callable[..., Any] = scope["forward"]
        return made


class Kept(nn.Module):
    """A module of another class, with inserted BatchNorms.

    It loads checkpoints from before the insertion, as `InsertedGraph` does.
    """

    _bnfx_origins: Sequence[Origin]
    _bnfx_path: str
    _bnfx_made: tuple[type[nn.Module], Behind | Code]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; an error of a BatchNorm that is inside says behind which layer it is."""
        try:
            return super().__call__(*args, **kwargs)
        except ValueError as error:
            name_the_layer(self, self._bnfx_origins, self._bnfx_path, error)
            raise

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        translate(self, self._bnfx_origins, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _empty, self._bnfx_made, *reduced[2:]


def keep_class(
    module: nn.Module, made: Behind | Code, origins: Sequence[Origin], path: str
) -> None:
    """Give `module` another forward, in place: all that hold it go on doing so.

    Args:
        module: A module of the private copy, with the BatchNorms of `origins` in it.
        made: What its forward becomes.
        origins: The BatchNorms, in names that start from the module.
        path: Where it lies, for errors.
    """
    before = module._bnfx_origins if isinstance(module, Kept) else ()
    module.__class__ = _subclass(type(module), made)
    vars(module)["_bnfx_origins"] = (*before, *origins)
    vars(module)["_bnfx_path"] = path


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module that a BatchNorm was put behind, or its own."""
    return module._bnfx_made[0] if isinstance(module, Kept) else type(module)


def _subclass(kind: type[nn.Module], made: Behind | Code) -> type[nn.Module]:
    forward = made.forward(kind)
    inside = {"forward": forward, "_bnfx_made": (kind, made), "__doc__": kind.__doc__}
    return type(kind.__name__, (Kept, kind), inside)


def _empty(kind: type[nn.Module], made: Behind | Code) -> nn.Module:
    """An instance without state, for pickle and copy."""
    new = _subclass(kind, made)
    return new.__new__(new)
