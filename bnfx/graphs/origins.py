"""Where inserted BatchNorms came from, and what follows for checkpoints and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Origin:
    """Where an inserted BatchNorm came from, in names that start from the graph's root.

    Attributes:
        layer: Path of the affine layer, "" for the root itself.
        bias: Name of the bias that beta replaced; None where there was none, or where it stays.
        norm: Path of the BatchNorm.
    """

    layer: str
    bias: str | None
    norm: str


def name_the_layer(
    module: nn.Module, origins: Sequence[Origin], path: str, error: ValueError
) -> None:
    """Note on an error the inserted BatchNorm that raised it: that of a batch too small, mostly.

    Args:
        module: Holds the BatchNorms of `origins`.
        origins: Them, by names that start from the module.
        path: Where the module lies.
        error: What was raised in its forward.
    """
    norms = {id(module.get_submodule(o.norm)): o for o in reversed(origins)}
    trace = error.__traceback__
    while trace is not None:
        origin = norms.get(id(trace.tb_frame.f_locals.get("self")))
        if origin is not None:
            layer = ".".join(filter(None, (path, origin.layer))) or type(module).__name__
            norm = ".".join(filter(None, (path, origin.norm)))
            error.add_note(
                f"raised by the BatchNorm that bnfx put behind {layer!r} ({norm!r}); in "
                "train mode it needs more than one value per channel: give larger batches, exclude "
                "the layer, or call eval()"
            )
            return
        trace = trace.tb_next


def translate(
    module: nn.Module, origins: Sequence[Origin], state_dict: dict[str, Any], prefix: str
) -> None:
    """Turn a checkpoint from before the insertion of `origins` into one of `module`."""
    spent: set[str] = set()
    given = list(state_dict)
    for origin in origins:
        norm = module.get_submodule(origin.norm)
        own, layer = f"{prefix}{origin.norm}.", f"{prefix}{origin.layer}"
        known = any(key == layer or key.startswith(f"{layer}.") for key in given)
        if origin.layer == "":
            known = any(key.startswith(prefix) for key in given)
        if not isinstance(norm, _BatchNorm) or not known:
            continue
        if any(key.startswith(own) for key in given):
            continue
        bias = None if origin.bias is None else state_dict.get(f"{prefix}{origin.bias}")
        for name, value in _identity(norm, bias).items():
            state_dict[own + name] = value
        spent.add(f"{prefix}{origin.bias}")
    for key in spent & state_dict.keys():
        del state_dict[key]


def _identity(norm: _BatchNorm, bias: Tensor | None) -> dict[str, Tensor]:
    """The state of a BatchNorm that only adds `bias`."""
    state = {name: torch.zeros_like(value) for name, value in norm.state_dict().items()}
    state["running_var"].fill_(1)
    state["weight"].fill_(math.sqrt(1 + norm.eps))
    if bias is not None:
        state["bias"].copy_(bias)
    return state
